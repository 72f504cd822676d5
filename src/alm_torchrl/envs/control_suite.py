"""Tasks of the DeepMind Control Suite."""

from __future__ import annotations

import difflib
from typing import Any

from torchrl.envs import CatTensors, ExcludeTransform, FlattenObservation
from torchrl.envs.libs.dm_control import DMControlWrapper
from torchrl.envs.transforms import Transform

from alm_torchrl.files import one_line

PREFIX = "dm_control/"
_INSTALL = (
    "pip install 'alm-torchrl[dmc]' in a separate environment, because the extra 'recipes' has a "
    "newer MuJoCo"
)


def make_control_suite(task: str, kwargs: dict[str, Any], **wrapper: Any) -> DMControlWrapper:
    """Creates one environment ``dm_control/domain-task``, without transforms."""
    try:
        from dm_control import suite
    except Exception as error:  # AttributeError with MuJoCo 4, for example
        raise ImportError(f"{task} requires dm_control ({one_line(error)}): {_INSTALL}") from error
    known = [f"{PREFIX}{domain}-{name}" for domain, name in suite.ALL_TASKS]
    if task not in known:
        close = difflib.get_close_matches(task, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"an example is {known[0]}"
        raise ValueError(f"unknown dm_control task {task!r}: {hint}")
    domain, _, name = task.removeprefix(PREFIX).partition("-")
    try:
        env = suite.load(domain, name, **kwargs)
    except TypeError as error:
        raise ValueError(f"{task} does not take these arguments: {error}") from None
    return DMControlWrapper(env, **wrapper)


def join_observations(env: DMControlWrapper, mask_velocities: bool) -> list[Transform]:
    """Returns transforms that join the observations, optionally without velocities."""
    specs = dict(env.observation_spec.items())
    velocities = [key for key in specs if "vel" in key] if mask_velocities else []
    if mask_velocities and not velocities:
        raise ValueError(f"mask_velocities: no velocity among the observations {list(specs)}")
    kept = [key for key in specs if key not in velocities]
    drop = [ExcludeTransform(*velocities)] if velocities else []
    matrices = [key for key in kept if specs[key].ndim > 1]
    flat = [FlattenObservation(-specs[key].ndim, -1, in_keys=[key]) for key in matrices]
    return [*drop, *flat, CatTensors(kept, "observation", sort=False)]

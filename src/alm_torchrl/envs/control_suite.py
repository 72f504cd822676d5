"""Tasks of the DeepMind Control Suite, through TorchRL."""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from typing import Any

import torch
from torchrl.envs import CatTensors, ExcludeTransform, FlattenObservation
from torchrl.envs.libs.dm_control import DMControlWrapper
from torchrl.envs.transforms import Transform

__all__: list[str] = []

PREFIX = "dm_control/"
_INSTALL = (
    "pip install 'alm-torchrl[dmc]', in an environment apart from the extra 'recipes', whose "
    "MuJoCo is too new for it"
)


def check_control_suite(task: str) -> None:
    """Raises unless dm_control is installed and knows the task, ``dm_control/domain-task``."""
    if find_spec("dm_control") is None:
        raise ImportError(f"{task} needs dm_control: {_INSTALL}")
    try:
        from dm_control import suite
    except Exception as error:  # e.g. AttributeError with MuJoCo 4
        message = " ".join(str(error).split())
        raise ImportError(f"dm_control cannot be imported ({message}): {_INSTALL}") from error
    known = [f"{PREFIX}{domain}-{name}" for domain, name in suite.ALL_TASKS]
    if task not in known:
        close = difflib.get_close_matches(task, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"one is {known[0]}"
        raise ValueError(f"dm_control knows no task {task!r}: {hint}")


def make_control_suite(
    task: str, kwargs: dict[str, Any], *, action_repeat: int, device: torch.device | str
) -> DMControlWrapper:
    """One environment, without transforms."""
    from dm_control import suite

    domain, _, name = task.removeprefix(PREFIX).partition("-")
    try:
        env = suite.load(domain, name, **kwargs)
    except TypeError as error:
        raise ValueError(f"{task} does not take these arguments: {error}") from None
    return DMControlWrapper(env, frame_skip=action_repeat, device=device)


def as_one_observation(env: DMControlWrapper, mask_velocities: bool) -> list[Transform]:
    """Joins the parts of the observation into ``"observation"``, in the suite's order.

    Args:
        env: one environment.
        mask_velocities: leave out the parts whose names say that they are velocities.

    Returns:
        The transforms that do it.

    Raises:
        ValueError: if there is no such part.
    """
    keys = list(env.observation_spec.keys())
    velocities = [key for key in keys if "vel" in key] if mask_velocities else []
    if mask_velocities and not velocities:
        raise ValueError(f"mask_velocities: no velocity among the observations {keys}")
    kept = [key for key in keys if key not in velocities]
    drop = [ExcludeTransform(*velocities)] if velocities else []
    shaped = [key for key in kept if env.observation_spec[key].ndim > 1]  # such as [joints, 2]
    flat = [
        FlattenObservation(-env.observation_spec[key].ndim, -1, in_keys=[key]) for key in shaped
    ]
    return [*drop, *flat, CatTensors(kept, "observation", sort=False)]

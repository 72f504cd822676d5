"""Gymnasium tasks: made, rendered, and asked which of their observations are velocities."""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torchrl.envs import GymWrapper

from alm_torchrl.envs.spaces import with_readable_spaces

__all__: list[str] = []

INSTALL = "pip install 'alm-torchrl[recipes]'"


class GymnasiumEnv(GymWrapper):
    """TorchRL's wrapper, which shares no memory with the environment.

    An environment may write its next observation into the array, or the dict, that it returned, and
    may change the action that it is given.
    """

    def read_obs(self, observations: Any) -> dict[str, Any]:
        """Reads a copy of the observation."""
        return super().read_obs(copy.deepcopy(observations))

    def read_action(self, action: Any) -> Any:
        """Gives the environment an action of its own."""
        return copy.deepcopy(super().read_action(action))

    def _output_transform(self, step: tuple[Any, ...]) -> Any:
        observation, reward, terminated, truncated, info = step  # flags may be 0 and 1
        return super()._output_transform(
            (observation, reward, bool(terminated), bool(truncated), info)
        )


def make_gymnasium(
    task: str,
    gym_kwargs: dict[str, Any],
    *,
    action_repeat: int,
    render: bool,
    size: tuple[int, int] | None,
    device: torch.device | str,
) -> GymnasiumEnv:
    """One environment, without transforms, that renders frames if asked to.

    Only MuJoCo tasks can choose their height and width; others render as they do.
    """
    options = {**gym_kwargs, "render_mode": "rgb_array"} if render else gym_kwargs
    if size is None:
        env = _gym_make(task, options)
    else:
        try:
            env = _gym_make(task, {**options, "height": size[0], "width": size[1]})
        except ValueError as error:
            if not re.search("argument '(height|width)'", str(error)):
                raise
            env = _gym_make(task, options)
    if render:
        env = with_own_context(env)
    # No GymEnv, which keeps arguments such as frame_skip from gymnasium.make
    return GymnasiumEnv(with_readable_spaces(env), frame_skip=action_repeat, device=device)


def _gym_make(task: str, gym_kwargs: dict[str, Any]) -> Any:
    """``gymnasium.make`` with errors of one line."""
    import gymnasium

    options = {"disable_env_checker": True, **gym_kwargs}
    try:
        with _quiet_mujoco():
            return gymnasium.make(task, **options)
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise ImportError(
            f"{task} cannot be made here: {one_line(error)} (MuJoCo tasks: {INSTALL})"
        ) from None
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        raise ValueError(f"{task} does not take the argument {unknown[1]!r}") from None


def check_gymnasium(task: str) -> None:
    """Raises unless Gymnasium is installed and knows the task."""
    if find_spec("gymnasium") is None:
        raise ImportError(f"make_env needs Gymnasium: {INSTALL}")
    import gymnasium

    module, _, name = task.rpartition(":")
    try:
        if module:  # "module:Task-v0" is registered by that module
            import_module(module)
        gymnasium.spec(name)
    except (gymnasium.error.Error, ImportError) as error:
        close = difflib.get_close_matches(name, _newest_ids(gymnasium.registry), n=3)
        guess = bool(close) and not isinstance(error, ImportError)
        hint = f"did you mean {' or '.join(close)}?" if guess else one_line(error)
        raise ValueError(f"Gymnasium knows no task {task!r}: {hint}") from None


def is_registered(task: str) -> bool:
    """Whether ``module:Task``, whose module has been imported, is an id without a version."""
    if find_spec("gymnasium") is None:
        return False
    import gymnasium

    return task.rpartition(":")[2] in gymnasium.registry


def _newest_ids(registry: dict[str, Any]) -> list[str]:
    """The ids of the newest version of every task."""
    newest: dict[tuple[str | None, str], Any] = {}
    for spec in registry.values():
        known = newest.setdefault((spec.namespace, spec.name), spec)
        if (spec.version or 0) > (known.version or 0):
            newest[spec.namespace, spec.name] = spec
    return [spec.id for spec in newest.values()]


def with_own_context(env: Any) -> Any:
    """Renders in the environment's own OpenGL context, and frees what it holds there.

    Gymnasium leaves current whichever context came last, so that of several environments in a
    process, or after another one was closed, frames come out black or another's. Where no camera is
    chosen, the task's camera ``"track"`` is, if it has one: the free camera stands still, and the
    robot leaves the picture. Without MuJoCo's renderer the environment is returned as it is.
    """
    import gymnasium

    if not hasattr(env.unwrapped, "mujoco_renderer"):
        return env

    renderer = env.unwrapped.mujoco_renderer
    if renderer.camera_id == -1:  # neither chosen here nor by the task: the free camera
        renderer.camera_id = _tracking_camera(env.unwrapped.model)

    class OwnContext(gymnasium.Wrapper):
        def _viewer(self) -> Any:
            return renderer._viewers.get("rgb_array")

        def render(self) -> Any:
            if (viewer := self._viewer()) is not None:
                viewer.make_context_current()
            return super().render()

        def close(self) -> None:
            if (viewer := self._viewer()) is not None:
                # Left to the garbage collector, it would take the same names from another context
                viewer.make_context_current()
                viewer.con.free()
            super().close()

    return OwnContext(env)


def _tracking_camera(model: Any) -> int:
    """The camera that follows the robot, or -1, the free camera."""
    import mujoco

    return mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")


def velocities(env: Any) -> list[int]:
    """Which dimensions of a MuJoCo task's observation are velocities.

    They follow from what the task says of its observation (``observation_structure``), or from the
    simulator's sizes where the observation is all positions, then all velocities.

    Args:
        env: a Gymnasium environment.

    Returns:
        The indices; none if they are unknown.
    """
    task, shape = env.unwrapped, env.observation_space.shape
    parts = getattr(task, "observation_structure", None)
    model = getattr(task, "model", None)
    if parts is None and model is not None:
        parts = {"qpos": getattr(model, "nq", 0), "qvel": getattr(model, "nv", 0)}
    indices: list[int] = []
    start = 0
    for name, size in (parts or {}).items():
        if name.startswith("skipped"):
            continue
        if name in ("qvel", "cvel", "ten_velocity"):
            indices += range(start, start + size)
        start += size
    return indices if shape == (start,) else []


@contextmanager
def _quiet_mujoco() -> Iterator[None]:
    """Keeps MuJoCo's notices on outdated model files from the terminal and from MUJOCO_LOG.TXT.

    MuJoCo 4 writes them for every model that Gymnasium 1.4 loads. Its other warnings are passed on
    as Python warnings.
    """
    try:
        import mujoco
    except ImportError:
        yield
        return
    messages: list[str] = []
    previous = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(messages.append)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(previous)
        for message in messages:
            if "deprecated" not in message:
                warnings.warn(f"MuJoCo: {message}", stacklevel=4)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())

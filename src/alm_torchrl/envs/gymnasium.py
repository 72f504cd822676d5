"""Gymnasium environments: creation, rendering, spaces, and velocities in observations."""

from __future__ import annotations

import copy
import difflib
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from torchrl.envs import GymWrapper

from alm_torchrl.files import one_line

INSTALL = "pip install 'alm-torchrl[recipes]'"


class GymnasiumEnv(GymWrapper):
    """TorchRL's wrapper with copies, because environments may change arrays in place."""

    def read_obs(self, observations: Any) -> dict[str, Any]:
        """Reads a copy of the observation."""
        return super().read_obs(copy.deepcopy(observations))

    def read_action(self, action: Any) -> Any:
        """Returns a copy of the action."""
        return copy.deepcopy(super().read_action(action))

    def _output_transform(self, step: tuple[Any, ...]) -> Any:
        observation, reward, terminated, truncated, info = step  # flags may be 0 and 1
        return super()._output_transform(
            (observation, reward, bool(terminated), bool(truncated), info)
        )


def wrap(env: Any, **wrapper: Any) -> GymnasiumEnv:
    """Wraps a ``gymnasium.Env`` for TorchRL."""
    return GymnasiumEnv(_with_supported_spaces(_with_own_context(env)), **wrapper)


def make_gymnasium(
    task: str, kwargs: dict[str, Any], *, render: bool, size: tuple[int, int] | None, **wrapper: Any
) -> GymnasiumEnv:
    """Creates one environment, without transforms."""
    _check_task(task)
    # Unlike GymEnv, this passes arguments such as frame_skip to the task.
    options = {**kwargs, "render_mode": "rgb_array"} if render else kwargs
    if size is not None:  # only MuJoCo tasks accept a size; other frames are resized later
        try:
            env = _gym_make(task, {**options, "height": size[0], "width": size[1]})
            return wrap(env, **wrapper)
        except ValueError as error:
            if not re.search("argument '(height|width)'", str(error)):
                raise
    return wrap(_gym_make(task, options), **wrapper)


def _gym_make(task: str, kwargs: dict[str, Any]) -> Any:
    """Calls ``gymnasium.make``, with one-line errors."""
    import gymnasium

    try:
        with _quiet_mujoco():
            return gymnasium.make(task, **{"disable_env_checker": True, **kwargs})
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise ImportError(
            f"cannot create {task}: {one_line(error)}. For MuJoCo tasks: {INSTALL}"
        ) from None
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        raise ValueError(f"{task} does not take the argument {unknown[1]!r}") from None


def _check_task(task: str) -> None:
    """Raises if Gymnasium is not installed or does not know the task."""
    if find_spec("gymnasium") is None:
        raise ImportError(f"make_env requires Gymnasium: {INSTALL}")
    import gymnasium

    module, _, name = task.rpartition(":")
    try:
        if module:  # "module:Task-v0" is registered by that module
            import_module(module)
        gymnasium.spec(name)
    except (gymnasium.error.Error, ImportError) as error:
        known: list[str] = [] if isinstance(error, ImportError) else list(gymnasium.registry)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else one_line(error)
        raise ValueError(f"unknown Gymnasium task {task!r}: {hint}") from None


def is_registered(task: str) -> bool:
    """Returns whether ``module:Task`` is a Gymnasium id; the module must be imported before."""
    gymnasium = sys.modules.get("gymnasium")
    return gymnasium is not None and task.rpartition(":")[2] in gymnasium.registry


def _with_own_context(env: Any) -> Any:
    """Renders a MuJoCo task in its own OpenGL context, and with its tracking camera.

    Gymnasium renders in the context that was used last, so with several environments in a process,
    frames may be black or show another environment. The default camera does not follow the robot.
    """
    import gymnasium

    if env.render_mode is None or not hasattr(env.unwrapped, "mujoco_renderer"):
        return env
    renderer = env.unwrapped.mujoco_renderer
    if renderer.camera_id == -1:  # no camera was chosen
        import mujoco

        camera = mujoco.mjtObj.mjOBJ_CAMERA
        renderer.camera_id = mujoco.mj_name2id(env.unwrapped.model, camera, "track")  # or -1

    class OwnContext(gymnasium.Wrapper):
        def _activate(self) -> Any:
            viewer = renderer._viewers.get("rgb_array")
            if viewer is not None:
                viewer.make_context_current()
            return viewer

        def render(self) -> Any:
            self._activate()
            return super().render()

        def close(self) -> None:
            if (viewer := self._activate()) is not None:
                # The garbage collector could free objects of another context.
                viewer.con.free()
            super().close()

    return OwnContext(env)


def _with_supported_spaces(env: Any) -> Any:
    """Converts observations that TorchRL does not support, and actions that are not a vector.

    Discrete observations are shifted to start at 0, binary and discrete matrices become vectors,
    float16 becomes float32, and the parts of a Tuple get the names "0", "1" and so on. Scalar and
    matrix actions, and a Dict or Tuple of boxes, become one float32 vector.
    """
    from gymnasium import spaces, wrappers

    action: Any = env.action_space
    is_vector = isinstance(action, spaces.Box) and len(action.shape) == 1
    if _is_continuous(action) and not (is_vector and action.dtype != np.float16):
        flat: Any = spaces.flatten_space(action)
        low, high = flat.low.astype(np.float32), flat.high.astype(np.float32)
        env = wrappers.TransformAction(
            env,
            lambda value: spaces.unflatten(action, value),
            spaces.Box(low, high, dtype=np.float32),
        )
    space, convert = _supported(env.observation_space)
    if space == env.observation_space:
        return env
    return wrappers.TransformObservation(env, convert, space)


def _supported(space: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Returns a supported space, and the function that converts a value to it."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        items = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        parts = {key: _supported(part) for key, part in items}
        return spaces.Dict({str(key): part for key, (part, _) in parts.items()}), lambda values: {
            str(key): convert(values[key]) for key, (_, convert) in parts.items()
        }
    if isinstance(space, spaces.Discrete) and space.start != 0:
        return spaces.Discrete(space.n), lambda value: value - space.start
    if isinstance(space, spaces.MultiDiscrete) and (space.nvec.ndim > 1 or space.start.any()):
        return spaces.MultiDiscrete(space.nvec.ravel()), lambda v: (v - space.start).ravel()
    if isinstance(space, spaces.MultiBinary) and len(space.shape) > 1:
        return spaces.MultiBinary(int(np.prod(space.shape))), np.ravel
    if isinstance(space, spaces.Box) and space.dtype == np.float16:
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        return spaces.Box(low, high, dtype=np.float32), lambda value: value.astype(np.float32)
    return space, lambda value: value


def _is_continuous(space: Any) -> bool:
    """Returns whether a space consists only of floating-point boxes."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return all(map(_is_continuous, space.values()))
    if isinstance(space, spaces.Tuple):
        return all(map(_is_continuous, space))
    return isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)


def velocities(env: Any) -> list[int]:
    """Returns the dimensions of a MuJoCo task's observation that are velocities, if known."""
    model = getattr(env.unwrapped, "model", None)
    parts = {"qpos": getattr(model, "nq", 0), "qvel": getattr(model, "nv", 0)}
    parts = getattr(env.unwrapped, "observation_structure", parts)
    indices: list[int] = []
    start = 0
    for name, size in parts.items():
        if not name.startswith("skipped"):
            if name in ("qvel", "cvel", "ten_velocity"):
                indices += range(start, start + size)
            start += size
    return indices if env.observation_space.shape == (start,) else []


@contextmanager
def _quiet_mujoco() -> Iterator[None]:
    """Converts MuJoCo's messages to warnings, except for deprecations in Gymnasium's models."""
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

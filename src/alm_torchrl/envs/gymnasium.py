"""Gymnasium tasks: creation, rendering, and the velocities in their observations."""

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

from alm_torchrl.envs.spaces import with_supported_spaces
from alm_torchrl.files import one_line

INSTALL = "pip install 'alm-torchrl[recipes]'"


class GymnasiumEnv(GymWrapper):
    """TorchRL's wrapper, without shared memory.

    An environment may reuse the arrays that it returned and change its action in place.
    """

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


def wrap(env: Any, *, action_repeat: int, device: torch.device | str) -> GymnasiumEnv:
    """Wraps a ``gymnasium.Env`` for TorchRL."""
    env = with_supported_spaces(_with_own_context(env))
    return GymnasiumEnv(env, frame_skip=action_repeat, device=device)


def make_gymnasium(
    task: str,
    task_kwargs: dict[str, Any],
    *,
    action_repeat: int,
    render: bool,
    size: tuple[int, int] | None,
    device: torch.device | str,
) -> GymnasiumEnv:
    """Creates one environment, without transforms."""
    # GymEnv would remove arguments such as frame_skip.
    options = {**task_kwargs, "render_mode": "rgb_array"} if render else task_kwargs
    if size is not None:  # only MuJoCo tasks accept a size; the frames of others are resized later
        try:
            env = _gym_make(task, {**options, "height": size[0], "width": size[1]})
            return wrap(env, action_repeat=action_repeat, device=device)
        except ValueError as error:
            if not re.search("argument '(height|width)'", str(error)):
                raise
    return wrap(_gym_make(task, options), action_repeat=action_repeat, device=device)


def _gym_make(task: str, task_kwargs: dict[str, Any]) -> Any:
    """``gymnasium.make`` with errors of one line."""
    import gymnasium

    try:
        with _quiet_mujoco():
            return gymnasium.make(task, **{"disable_env_checker": True, **task_kwargs})
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise ImportError(
            f"cannot create {task}: {one_line(error)}. For MuJoCo tasks: {INSTALL}"
        ) from None
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        raise ValueError(f"{task} does not take the argument {unknown[1]!r}") from None


def check_gymnasium(task: str) -> None:
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
        close = difflib.get_close_matches(name, _newest_ids(gymnasium.registry), n=3)
        guess = bool(close) and not isinstance(error, ImportError)
        hint = f"did you mean {' or '.join(close)}?" if guess else one_line(error)
        raise ValueError(f"unknown Gymnasium task {task!r}: {hint}") from None


def is_registered(task: str) -> bool:
    """Returns whether ``module:Task``, whose module has been imported, is a Gymnasium id."""
    if find_spec("gymnasium") is None:
        return False
    import gymnasium

    return task.rpartition(":")[2] in gymnasium.registry


def _newest_ids(registry: dict[str, Any]) -> list[str]:
    """Returns the id of the newest version of every task."""
    newest: dict[tuple[str | None, str], Any] = {}
    for spec in registry.values():
        known = newest.setdefault((spec.namespace, spec.name), spec)
        if (spec.version or 0) > (known.version or 0):
            newest[spec.namespace, spec.name] = spec
    return [spec.id for spec in newest.values()]


def _with_own_context(env: Any) -> Any:
    """Renders a MuJoCo task in its own OpenGL context, and with its tracking camera.

    Gymnasium renders in the context that was used last, so with several environments in a process
    frames may be black or of another environment. The default camera is free and loses the robot.
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
                # The garbage collector would free objects of another context.
                viewer.con.free()
            super().close()

    return OwnContext(env)


def velocities(env: Any) -> list[int]:
    """Returns the dimensions of a MuJoCo task's observation that are velocities, if known."""
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
    """Turns MuJoCo's messages into warnings, except for deprecations in Gymnasium's models."""
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

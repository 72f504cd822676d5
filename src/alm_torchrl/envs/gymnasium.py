"""Gymnasium tasks as TorchRL environments."""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    EnvBase,
    GymWrapper,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    TransformedEnv,
)

__all__ = ["make_env", "random_states", "set_random_states"]

_INSTALL = "pip install 'alm-torchrl[recipes]'"


def make_env(
    task: str,
    *,
    seed: int | Sequence[int] | None = None,
    num_envs: int = 1,
    parallel: bool = False,
    from_pixels: bool = False,
    device: torch.device | str = "cpu",
    **gym_kwargs: Any,
) -> EnvBase:
    """Makes a Gymnasium task with float32 observations and the return of the running episode.

    A time limit sets ``truncated`` and ``done``, never ``terminated``. The action range is the
    task's own and stands in ``env.action_spec`` (Humanoid-v5: -0.4 to 0.4).

    Args:
        task: a Gymnasium id, such as ``"HalfCheetah-v5"``.
        seed: seed of the environment; each of several environments derives its own from it, or is
            given its own where there is one for each.
        num_envs: environments stepped together; the batch size is ``[num_envs]`` if more than 1.
        parallel: step them in processes of their own rather than one after the other. The script
            then needs an ``if __name__ == "__main__":`` guard.
        from_pixels: add rendered frames, uint8 ``[height, width, 3]``, as ``"pixels"`` beside the
            observation, for videos. Where rendering is impossible, a warning and no frames.
        device: where the tensors live.
        **gym_kwargs: passed to ``gymnasium.make``. Ant-v5 with
            ``include_cfrc_ext_in_observation=False`` is the 27-d truncated Ant; Humanoid-v5 with
            ``include_cinert_in_observation``, ``include_cvel_in_observation``,
            ``include_qfrc_actuator_in_observation`` and ``include_cfrc_ext_in_observation`` all
            False is the 45-d truncated Humanoid.

    Returns:
        The environment. ``"observation"`` is float32 ``[..., size]``; ``"episode_reward"``, float32
        ``[..., 1]``, is the sum of the episode's rewards so far.

    Raises:
        ImportError: if Gymnasium, or the simulator that the task needs, is not installed.
        ValueError: if the task is unknown or does not take one of ``gym_kwargs``, if ``num_envs``
            is less than 1, or if there are not as many seeds as environments.

    Examples:
        >>> env = make_env("HalfCheetah-v5", seed=0)
        >>> env.observation_spec["observation"].shape
        torch.Size([17])
        >>> env.rollout(3)["next", "episode_reward"].shape
        torch.Size([3, 1])
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, not {num_envs}")
    seeds = [None] * num_envs if seed is None or isinstance(seed, int) else list(seed)
    if len(seeds) != num_envs:
        raise ValueError(f"{len(seeds)} seeds were given for num_envs={num_envs}: {seeds}")
    _check_task(task)
    render = from_pixels and _can_render(task, gym_kwargs)
    make = partial(_make_one, task, gym_kwargs, device=device, from_pixels=render)
    env = make(seed=seeds[0])
    if num_envs > 1:
        env.close()  # made above so that an error is raised in this process, before any worker
        makes = [partial(make, seed=own) for own in seeds]
        env = (ParallelEnv if parallel else SerialEnv)(num_envs, makes, device=device)
    env = TransformedEnv(env, Compose(DoubleToFloat(), RewardSum()))
    if isinstance(seed, int):
        env.set_seed(seed)
    return env


def random_states(env: EnvBase) -> list[str]:
    """The states of the random generators that the next episodes are drawn from.

    Args:
        env: an environment, such as :func:`make_env` makes.

    Returns:
        For each Gymnasium environment in it that lives in this process, its generator's state as
        JSON; nothing for others, or if the environment is closed.
    """
    return [json.dumps(one.np_random.bit_generator.state) for one in _gymnasium_envs(env)]


def set_random_states(env: EnvBase, states: Sequence[str]) -> None:
    """Gives the random generators of an environment back the states that they had.

    Without states, the environment is seeded from torch's generator.

    Args:
        env: an environment like that of :func:`random_states`.
        states: what that returned.

    Raises:
        ValueError: if there are not as many states as environments.
    """
    envs = _gymnasium_envs(env)
    if not states:
        env.set_seed(int(torch.randint(2**31 - 1, ())))
        return
    if len(envs) != len(states):
        raise ValueError(f"{len(states)} states of generators for {len(envs)} environments")
    for one, state in zip(envs, states, strict=True):
        one.np_random.bit_generator.state = json.loads(state)


def _gymnasium_envs(env: EnvBase) -> list[Any]:
    if isinstance(env, TransformedEnv):
        return _gymnasium_envs(env.base_env)
    if isinstance(env, SerialEnv):
        return [one for part in getattr(env, "_envs", ()) for one in _gymnasium_envs(part)]
    return [env._env.unwrapped] if isinstance(env, GymWrapper) and not env.is_closed else []


def _make_one(
    task: str,
    gym_kwargs: dict[str, Any],
    *,
    seed: int | None,
    device: torch.device | str,
    from_pixels: bool,
) -> EnvBase:
    """One environment, without transforms."""
    # GymWrapper and not GymEnv, which keeps arguments such as frame_skip from gymnasium.make
    env = _gym_make(task, gym_kwargs, render_mode="rgb_array" if from_pixels else None)
    wrapped = GymWrapper(env, from_pixels=from_pixels, pixels_only=False, device=device)
    if seed is not None:
        wrapped.set_seed(seed)
    return wrapped


def _gym_make(task: str, gym_kwargs: dict[str, Any], render_mode: str | None) -> Any:
    """``gymnasium.make`` with errors of one line."""
    import gymnasium

    options = {"disable_env_checker": True, **gym_kwargs}
    if render_mode is not None:
        options["render_mode"] = render_mode
    try:
        with _quiet_mujoco():
            return gymnasium.make(task, **options)
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise ImportError(
            f"{task} cannot be made here: {_one_line(error)} (MuJoCo tasks: {_INSTALL})"
        ) from None
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        raise ValueError(f"{task} does not take the argument {unknown[1]!r}") from None


def _check_task(task: str) -> None:
    """Raises unless Gymnasium is installed and knows the task."""
    if find_spec("gymnasium") is None:
        raise ImportError(f"make_env needs Gymnasium: {_INSTALL}")
    import gymnasium

    try:
        gymnasium.spec(task)
    except (gymnasium.error.Error, ImportError) as error:
        close = difflib.get_close_matches(task, _newest_ids(gymnasium.registry), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else _one_line(error)
        raise ValueError(f"Gymnasium knows no task {task!r}: {hint}") from None


def _newest_ids(registry: dict[str, Any]) -> list[str]:
    """The ids of the newest version of every task."""
    newest: dict[tuple[str | None, str], Any] = {}
    for spec in registry.values():
        known = newest.setdefault((spec.namespace, spec.name), spec)
        if (spec.version or 0) > (known.version or 0):
            newest[spec.namespace, spec.name] = spec
    return [spec.id for spec in newest.values()]


def _can_render(task: str, gym_kwargs: dict[str, Any]) -> bool:
    """Renders one frame, and warns where that fails."""
    env = _gym_make(task, gym_kwargs, render_mode="rgb_array")
    try:
        env.reset()
        env.render()
    except Exception as error:  # noqa: BLE001 - every driver fails in its own way
        warnings.warn(
            f"no frames of {task}: it cannot be rendered here ({_one_line(error)}). On a machine "
            "without a display, set the environment variable MUJOCO_GL to egl or osmesa",
            stacklevel=3,
        )
        return False
    finally:
        env.close()
    return True


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

"""Gymnasium tasks as TorchRL environments."""

from __future__ import annotations

import difflib
import warnings
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    EnvBase,
    GymEnv,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    TransformedEnv,
)

__all__ = ["make_env"]

_INSTALL = "pip install 'alm-torchrl[recipes]'"


def make_env(
    task: str,
    *,
    seed: int | None = None,
    num_envs: int = 1,
    parallel: bool = False,
    from_pixels: bool = False,
    device: torch.device | str = "cpu",
    **gym_kwargs: Any,
) -> EnvBase:
    """Makes a Gymnasium task with float32 observations and the return of the running episode.

    A time limit sets ``truncated`` and ``done``, never ``terminated``. The action range is the
    task's own and stands in ``env.action_spec`` (Humanoid-v5: +-0.4).

    Args:
        task: a Gymnasium id, such as ``"HalfCheetah-v5"``.
        seed: seed of the environment; environment ``i`` of several derives its own from it.
        num_envs: environments stepped together; the batch size is ``[num_envs]`` if more than 1.
        parallel: step them in processes of their own rather than one after the other.
        from_pixels: add rendered frames (uint8 ``[height, width, 3]``) as ``"pixels"``, beside the
            observation, for videos. Where rendering is impossible, a warning, and no frames.
        device: where the tensors live.
        **gym_kwargs: passed to ``gymnasium.make``. Ant-v5 with
            ``include_cfrc_ext_in_observation=False`` is the 27-d truncated Ant; Humanoid-v5 with
            ``include_cinert_in_observation``, ``include_cvel_in_observation``,
            ``include_qfrc_actuator_in_observation`` and ``include_cfrc_ext_in_observation`` all
            False is the 45-d truncated Humanoid.

    Returns:
        The environment. ``"observation"`` is float32; ``"episode_reward"`` (``[..., 1]``) is the
        sum of the rewards of the episode so far.

    Raises:
        ImportError: if Gymnasium, or the simulator the task needs, is not installed.
        ValueError: if the task is unknown, or does not take one of ``gym_kwargs``.

    Examples:
        >>> env = make_env("HalfCheetah-v5", seed=0)
        >>> env.observation_spec["observation"].shape
        torch.Size([17])
        >>> env.rollout(3)["next", "episode_reward"].shape
        torch.Size([3, 1])
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, not {num_envs}")
    _check_task(task)
    if from_pixels and not _can_render(task, gym_kwargs):
        from_pixels = False
    make = partial(_make_single, task, from_pixels, device, gym_kwargs)
    if num_envs == 1:
        env = make()
    else:
        env = (ParallelEnv if parallel else SerialEnv)(num_envs, make, device=device)
    env = TransformedEnv(env, Compose(DoubleToFloat(), RewardSum()))
    if seed is not None:
        env.set_seed(seed)
    return env


def _make_single(
    task: str, from_pixels: bool, device: torch.device | str, gym_kwargs: dict[str, Any]
) -> EnvBase:
    try:
        return GymEnv(task, from_pixels=from_pixels, pixels_only=False, device=device, **gym_kwargs)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"{task} does not take one of {sorted(gym_kwargs)}: {error}") from None


def _check_task(task: str) -> None:
    if find_spec("gymnasium") is None:
        raise ImportError(f"make_env needs Gymnasium: {_INSTALL}")
    import gymnasium

    try:
        gymnasium.spec(task)
    except gymnasium.error.Error as error:
        close = difflib.get_close_matches(task, list(gymnasium.registry), n=4, cutoff=0.6)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        reason = " ".join(str(error).split())
        raise ValueError(f"unknown Gymnasium task {task!r}{hint} ({reason})") from None


def _can_render(task: str, gym_kwargs: dict[str, Any]) -> bool:
    import gymnasium

    try:
        env = gymnasium.make(task, render_mode="rgb_array", **gym_kwargs)
        env.reset()
        env.render()
        env.close()
    except Exception as error:  # noqa: BLE001 - drivers fail in ways of their own
        warnings.warn(f"no video: {task} cannot be rendered here ({error})", stacklevel=3)
        return False
    return True

"""Creation of environments from a task name, an import path, a class or a function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, SupportsIndex

import torch
from tensordict import NestedKey
from torchrl.data import Bounded
from torchrl.envs import (
    CatFrames,
    Compose,
    DoubleToFloat,
    EnvBase,
    ExcludeTransform,
    GymWrapper,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    TransformedEnv,
    VecNorm,
    VecNormV2,
)
from torchrl.envs.libs.dm_control import DMControlWrapper
from torchrl.envs.transforms import Transform, UnaryTransform

from alm_torchrl.envs import control_suite, custom, gymnasium
from alm_torchrl.envs.failures import EnvironmentFailedError
from alm_torchrl.envs.generators import random_states, set_random_states
from alm_torchrl.envs.transforms import (
    CopyData,
    Distractors,
    History,
    RenderFrames,
    SeededEnv,
    transforms_of,
)
from alm_torchrl.files import one_line
from alm_torchrl.spawned import GUARD_HINT, leave_unguarded_script

_VIDEO_SIZE = (240, 320)  # height and width of the frames of a Control Suite task

Task = str | Callable[..., Any]


def make_env(
    task: Task,
    *,
    seed: int | Sequence[int] | None = None,
    num_envs: int = 1,
    parallel: bool = False,
    pixels: bool | int | Sequence[int] = False,
    frame_stack: int = 3,
    proprioception: bool = False,
    action_repeat: int = 1,
    mask_velocities: bool = False,
    distractors: int = 0,
    history: int = 0,
    history_actions: bool = False,
    from_pixels: bool = False,
    transforms: Sequence[Transform] = (),
    device: torch.device | str = "cpu",
    **task_kwargs: Any,
) -> EnvBase:
    """Creates an environment with float32 observations and the return of the running episode.

    A time limit sets ``truncated`` and ``done``, but never ``terminated``. Actions have the range
    of the task (``env.action_spec``). Options that change the observation apply in this order:
    ``mask_velocities``, ``distractors``, ``history``.

    Args:
        task: a Gymnasium id (``"HalfCheetah-v5"``); a task of the DeepMind Control Suite
            (``"dm_control/cheetah-run"``), whose observations are joined; or a class or function
            that creates a ``gymnasium.Env`` or an :class:`~torchrl.envs.EnvBase`, or its import
            path (``"package.module:attribute"``).
        seed: seed of the environment or of all environments, or a sequence with one seed for each.
        num_envs: number of environments; the batch size is ``[num_envs]`` if more than 1.
        parallel: step them in processes; the script needs an ``if __name__ == "__main__":`` guard.
        pixels: observe rendered frames instead of the vector: their size (one number, or height
            and width), or True for 84 by 84.
        frame_stack: number of frames in ``"pixels"``, the newest last; a reset repeats the first.
        proprioception: keep ``"observation"`` in addition to ``"pixels"``.
        action_repeat: simulator steps with each action; their rewards are summed.
        mask_velocities: remove the velocities of a MuJoCo or Control Suite task.
        distractors: dimensions of standard Gaussian noise appended to ``"observation"``.
        history: length of ``"history"``, the newest observation last; a reset repeats the first.
        history_actions: append to each observation the previous action, which is zero at a reset.
        from_pixels: for videos, add rendered frames, uint8 ``[height, width, 3]``, as ``"pixels"``,
            or warn if there is no renderer. Ignored with ``pixels``.
        transforms: transforms to apply last, without running statistics (normalize in the encoder).
        device: device of the tensors.
        **task_kwargs: arguments of ``gymnasium.make``, ``suite.load``, or your class or function.

    Returns:
        The environment. ``"observation"`` is float32 ``[..., O]``; ``"pixels"``, uint8
        ``[..., 3 * frame_stack, height, width]``; ``"history"``, float32 ``[..., history, O]`` or
        ``[..., history, O + A]``; ``"episode_reward"``, float32 ``[..., 1]``.

    Raises:
        ImportError: if Gymnasium, dm_control or the simulator is not installed.
        ValueError: if the task is unknown, is not an environment or has an unbounded action, or if
            an option is out of range or does not apply to the task.
        OSError: if ``pixels`` cannot be rendered, or a process of ``parallel`` does not start.
        EnvironmentFailedError: if creating the environment raises another exception.

    Examples:
        >>> env = make_env("HalfCheetah-v5", mask_velocities=True, history=8, history_actions=True)
        >>> env.rollout(3)["history"].shape  # 8 positions and 6 actions
        torch.Size([3, 8, 14])
    """
    if parallel:
        leave_unguarded_script()
    num_envs, action_repeat = index(num_envs), index(action_repeat)
    seed = index(seed) if isinstance(seed, SupportsIndex) else seed
    seeds = _seeds(seed, num_envs)
    _check_transforms(transforms)
    name = task if isinstance(task, str) else getattr(task, "__qualname__", repr(task))
    observed = _Observed(
        _size(pixels), frame_stack, proprioception, action_repeat, mask_velocities, distractors,
        history, history_actions,
    )  # fmt: skip
    make = partial(_make_one, task, name, task_kwargs, observed, device)
    if from_pixels and observed.size is None:
        try:
            make(video=True).close()
            make = partial(make, video=True)
        except OSError as error:
            warnings.warn(f"no frames for a video: {error}", stacklevel=2)
    # Errors are raised in this process, before workers start.
    try:
        env = make(seed=seeds[0])
        _check_action(env, name)
        if num_envs > 1:
            env.close()
    except (ImportError, OSError, TypeError, ValueError):
        raise
    except Exception as error:
        raise EnvironmentFailedError(f"cannot create {name}: {one_line(error)}") from error
    if num_envs > 1:
        makes = [partial(make, seed=own) for own in seeds]
        env = (_start_parallel if parallel else SerialEnv)(num_envs, makes, device=device)
    chain = Compose(DoubleToFloat(), RewardSum(), *(transform.clone() for transform in transforms))
    env = TransformedEnv(env, chain, auto_unwrap=False)
    env.__dict__["task_name"] = name  # for messages
    if isinstance(seed, int):
        env.set_seed(seed)
    return env


def _start_parallel(*args: Any, **kwargs: Any) -> ParallelEnv:
    env = ParallelEnv(*args, **kwargs)
    try:
        env.start()
    except EOFError:
        raise ChildProcessError(f"parallel=True cannot start a process: {GUARD_HINT}") from None
    return env


def frame_stacks(env: EnvBase) -> dict[NestedKey, int]:
    """Returns the number of frames of each stacked observation of an environment.

    It finds observations that TorchRL's :class:`~torchrl.envs.CatFrames` stacks along their first
    dimension. Pass the result to :func:`alm_torchrl.data.make_replay_buffer`. If the environments
    are in other processes, it creates another one in this process.

    Examples:
        >>> frame_stacks(make_env("HalfCheetah-v5", history=8))
        {'history': 8}
    """
    if isinstance(env, SerialEnv) and not env.is_closed:
        return frame_stacks(env._envs[0])
    if isinstance(env, (SerialEnv, ParallelEnv)):
        one = env.create_env_fn[0]()
        stacks = frame_stacks(one)
        one.close()
        return stacks
    if not isinstance(env, TransformedEnv):
        return {}
    stacks = frame_stacks(env.base_env)
    spec = env.observation_spec_unbatched
    for transform in transforms_of(env):
        if isinstance(transform, CatFrames):
            for key in transform.out_keys:
                if key in spec.keys(True, True) and spec[key].ndim == -transform.dim:
                    stacks[key] = transform.N
    return stacks


@dataclass(frozen=True)
class _Observed:
    """The options of :func:`make_env` that change the observations and actions."""

    size: tuple[int, int] | None
    frame_stack: int
    proprioception: bool
    action_repeat: int
    mask_velocities: bool
    distractors: int
    history: int
    history_actions: bool

    def __post_init__(self) -> None:
        least = {"action_repeat": 1, "frame_stack": 1, "distractors": 0, "history": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, not {getattr(self, name)}")
        if self.history_actions and not self.history:
            raise ValueError("history_actions requires a history: choose history=8, for example")
        if self.proprioception and self.size is None:
            raise ValueError("proprioception requires pixels: choose pixels=84, for example")

    def transforms(self, env: EnvBase, name: str) -> list[Transform]:
        """Returns the transforms of one environment."""
        chain: list[Transform] = []
        keys = sorted(env.observation_spec.keys())
        if isinstance(env, DMControlWrapper):
            chain += control_suite.join_observations(env, self.mask_velocities)
            keys = ["observation"]
        elif self.mask_velocities or self.distractors or self.history:
            if "observation" not in keys:
                raise ValueError(
                    "mask_velocities, distractors and history change the entry 'observation', but "
                    f"{name} observes {keys}"
                )
            if self.mask_velocities:
                chain.append(_mask_velocities(env, name))
        if self.distractors:
            chain.append(Distractors(self.distractors))
        if self.history:
            chain.append(History(self.history_actions))
            chain.append(CatFrames(self.history, dim=-2, in_keys=["history"]))
        if self.size is not None:
            chain.append(_render_frames(env, name, self.size))
            chain.append(CatFrames(self.frame_stack, dim=-3, in_keys=["pixels"]))
            if not self.proprioception:
                chain.append(ExcludeTransform(*keys))
        return chain


def _make_one(
    task: Task,
    name: str,
    kwargs: dict[str, Any],
    observed: _Observed,
    device: torch.device | str,
    *,
    video: bool = False,
    seed: int | None = None,
) -> EnvBase:
    """Creates one environment with the transforms of its observations."""
    wrapper: dict[str, Any] = {"frame_skip": observed.action_repeat, "device": device}
    factory = _factory(task)
    if factory is not None:
        env = custom.make_custom(factory, name, kwargs, **wrapper)
    elif name.startswith(control_suite.PREFIX):
        env = control_suite.make_control_suite(name, kwargs, **wrapper)
    else:
        wrapper |= {"render": video or observed.size is not None, "size": observed.size}
        env = gymnasium.make_gymnasium(name, kwargs, **wrapper)
    chain = observed.transforms(env, name)
    if video:
        chain.append(_render_frames(env, name, None))
    if not isinstance(env, (gymnasium.GymnasiumEnv, DMControlWrapper)):
        env = TransformedEnv(env, CopyData(), auto_unwrap=False)
    if chain:
        env = SeededEnv(env, Compose(DoubleToFloat(), *chain), auto_unwrap=False)
    if seed is not None:
        env.set_seed(seed)
    return env


def _factory(task: Task) -> Callable[..., Any] | None:
    """Returns the class or function of a custom task, or None for an id."""
    if not isinstance(task, str):
        return task
    if not custom.IMPORT_PATH.fullmatch(task):
        return None
    try:
        return custom.import_factory(task)
    except ValueError:
        if gymnasium.is_registered(task):
            return None
        raise


def _seeds(seed: int | Sequence[int] | None, num_envs: int) -> list[int | None]:
    """Returns the seed of each environment, or None for those derived from a single seed."""
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, not {num_envs}")
    if seed is None or isinstance(seed, int):
        return [None] * num_envs
    seeds: list[int | None] = list(map(index, seed))
    if len(seeds) != num_envs:
        raise ValueError(f"got {len(seeds)} seeds for num_envs={num_envs}: {seeds}")
    return seeds


def _check_transforms(transforms: Sequence[Transform]) -> None:
    """Raises a ValueError if a transform has running statistics."""
    for transform in transforms:
        for part in transform.modules():
            if isinstance(part, (VecNorm, VecNormV2)):
                raise ValueError(
                    f"{type(part).__name__} keeps running statistics, which evaluation does not "
                    "share: normalize in the encoder (MLPEncoder(normalize=True), "
                    "encoder=mlp_normalized) or with fixed statistics (ObservationNorm(loc, scale))"
                )


def _size(pixels: bool | int | Sequence[int] | None) -> tuple[int, int] | None:
    """Returns the height and width of the frames."""
    if pixels is None or pixels is False:
        return None
    size = 84 if pixels is True else pixels
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"pixels must be the size of frames, such as 84 or [84, 84], not {pixels}")
    return height, width


def _check_action(env: EnvBase, name: str) -> None:
    """Raises if a continuous action is unbounded: it could not be sampled."""
    for key, spec in env.full_action_spec.items(True, True):
        if not spec.dtype.is_floating_point:
            continue
        # The width of the range of all float32 is infinite.
        width = spec.space.high - spec.space.low if isinstance(spec, Bounded) else None
        if width is None or not width.isfinite().all():
            raise ValueError(
                f"{name} has an unbounded {key!r}: use a space with finite bounds, such as "
                "gymnasium.spaces.Box(-1, 1, (2,)) or torchrl.data.Bounded(-1, 1, (2,))"
            )


def _mask_velocities(env: EnvBase, name: str) -> UnaryTransform:
    """Returns the transform that removes the velocities from the observation."""
    velocities = gymnasium.velocities(env._env) if isinstance(env, GymWrapper) else []
    if not velocities:
        raise ValueError(
            f"mask_velocities: the velocities in the observation of {name} are unknown; for a "
            "custom task, remove them in the environment"
        )
    size = env.observation_spec["observation"].shape[-1]
    kept = torch.tensor(sorted(set(range(size)) - set(velocities)), device=env.device)
    return UnaryTransform(["observation"], ["observation"], fn=lambda vector: vector[..., kept])


def _render_frames(env: EnvBase, name: str, size: tuple[int, int] | None) -> RenderFrames:
    """Returns the transform that renders frames of a size, or for a video without one."""
    if isinstance(env, GymWrapper):
        render: Callable[[], Any] = env._env.render
    elif isinstance(env, DMControlWrapper):
        render = partial(env._env.physics.render, *(size or _VIDEO_SIZE), camera_id=0)
    else:
        raise ValueError(
            f"{name} is an EnvBase, which cannot be rendered here: write frames to 'pixels' in the "
            "environment, uint8 [3, height, width], and stack them with torchrl.envs.CatFrames"
        )
    states = random_states(env)
    try:
        env.set_seed(0)  # a free camera takes its position from the first state
        frames = RenderFrames(render, size, channels_first=size is not None)
        set_random_states(env, states)
        return frames
    except (TypeError, ValueError):
        raise
    except Exception as error:  # drivers raise many types
        raise OSError(
            f"cannot render {name} ({one_line(error)}): on a machine without a display, set the "
            "environment variable MUJOCO_GL to egl or osmesa before Python starts"
        ) from error

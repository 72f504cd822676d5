"""One function for every environment: tasks by name, or one's own, and what is observed of them."""

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
from torchrl.envs.transforms import Transform

from alm_torchrl.envs import control_suite, custom, gymnasium
from alm_torchrl.envs.failures import EnvironmentFailedError
from alm_torchrl.envs.generators import random_states, set_random_states
from alm_torchrl.envs.transforms import (
    Distractors,
    History,
    KeepDimensions,
    OwnMemory,
    Render,
    RenderFrames,
    SeededEnv,
    transforms_of,
)
from alm_torchrl.files import one_line
from alm_torchrl.spawned import GUARD_HINT, leave_unguarded_script

__all__ = ["frame_stacks", "make_env"]

_VIDEO_SIZE = (240, 320)  # height and width of a Control Suite task's frames


def make_env(
    task: str | Callable[..., Any],
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
    """Makes a task with float32 observations and the return of the running episode.

    A time limit sets ``truncated`` and ``done``, never ``terminated``. The action range is the
    task's own and stands in ``env.action_spec`` (Humanoid-v5: -0.4 to 0.4). The options that
    change what is observed come in this order: velocities are left out, distractors are appended,
    and the history is made of what is left.

    Args:
        task: a Gymnasium id, such as ``"HalfCheetah-v5"``; a task of the DeepMind Control Suite,
            such as ``"dm_control/cheetah-run"``, whose observations are joined in the suite's
            order; or an environment of your own: a class or function that makes a
            ``gymnasium.Env`` or an :class:`~torchrl.envs.EnvBase`, or where to import it from,
            ``"package.module:attribute"``.
        seed: seed of the environment; each of several environments derives its own from it, or is
            given its own where there is one for each.
        num_envs: environments stepped together; the batch size is ``[num_envs]`` if more than 1.
        parallel: step them in processes of their own rather than one after the other. The script
            then needs an ``if __name__ == "__main__":`` guard.
        pixels: observe rendered frames in place of the vector: their size, one number or height and
            width, or True for 84 by 84.
        frame_stack: frames in ``"pixels"``, the newest last; at a reset, the first one repeated.
        proprioception: keep ``"observation"`` beside ``"pixels"``.
        action_repeat: simulator steps with each action, whose rewards are summed, until the episode
            ends. An environment step is then as many simulator steps.
        mask_velocities: leave the velocities out of ``"observation"``: joint and body velocities of
            Gymnasium's MuJoCo tasks, and the Control Suite's entries of that name.
        distractors: dimensions of standard Gaussian noise appended to ``"observation"``.
        history: observations in ``"history"``, the newest last; at a reset, the first one repeated.
        history_actions: join each with the action before it, zeros at a reset.
        from_pixels: for videos, add frames as they are rendered, uint8 ``[height, width, 3]``, as
            ``"pixels"`` beside the observation, unless ``pixels`` are observed. Where rendering is
            impossible, a warning and no frames.
        transforms: further ones of TorchRL's, copies of which come last, such as what primes an
            encoder's memory. Running statistics (``VecNormV2``) are kept by an encoder instead.
        device: where the tensors live.
        **task_kwargs: passed to ``gymnasium.make``, ``dm_control.suite.load``, or your class or
            function. Ant-v5 with ``include_cfrc_ext_in_observation=False`` is the 27-d truncated
            Ant; Humanoid-v5 with ``include_cinert_in_observation``,
            ``include_cvel_in_observation``, ``include_qfrc_actuator_in_observation`` and
            ``include_cfrc_ext_in_observation`` all False is the 45-d truncated Humanoid.

    Returns:
        The environment. ``"observation"`` is float32 ``[..., O]``; ``"pixels"``, uint8
        ``[..., 3 * frame_stack, height, width]``; ``"history"``, float32 ``[..., history, O]``, or
        ``O + A`` with actions of size ``A``; ``"episode_reward"``, float32 ``[..., 1]``, is the sum
        of the episode's rewards so far.

    Raises:
        ImportError: if Gymnasium or dm_control, or the simulator that the task needs, is not
            installed.
        ValueError: if the task is unknown, is no environment, has an unbounded action, or does not
            take one of ``task_kwargs``; if an option is out of range or does not fit the task; if
            there are not as many seeds as environments; or if a transform keeps running statistics.
        OSError: if ``pixels`` are asked for and cannot be rendered here, or a process of
            ``parallel`` does not start.
        EnvironmentFailedError: if the environment raises anything else as it is made.

    Examples:
        >>> env = make_env("HalfCheetah-v5", seed=0)
        >>> env.observation_spec["observation"].shape
        torch.Size([17])
        >>> env.rollout(3)["next", "episode_reward"].shape
        torch.Size([3, 1])
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
    kind = _kind(task)
    observed = _Observed(
        _size(pixels), frame_stack, proprioception, mask_velocities, distractors, history,
        history_actions,
    )  # fmt: skip
    observed.check(action_repeat)
    make = partial(
        _make_one, task, kind, task_kwargs, observed, action_repeat=action_repeat, device=device
    )
    if from_pixels and observed.size is None:
        make = partial(make, video=_can_render(partial(make, video=True)))
    try:
        env = make(seed=seeds[0])
        _check_action(env, task)
        if num_envs > 1:
            env.close()
    except (ImportError, OSError, TypeError, ValueError):
        raise
    except Exception as error:
        raise EnvironmentFailedError(f"{_name(task)} cannot be made: {one_line(error)}") from error
    if num_envs > 1:
        # One was made above so that an error is raised in this process, before any worker
        makes = [partial(make, seed=own) for own in seeds]
        env = (ParallelEnv if parallel else SerialEnv)(num_envs, makes, device=device)
        if parallel:
            _start(env)
    chain = Compose(DoubleToFloat(), RewardSum(), *(transform.clone() for transform in transforms))
    env = TransformedEnv(env, chain, auto_unwrap=False)
    env.__dict__["task_name"] = _name(task)  # what messages call it
    if isinstance(seed, int):
        env.set_seed(seed)
    return env


def _start(env: ParallelEnv) -> None:
    """Starts the processes of parallel environments.

    Raises:
        ChildProcessError: if one of them ends on the way.
    """
    try:
        env.start()
    except EOFError:
        raise ChildProcessError(f"parallel=True could not start a process: {GUARD_HINT}") from None


def frame_stacks(env: EnvBase) -> dict[NestedKey, int]:
    """Which observations are stacks that a replay buffer can store frame by frame.

    Args:
        env: an environment, such as :func:`make_env` makes; one that is stepped in processes of its
            own is made once more here, to look.

    Returns:
        For each entry that TorchRL's :class:`~torchrl.envs.CatFrames` stacks along its first
        dimension, the number of frames: what :func:`alm_torchrl.data.make_replay_buffer` takes.

    Examples:
        >>> frame_stacks(make_env("HalfCheetah-v5", history=8))
        {'history': 8}
    """
    if isinstance(env, (SerialEnv, ParallelEnv)):
        if isinstance(env, SerialEnv) and not env.is_closed:
            return frame_stacks(env._envs[0])
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
    """What is observed of a task; :func:`make_env` documents it."""

    size: tuple[int, int] | None
    frame_stack: int
    proprioception: bool
    mask_velocities: bool
    distractors: int
    history: int
    history_actions: bool

    def check(self, action_repeat: int) -> None:
        """Raises a ValueError that names the option if a number is out of range."""
        for name, value, least in (
            ("action_repeat", action_repeat, 1),
            ("frame_stack", self.frame_stack, 1),
            ("distractors", self.distractors, 0),
            ("history", self.history, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if self.history_actions and not self.history:
            raise ValueError("history_actions joins actions to the history: choose history=8, say")
        if self.proprioception and self.size is None:
            raise ValueError("proprioception keeps the vector beside pixels: choose pixels=84, say")

    @property
    def changes_vector(self) -> bool:
        """Whether it takes the entry ``"observation"``."""
        return bool(self.mask_velocities or self.distractors or self.history)

    def transforms(self, env: EnvBase, name: str) -> list[Transform]:
        """What is done to the observations of one environment."""
        chain: list[Transform] = []
        if isinstance(env, DMControlWrapper):
            chain += control_suite.as_one_observation(env, self.mask_velocities)
        elif self.changes_vector and "observation" not in env.observation_spec.keys():  # noqa: SIM118
            raise ValueError(
                f"mask_velocities, distractors and history change the entry 'observation', and "
                f"{name} observes {sorted(env.observation_spec.keys())}"
            )
        elif self.mask_velocities:
            chain.append(KeepDimensions(_positions(env, name)))
        if self.distractors:
            chain.append(Distractors(self.distractors))
        if self.history:
            chain.append(History(self.history_actions))
            chain.append(CatFrames(self.history, dim=-2, in_keys=["history"]))
        if self.size is not None:
            chain.append(_render_frames(env, name, self.size))
            chain.append(CatFrames(self.frame_stack, dim=-3, in_keys=["pixels"]))
            if not self.proprioception:
                joined = isinstance(env, DMControlWrapper)
                own = ["observation"] if joined else sorted(env.observation_spec.keys())
                chain.append(ExcludeTransform(*own))
        return chain


def _make_one(
    task: str | Callable[..., Any],
    kind: str,
    task_kwargs: dict[str, Any],
    observed: _Observed,
    *,
    action_repeat: int,
    device: torch.device | str,
    video: bool = False,
    seed: int | None = None,
) -> EnvBase:
    """One environment, with what is observed of it."""
    options: dict[str, Any] = {"action_repeat": action_repeat, "device": device}
    name = _name(task)
    env: EnvBase
    if kind == "gymnasium":
        options |= {"size": observed.size, "render": video or observed.size is not None}
        env = gymnasium.make_gymnasium(name, task_kwargs, **options)
    elif kind == "control suite":
        env = control_suite.make_control_suite(name, task_kwargs, **options)
    else:
        factory = custom.import_factory(task) if isinstance(task, str) else task
        env = custom.make_custom(factory, task_kwargs, name=name, **options)
    chain = observed.transforms(env, name)
    if video:
        chain.append(_render_frames(env, name, None))
    if not isinstance(env, (gymnasium.GymnasiumEnv, DMControlWrapper)):
        env = TransformedEnv(env, OwnMemory(), auto_unwrap=False)
    if chain:
        env = SeededEnv(env, Compose(DoubleToFloat(), *chain), auto_unwrap=False)
    if seed is not None:
        env.set_seed(seed)
    return env


def _kind(task: str | Callable[..., Any]) -> str:
    """What makes the task; raises unless that knows it."""
    if not isinstance(task, str):
        return "custom"
    if custom.is_import_path(task):
        try:
            custom.import_factory(task)
        except ValueError:
            if not gymnasium.is_registered(task):
                raise
        else:
            return "custom"
    if task.startswith(control_suite.PREFIX):
        control_suite.check_control_suite(task)
        return "control suite"
    gymnasium.check_gymnasium(task)
    return "gymnasium"


def _name(task: str | Callable[..., Any]) -> str:
    return task if isinstance(task, str) else getattr(task, "__qualname__", repr(task))


def _seeds(seed: int | Sequence[int] | None, num_envs: int) -> list[int | None]:
    """A seed for each environment, where they are given."""
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, not {num_envs}")
    seeds: list[int | None] = [None] * num_envs
    if seed is not None and not isinstance(seed, int):
        seeds = list(map(index, seed))
    if len(seeds) != num_envs:
        raise ValueError(f"{len(seeds)} seeds were given for num_envs={num_envs}: {seeds}")
    return seeds


def _check_transforms(transforms: Sequence[Transform]) -> None:
    """Raises for running statistics, of which every environment would have its own."""
    for transform in transforms:
        for part in transform.modules():
            if isinstance(part, (VecNorm, VecNormV2)):
                raise ValueError(
                    f"{type(part).__name__} keeps running statistics, which an evaluation does "
                    "not share, the replay buffer would mix and no agent's file would hold: "
                    "normalize in the encoder (MLPEncoder(normalize=True), encoder="
                    "mlp_normalized), or by fixed numbers (ObservationNorm(loc, scale))"
                )


def _size(pixels: bool | int | Sequence[int] | None) -> tuple[int, int] | None:
    """Height and width of the frames."""
    if pixels is None or pixels is False:
        return None
    size = 84 if pixels is True else pixels
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    if height < 1 or width < 1:
        raise ValueError(f"pixels is the size of the frames, 84 or [84, 84], not {pixels}")
    return height, width


def _check_action(env: EnvBase, task: str | Callable[..., Any]) -> None:
    """Raises if there is a continuous action without bounds, which no noise can be scaled to."""
    for key, spec in env.full_action_spec.items(True, True):
        if not spec.dtype.is_floating_point:
            continue
        # A range of all float32 is none: no number is drawn from it
        width = spec.space.high - spec.space.low if isinstance(spec, Bounded) else None
        if width is None or not width.isfinite().all():
            raise ValueError(
                f"{_name(task)} takes an unbounded {key!r}: give its space finite bounds, such as "
                "gymnasium.spaces.Box(-1, 1, (2,)) or torchrl.data.Bounded(-1, 1, (2,))"
            )


def _positions(env: EnvBase, name: str) -> list[int]:
    """The dimensions of the observation that are no velocities."""
    velocities = gymnasium.velocities(env._env) if isinstance(env, GymWrapper) else []
    if not velocities:
        raise ValueError(
            f"mask_velocities: it is not known which dimensions of {name}'s observation are "
            "velocities; for tasks of your own, leave them out of the observation"
        )
    size = env.observation_spec["observation"].shape[-1]
    return sorted(set(range(size)) - set(velocities))


def _render_frames(env: EnvBase, name: str, size: tuple[int, int] | None) -> RenderFrames:
    """What adds frames of this size, or for a video (without one) as they are rendered."""
    render: Render
    if isinstance(env, GymWrapper):
        render = env._env.render
    elif isinstance(env, DMControlWrapper):
        render = partial(env._env.physics.render, *(size or _VIDEO_SIZE), camera_id=0)
    else:
        raise ValueError(
            f"{name} makes an EnvBase, which is not rendered here: write your frames to 'pixels' "
            "yourself, uint8 [3, height, width], and stack them by torchrl.envs.CatFrames"
        )
    states = random_states(env)
    try:
        env.set_seed(0)  # a camera without a place of its own takes it from the first state seen
        frames = RenderFrames(render, size, channels_first=size is not None)
        set_random_states(env, states)
        return frames
    except (TypeError, ValueError):
        raise
    except Exception as error:  # every driver fails in its own way
        message = " ".join(str(error).split())
        raise OSError(
            f"{name} cannot be rendered here ({message}). On a machine without a display, set the "
            "environment variable MUJOCO_GL to egl or osmesa before Python starts"
        ) from error


def _can_render(make: Callable[[], EnvBase]) -> bool:
    """Renders one frame, and warns where that fails."""
    try:
        make().close()
    except OSError as error:
        warnings.warn(f"no frames for a video: {error}", stacklevel=3)
        return False
    return True

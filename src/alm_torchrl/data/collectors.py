"""Collectors: TorchRL's, set up for off-policy learning from a stochastic policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

from alm_torchrl.data.ray_workers import RayWorkers
from alm_torchrl.data.workers import AsyncWorkers, SyncWorkers
from alm_torchrl.spawned import leave_unguarded_script

__all__ = ["make_collector"]


def make_collector(
    create_env: EnvBase | Callable[[], EnvBase],
    policy: TensorDictModuleBase | None,
    *,
    frames_per_batch: int = 1,
    total_frames: int = -1,
    init_random_frames: int = 0,
    kind: Literal["sync", "multi", "ray"] = "sync",
    num_workers: int = 1,
    overlap: bool = False,
    device: torch.device | str | None = None,
    seed: int | None = None,
    timeout: float = 600.0,
    start_timeout: float = 600.0,
    max_restarts: int = 10,
    **collector_kwargs: Any,
) -> BaseCollector:
    """Makes a TorchRL collector that feeds a replay buffer.

    The first ``init_random_frames`` actions are uniform in the action spec; after them the policy
    acts, sampling (``ExplorationType.RANDOM``). A frame is one step of one environment.

    A worker process that dies, or does not answer, ends the collection with a
    :class:`WorkersLostError`. A Ray actor is replaced, with a warning. The next batch then does not
    follow the last one: ``collector.restarts`` has grown, and
    :meth:`WindowReplayBuffer.truncate_open_episodes` says so to the buffer (``ExperienceStream``
    does). What an environment raises in a worker is raised here.

    Args:
        create_env: a function without arguments that makes the environment (picklable for the
            kinds with workers), or an environment (``kind="sync"`` alone).
        policy: the acting policy; ``None`` acts at random throughout. With ``kind="sync"`` and the
            policy on ``device`` its parameters are shared, and an optimizer's step acts at once.
            Workers act with what ``collector.update_policy_weights_()`` sent last.
        frames_per_batch: frames in a batch, over all the environments it comes from.
        total_frames: frames after which iteration stops; -1 for never.
        init_random_frames: uniformly random frames at the start.
        kind: ``"sync"`` steps in this process; ``"multi"`` in ``num_workers`` processes, which need
            an ``if __name__ == "__main__":`` guard in the script; ``"ray"`` in ``num_workers``
            actors of the Ray cluster that ``RAY_ADDRESS`` names, or of one started here.
        num_workers: processes or actors; 1 for ``"sync"``.
        overlap: whether workers collect on while the last batch is learnt from. They do not wait
            for one another either: a batch comes from one worker.
        device: where the policy acts, the environment steps and the data is returned; each stays
            where it is if left out.
        seed: seed of the environments, and in workers also of TorchRL's random numbers, drawn from
            torch's generator if left out. A seed inside ``create_env`` is the same in each worker.
        timeout: seconds after which a worker that does not answer counts as lost.
        start_timeout: seconds that workers may take to start.
        max_restarts: Ray actors replaced within an hour.
        **collector_kwargs: passed to TorchRL's collector, such as ``policy_device``,
            ``storing_device`` or ``compile_policy``; for ``"ray"`` also ``ray_init_config`` and
            ``remote_configs`` (what a worker asks of the cluster, ``{"num_cpus": 1}``).

    Returns:
        The collector. A batch is ``[T]`` for one environment, ``[num_envs, T]`` for several, and
        gets a leading ``[num_workers]`` where there are workers. With ``overlap`` a batch comes
        from one worker, and its last step is marked ``truncated`` (not ``terminated``), so that no
        window joins two workers: take ``frames_per_batch`` much longer than a window.

    Raises:
        ValueError: if the frames do not divide as asked, or the kind is unknown.
        ImportError: if Ray is asked for and not installed.
        WorkersLostError: if a worker does not start.

    Examples:
        >>> from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv
        >>> collector = make_collector(
        ...     ContinuousActionVecMockEnv, None, frames_per_batch=5, init_random_frames=10
        ... )
        >>> next(iter(collector)).shape
        torch.Size([5])
        >>> collector.shutdown()
    """
    _check_workers(kind, num_workers, overlap)
    _check_frames(frames_per_batch, init_random_frames, 1 if overlap else num_workers)
    options: dict[str, Any] = {
        "frames_per_batch": frames_per_batch,
        "total_frames": total_frames,
        "init_random_frames": init_random_frames,
        "use_buffers": False,
        "auto_register_policy_transforms": False,
        "device": device,
    }
    if kind == "sync":  # trajectory ids cost time and nothing here reads them
        options |= {"track_traj_ids": False, "exploration_type": ExplorationType.RANDOM}
        collector = Collector(create_env, policy, **{**options, **collector_kwargs})
        if seed is not None:
            collector.set_seed(seed)
            collector.reset()
        return collector
    if isinstance(create_env, EnvBase):
        raise ValueError(
            f"kind={kind!r} makes an environment in each worker: pass a function that makes it"
        )
    options |= {
        "set_truncated": overlap,
        "seed": int(torch.randint(2**31 - 1, ())) if seed is None else seed,
        "timeout": timeout,
        "start_timeout": start_timeout,
    }
    create_envs = [create_env] * num_workers
    if kind == "ray":
        options |= {"track_traj_ids": False, "overlap": overlap, "max_restarts": max_restarts}
        return RayWorkers(create_envs, policy, **{**options, **collector_kwargs})
    leave_unguarded_script()
    options["exploration_type"] = ExplorationType.RANDOM
    if not overlap:
        options["cat_results"] = "stack"
    workers = AsyncWorkers if overlap else SyncWorkers
    return workers(create_envs, policy, **{**options, **collector_kwargs})


def _check_workers(kind: str, num_workers: int, overlap: bool) -> None:
    """Raises unless the kind is known and fits the number of workers."""
    if kind not in ("sync", "multi", "ray"):
        raise ValueError(f"kind must be 'sync', 'multi' or 'ray', not {kind!r}")
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, not {num_workers}")
    if kind == "sync" and num_workers != 1:
        raise ValueError(f"kind='sync' runs in this process: num_workers is 1, not {num_workers}")
    if kind == "sync" and overlap:
        raise ValueError("kind='sync' runs in this process, and cannot overlap with learning")


def _check_frames(frames_per_batch: int, init_random_frames: int, num_parts: int) -> None:
    """Raises unless the numbers of frames fit each other and the workers of a batch."""
    if frames_per_batch < 1:
        raise ValueError(f"frames_per_batch must be at least 1, not {frames_per_batch}")
    if init_random_frames < 0:
        raise ValueError(f"init_random_frames must be at least 0, not {init_random_frames}")
    if frames_per_batch % num_parts:
        raise ValueError(
            f"frames_per_batch {frames_per_batch} is not a multiple of num_workers={num_parts}"
        )
    if init_random_frames % frames_per_batch:
        below = init_random_frames // frames_per_batch * frames_per_batch
        raise ValueError(
            f"init_random_frames {init_random_frames} is not a multiple of frames_per_batch "
            f"{frames_per_batch}: take {below} or {below + frames_per_batch}"
        )

"""Creation of TorchRL collectors for off-policy learning."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

from alm_torchrl.data.workers import AsyncWorkers, SyncWorkers
from alm_torchrl.spawned import leave_unguarded_script


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
    """Creates a TorchRL collector.

    The first ``init_random_frames`` actions are uniform in the action spec; then the policy acts
    with ``ExplorationType.RANDOM``. A frame is one step of one environment.

    If a process dies or does not answer, the collector raises a :class:`WorkersLostError`. A Ray
    actor is replaced with a warning, and ``collector.restarts`` increases; then call
    :meth:`WindowReplayBuffer.truncate_open_episodes`, as ``ExperienceStream`` does. The collector
    also raises the exceptions of environments in workers.

    Args:
        create_env: a function that creates the environment (picklable unless ``kind="sync"``), or,
            for ``kind="sync"``, an environment.
        policy: the policy; ``None`` for random actions. ``kind="sync"`` shares its parameters;
            workers use the weights of the last call of ``collector.update_policy_weights_()``.
        frames_per_batch: frames in a batch, over all its environments.
        total_frames: frames after which iteration stops; -1 for no limit.
        init_random_frames: random frames at the start.
        kind: ``"sync"`` collects in this process. ``"multi"`` collects in ``num_workers``
            processes, for which the script needs an ``if __name__ == "__main__":`` guard. ``"ray"``
            collects in ``num_workers`` actors: of the cluster that ``ray.init`` connected to, of
            the cluster at ``RAY_ADDRESS``, or of a new local cluster.
        num_workers: number of processes or actors; 1 for ``"sync"``.
        overlap: collect while the learner updates; workers do not wait for each other.
        device: device of the policy, the environment and the data; unchanged by default.
        seed: seed of the environments and workers; drawn from torch's generator by default.
        timeout: seconds to wait for an answer of a worker.
        start_timeout: seconds to wait for the workers to start.
        max_restarts: number of Ray actors that may be replaced within an hour.
        **collector_kwargs: arguments of TorchRL's collector, such as ``policy_device``; for
            ``"ray"`` also ``remote_configs``, the resources of each actor (``{"num_cpus": 1}``).

    Returns:
        The collector. A batch is ``[T]`` for one environment and ``[num_envs, T]`` for several,
        with a leading ``[num_workers]`` for workers. With ``overlap``, a batch has data of one
        worker and its last step is truncated, so ``frames_per_batch`` should be much larger than
        a window.

    Raises:
        ValueError: if the kind is unknown, or the numbers of frames do not fit each other.
        ImportError: if ``kind="ray"`` and Ray is not installed.
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
    check_workers(kind, num_workers, overlap)
    _check_frames(frames_per_batch, init_random_frames, 1 if overlap else num_workers)
    options: dict[str, Any] = {
        "frames_per_batch": frames_per_batch,
        "total_frames": total_frames,
        "init_random_frames": init_random_frames,
        "use_buffers": False,
        "auto_register_policy_transforms": False,
        "device": device,
    }
    if kind == "sync":  # unused trajectory ids would cost time
        options |= {"track_traj_ids": False, "exploration_type": ExplorationType.RANDOM}
        collector = Collector(create_env, policy, **{**options, **collector_kwargs})
        if seed is not None:
            collector.set_seed(seed)
            collector.reset()
        return collector
    if isinstance(create_env, EnvBase):
        raise ValueError(
            f"kind={kind!r} creates an environment in each worker: pass a function that creates it"
        )
    options |= {
        "set_truncated": overlap,
        "seed": int(torch.randint(2**31 - 1, ())) if seed is None else seed,
        "timeout": timeout,
        "start_timeout": start_timeout,
    }
    if kind == "ray":
        if find_spec("ray") is None:
            raise ImportError("kind='ray' requires Ray: pip install 'alm-torchrl[ray]'")
        from alm_torchrl.data.ray_workers import RayWorkers

        options |= {"num_workers": num_workers, "overlap": overlap, "max_restarts": max_restarts}
        options["track_traj_ids"] = False
        return RayWorkers(create_env, policy, **{**options, **collector_kwargs})
    leave_unguarded_script()
    options["exploration_type"] = ExplorationType.RANDOM
    if not overlap:
        options["cat_results"] = "stack"
    workers = AsyncWorkers if overlap else SyncWorkers
    return workers([create_env] * num_workers, policy, **{**options, **collector_kwargs})


def check_workers(kind: str, num_workers: int, overlap: bool) -> None:
    """Raises a ValueError if the kind is unknown or does not fit the other arguments."""
    if kind not in ("sync", "multi", "ray"):
        raise ValueError(f"kind must be 'sync', 'multi' or 'ray', not {kind!r}")
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, not {num_workers}")
    if kind == "sync" and (num_workers > 1 or overlap):
        raise ValueError(
            f"num_workers={num_workers} and overlap={overlap} require kind='multi' or 'ray': "
            "kind='sync' collects in this process"
        )


def _check_frames(frames_per_batch: int, init_random_frames: int, num_parts: int) -> None:
    """Raises a ValueError if the numbers of frames do not fit each other and the workers."""
    if frames_per_batch < 1 or frames_per_batch % num_parts:
        raise ValueError(
            f"frames_per_batch must be a positive multiple of {num_parts}, the number of workers "
            f"in a batch, not {frames_per_batch}"
        )
    if init_random_frames < 0 or init_random_frames % frames_per_batch:
        below = max(0, init_random_frames // frames_per_batch * frames_per_batch)
        raise ValueError(
            f"init_random_frames must be a multiple of frames_per_batch, such as {below} or "
            f"{below + frames_per_batch}, not {init_random_frames}"
        )

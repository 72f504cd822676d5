"""Collectors: TorchRL's, set up for off-policy learning from a stochastic policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import BaseCollector, Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

__all__ = ["make_collector"]


def make_collector(
    create_env: EnvBase | Callable[[], EnvBase],
    policy: TensorDictModuleBase | None,
    *,
    frames_per_batch: int = 1,
    total_frames: int = -1,
    init_random_frames: int = 0,
    kind: Literal["sync", "multi_sync", "multi_async"] = "sync",
    num_workers: int = 1,
    device: torch.device | str | None = None,
    seed: int | None = None,
    **collector_kwargs: Any,
) -> BaseCollector:
    """Makes a TorchRL collector that feeds a replay buffer.

    The first ``init_random_frames`` actions are uniform in the action spec; after them the policy
    acts, sampling (``ExplorationType.RANDOM``). A frame is one step of one environment.

    Args:
        create_env: a function without arguments that makes the environment (picklable for the
            multi-process kinds), or an environment (``kind="sync"`` alone).
        policy: the acting policy; ``None`` acts at random throughout. With ``kind="sync"`` and the
            policy on ``device`` its parameters are shared, and an optimiser's step acts at once.
            The processes of the other kinds share them on the CPU alone, so call
            ``collector.update_policy_weights_()`` after an update.
        frames_per_batch: frames in a batch, over all the environments it comes from.
        total_frames: frames after which iteration stops; -1 for never.
        init_random_frames: uniformly random frames at the start.
        kind: ``"sync"`` steps in this process; ``"multi_sync"`` runs ``num_workers`` processes that
            wait for one another; ``"multi_async"`` lets each go on alone. The last two need an
            ``if __name__ == "__main__":`` guard in the script.
        num_workers: processes; 1 for ``"sync"``.
        device: where the policy acts, the environment steps and the data is returned; each stays
            where it is if left out.
        seed: seed of the environments, and in the processes also of TorchRL's random numbers. Give
            it with several workers: a seed inside ``create_env`` is the same in each of them.
        **collector_kwargs: passed to TorchRL's collector, such as ``policy_device``,
            ``storing_device`` or ``compile_policy``.

    Returns:
        The collector. A batch is ``[T]`` for one environment, ``[num_envs, T]`` for several, and
        gets a leading ``[num_workers]`` for ``"multi_sync"``. A batch of ``"multi_async"`` comes
        from one worker, and its last step is marked ``truncated`` (not ``terminated``), so that no
        window joins two workers: take ``frames_per_batch`` much longer than a window.

    Raises:
        ValueError: if the frames do not divide as asked, or the kind is unknown.

    Examples:
        >>> from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv
        >>> collector = make_collector(
        ...     ContinuousActionVecMockEnv, None, frames_per_batch=5, init_random_frames=10
        ... )
        >>> next(iter(collector)).shape
        torch.Size([5])
        >>> collector.shutdown()
    """
    _check_frames(frames_per_batch, init_random_frames, kind, num_workers)
    if kind != "sync" and isinstance(create_env, EnvBase):
        raise ValueError(
            f"kind={kind!r} makes an environment in each process: pass a function that makes it"
        )
    options = {
        "frames_per_batch": frames_per_batch,
        "total_frames": total_frames,
        "init_random_frames": init_random_frames,
        "exploration_type": ExplorationType.RANDOM,
        "use_buffers": False,
        "auto_register_policy_transforms": False,
        "device": device,
    }
    collector: BaseCollector
    if kind == "sync":  # trajectory ids cost time and nothing here reads them
        options |= {"track_traj_ids": False, **collector_kwargs}
        collector = Collector(create_env, policy, **options)
    elif kind == "multi_sync":
        options |= {"cat_results": "stack", **collector_kwargs}
        collector = MultiSyncCollector([create_env] * num_workers, policy, **options)
    else:
        options["init_random_frames"] = _async_random_frames(
            init_random_frames, frames_per_batch, num_workers
        )
        options |= {"set_truncated": True, **collector_kwargs}
        collector = MultiAsyncCollector([create_env] * num_workers, policy, **options)
    if seed is not None:
        collector.set_seed(seed)
        collector.reset()
    return collector


def _async_random_frames(init_random_frames: int, frames_per_batch: int, num_workers: int) -> int:
    """What MultiAsyncCollector must be told to act at random for ``init_random_frames``.

    It starts every worker before it has counted a frame, and then counts a batch when it arrives,
    by when the others are under way: told ``n`` batches it draws ``n + num_workers - 1``.
    """
    batches = init_random_frames // frames_per_batch
    if batches and batches < num_workers:
        raise ValueError(
            f"init_random_frames {init_random_frames} is less than one batch of {frames_per_batch} "
            f"for each of {num_workers} workers: take {num_workers * frames_per_batch}, or 0"
        )
    return max(0, batches - num_workers + 1) * frames_per_batch if batches else 0


def _check_frames(
    frames_per_batch: int, init_random_frames: int, kind: str, num_workers: int
) -> None:
    """Raises unless the numbers of frames fit each other and the workers."""
    if kind not in ("sync", "multi_sync", "multi_async"):
        raise ValueError(f"kind must be 'sync', 'multi_sync' or 'multi_async', not {kind!r}")
    for name, value in (("frames_per_batch", frames_per_batch), ("num_workers", num_workers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if init_random_frames < 0:
        raise ValueError(f"init_random_frames must be at least 0, not {init_random_frames}")
    if kind == "sync" and num_workers != 1:
        raise ValueError(f"kind='sync' runs in this process: num_workers is 1, not {num_workers}")
    if kind == "multi_sync" and frames_per_batch % num_workers:
        raise ValueError(
            f"frames_per_batch {frames_per_batch} is not a multiple of num_workers={num_workers}"
        )
    if init_random_frames % frames_per_batch:
        below = init_random_frames // frames_per_batch * frames_per_batch
        raise ValueError(
            f"init_random_frames {init_random_frames} is not a multiple of frames_per_batch "
            f"{frames_per_batch}: take {below} or {below + frames_per_batch}"
        )

"""A replay buffer that returns masked windows of consecutive transitions."""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import prod
from operator import index
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import torch
from tensordict import MemoryMappedTensor, NestedKey, TensorDictBase
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    PrioritizedSampler,
    RandomSampler,
    ReplayBuffer,
    RoundRobinWriter,
    Storage,
)

from alm_torchrl.data.frames import FrameStore
from alm_torchrl.data.priorities import prioritized_sampler
from alm_torchrl.data.transitions import (
    DiscontinuityFinder,
    Key,
    normalize_,
    observation_keys,
    transition_keys,
    truncated_flags,
    tuple_key,
)
from alm_torchrl.data.windows import EpisodeWindows, PerEnvSampler

#: A copy of time steps: the first step, the entries, and the frames of each stacked observation.
ReplaySlice = tuple[int, TensorDictBase, dict[Key, dict[str, torch.Tensor]]]


class WindowReplayBuffer(ReplayBuffer):
    """A replay buffer that samples ``[B, T]`` windows; see :func:`make_replay_buffer`."""

    def __init__(
        self,
        *,
        num_envs: int,
        keys: list[Key] | None,
        action_key: NestedKey,
        per_env: bool,
        frames: dict[Key, FrameStore],
        sample_device: torch.device,
        **kwargs: Any,
    ) -> None:
        self.num_envs = num_envs
        self.per_env = per_env
        self.action_key = action_key
        self.stored_keys = keys
        self.frames = frames
        self.sample_device = sample_device
        self._discontinuities = DiscontinuityFinder()
        self._warned = False
        self.priority_key: NestedKey = "td_error"
        super().__init__(**kwargs)

    @property
    def max_steps(self) -> int:
        """Time steps stored for each environment before the oldest is overwritten."""
        return self.storage.max_size // self.num_envs

    def extend(self, data: TensorDictBase, *, update_priority: bool | None = None) -> torch.Tensor:
        """Stores the batch of a collector, in time order.

        The batch is ``[T]`` or ``[1, T]`` for one environment, and ``[num_envs, T]``,
        ``[workers, envs, T]`` or ``[num_envs]`` (one step of each) for several environments.

        An episode ends where ``"done"``, ``"terminated"`` or ``"truncated"`` is True. If an
        observation differs from the next observation of the previous transition, that transition
        is truncated, with a warning. Call :meth:`truncate_open_episodes` before the first batch of
        a new rollout.

        Raises:
            ValueError: if the shape, a flag, or an observation in ``frame_stacks`` is invalid.
            KeyError: if an entry is missing.
        """
        data = self._select(data)
        breaks = self._discontinuities.find(data)
        if breaks is not None:
            data = self._truncate_before(data, breaks)
        stored = self._store_frames(data).to(self.storage.device, non_blocking=True)
        # Without a device, TorchRL counts on the CPU and does not synchronize with the GPU.
        index = super().extend(stored.clear_device_(), update_priority=update_priority)
        self._discontinuities.remember(data)
        return index

    def add(self, data: TensorDictBase) -> torch.Tensor:
        """Stores one step: ``[]`` for one environment, ``[num_envs]`` for several."""
        return self.extend(data)

    def sample(self, batch_size: int | None = None, return_info: bool = False) -> Any:
        """Samples windows whose first transitions are uniform over all stored transitions.

        With ``prioritized``, a first transition is sampled by its priority.

        Returns:
            The stored entries, ``[B, T]``, and ``"validity_mask"``, bool ``[B, T]``. The mask is
            False after the end of the episode and after the newest transition; these steps repeat
            the last valid transition. With ``per_env``, the shape is ``[num_envs, B, T]``. With
            ``prioritized``, also ``"priority_weight"`` ``[B, T]``, the importance weight of the
            first transition, and ``"index"``, ``[B, T]`` or ``[B, T, 2]`` (rows and environments).
            With ``return_info``, also TorchRL's information about the sample, flat ``[B * T]``.
        """
        if not len(self):
            raise RuntimeError("cannot sample from an empty replay buffer: call extend() first")
        data, info = super().sample(batch_size, return_info=True)
        data = self._load_stacks(data, info["index"])
        batch = (self.num_envs, -1) if self.per_env else (-1,)
        windows = data.reshape(*batch, self._sample_unit.length)
        windows.set("validity_mask", info["validity_mask"].reshape(windows.shape))
        if "priority_weight" in info:
            windows.set("priority_weight", info["priority_weight"].reshape(windows.shape))
            index = info["index"]
            index = torch.stack(index, -1) if isinstance(index, tuple) else index
            windows.set("index", index.reshape(*windows.shape, *index.shape[1:]))
        if windows.device != self.sample_device:
            windows = windows.to(self.sample_device, non_blocking=True)
        return (windows, info) if return_info else windows

    def update_tensordict_priority(self, windows: TensorDictBase) -> None:
        """Sets the priorities of the first transitions of sampled windows.

        It reads the first step of ``"td_error"`` ``[B, T]`` or ``[B, T, 1]``, the entry
        ``priority_key``. Without ``prioritized``, it does nothing.

        Raises:
            KeyError: if the windows have no such entry.
            ValueError: if an error is negative or not finite.
        """
        if not isinstance(self.sampler, PrioritizedSampler):
            return
        errors = windows.get(self.priority_key, None)
        if errors is None:
            raise KeyError(
                f"the windows have no entry {self.priority_key!r}: call the loss on them first, or "
                "set the priority_key of the replay buffer to the entry with their errors"
            )
        first = errors.detach().reshape(*windows.shape, -1)[:, 0].amax(-1).float()
        if not ((first >= 0) & first.isfinite()).all():
            raise ValueError(
                f"the priorities in {self.priority_key!r} must be finite and not negative: write "
                "absolute or squared errors"
            )
        self.update_priority(windows.get("index")[:, 0], first)

    def truncate_open_episodes(self) -> None:
        """Marks the newest transition of each environment as truncated.

        Call it if the next transition does not continue the last one, for example after a reset.
        """
        self._discontinuities.forget()
        self._truncate_newest(torch.ones(self.num_envs, dtype=torch.bool))

    def empty(self, empty_write_count: bool = True) -> None:
        """Removes all transitions."""
        super().empty(empty_write_count)
        self._discontinuities.forget()

    def read(self, start: int, stop: int) -> ReplaySlice:
        """Copies the time steps ``start`` to ``stop - 1`` to the CPU, ``[T]`` or ``[T, num_envs]``.

        The first step ever stored has number 0, and the next step has number ``write_count``.
        """
        oldest = max(0, self.write_count - self.max_steps)
        if not oldest <= start <= stop <= self.write_count:
            stored = f"{oldest} to {self.write_count} are stored"
            raise IndexError(f"cannot read time steps {start} to {stop}: {stored}")
        rows = torch.arange(start, stop, device=self.storage.device) % self.max_steps
        data = self.storage.get(slice(None))[rows].to("cpu")
        return start, data, {key: store.read(start, stop) for key, store in self.frames.items()}

    def restore(self, slices: Iterable[ReplaySlice], written: int) -> None:
        """Fills an empty buffer from slices, newest first, and truncates the open episodes.

        ``written`` is the ``write_count`` of the buffer that was read. Where slices overlap, it
        uses the newer one. All transitions get the same priority.
        """
        if len(self):
            raise ValueError("cannot restore a replay buffer that is not empty")
        oldest, missing = max(0, written - self.max_steps), written
        for start, data, frames in slices:
            first, stop = max(start, oldest), min(start + len(data), missing)
            if start + len(data) < missing:
                break
            if first < stop:
                rows = torch.arange(first, stop) % self.max_steps
                wanted = data[first - start : stop - start]
                self.storage.set(rows, wanted.to(self.storage.device))
                for key, store in self.frames.items():
                    store.write(first, stop, frames[key], start + len(data))
                missing = first
        if missing > oldest:
            raise ValueError(f"time steps {oldest} to {missing} of the replay buffer are missing")
        cursor = {"_cursor": written % self.max_steps, "_write_count": written}
        self.writer.load_state_dict(cursor)
        self.mark_update(torch.arange(len(self)))
        self.truncate_open_episodes()

    def dumps(self, path: str | Path) -> None:
        """Saves the whole buffer to a folder."""
        super().dumps(path)
        torch.save(self.state_dict()["frames"], Path(path) / "frames.pt")

    def loads(self, path: str | Path) -> None:
        """Loads a buffer saved by :meth:`dumps` and truncates the open episodes."""
        self._check_saved((Path(path) / "sampler" / "sampler_metadata.json").is_file())
        self.sampler._empty()  # TorchRL cannot load a largest priority twice
        super().loads(path)
        self._restore(torch.load(Path(path) / "frames.pt", weights_only=True))

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, without a copy of the stored tensors."""
        frames = {key: store.state_dict() for key, store in self.frames.items()}
        return {**super().state_dict(), "frames": frames}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state and truncates the open episodes."""
        self._check_saved("_sum_tree" in state_dict["_sampler"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "frames"})
        self._restore(state_dict["frames"])

    def _check_saved(self, prioritized: bool) -> None:
        """Raises if a saved buffer has no priorities, but this one needs them."""
        if isinstance(self.sampler, PrioritizedSampler) and not prioritized:
            raise ValueError(
                "the saved replay buffer has no priorities: load it into a buffer without "
                "prioritized, and extend the prioritized buffer with its transitions"
            )

    def _restore(self, frames: dict[Key, Any]) -> None:
        for key, store in self.frames.items():
            store.load_state_dict(frames[key])
        self.truncate_open_episodes()

    @property
    def _newest_row(self) -> int:
        return (self.writer.state_dict()["_cursor"] - 1) % self.max_steps

    def _select(self, data: TensorDictBase) -> TensorDictBase:
        """Selects the entries to store, in the shape ``[num_envs, T]`` or ``[T]``."""
        if self.stored_keys is None:
            self.stored_keys = transition_keys(data, self.action_key)
        if not self._discontinuities.keys:
            self._discontinuities.keys = observation_keys(self.stored_keys)
        data = data.select(*self.stored_keys)
        normalize_(data, self.action_key)
        shape = data.shape
        steps = shape[-1] if len(shape) > 1 or (shape and self.num_envs == 1) else 1
        if prod(shape) != self.num_envs * steps:
            raise ValueError(
                f"a batch of shape {list(shape)} has {prod(shape) // max(steps, 1)} environments "
                f"of {steps} steps, but the replay buffer was created with num_envs={self.num_envs}"
            )
        if steps > self.max_steps:
            raise ValueError(
                f"a batch of {steps} steps per environment does not fit into the replay buffer, "
                f"whose capacity is {self.max_steps} steps per environment"
            )
        return data.reshape(steps) if self.num_envs == 1 else data.reshape(self.num_envs, steps)

    def _truncate_before(self, data: TensorDictBase, breaks: torch.Tensor) -> TensorDictBase:
        """Truncates the episodes before discontinuous transitions, bool ``[num_envs, T]``."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{int(breaks.sum())} of {breaks.numel()} transitions of a batch do not continue "
                "the transition before them, so the replay buffer truncates the episode there. "
                "Call truncate_open_episodes() before a new rollout, and pass data of several "
                "environments as [num_envs, T] to a buffer created with num_envs",
                stacklevel=3,
            )
        self._truncate_newest(breaks[..., 0])
        last = torch.cat([breaks[..., 1:], torch.zeros_like(breaks[..., :1])], -1)
        outcome = data.get("next")
        return data.set("next", outcome.copy().update(truncated_flags(outcome, last.unsqueeze(-1))))

    def _truncate_newest(self, envs: torch.Tensor) -> None:
        """Truncates the open episodes of the environments selected by a mask ``[num_envs]``."""
        if not len(self):
            return
        newest = self._newest_row
        outcome = self.storage[newest]["next"]
        last = envs.to(self.storage.device).reshape(outcome["done"].shape)
        for name, flags in truncated_flags(outcome, last).items():
            self.set_at_(("next", name), flags, newest)

    def _store_frames(self, data: TensorDictBase) -> TensorDictBase:
        """Moves stacked observations from a batch to the storage of their frames."""
        if not self.frames:
            return data
        batch = data.unsqueeze(0) if self.num_envs == 1 else data
        starts = self._discontinuities.starts(data).reshape(batch.shape)
        for key, store in self.frames.items():
            observation, following = batch.get(key, None), batch.get(("next", *key), None)
            if observation is None or following is None:
                raise KeyError(f"frame_stacks names {key}, which is not stored")
            store.append(observation, following, starts, self.write_count)
        return data.exclude(*self.frames, *(("next", *key) for key in self.frames))

    def _load_stacks(self, data: TensorDictBase, index: Any) -> TensorDictBase:
        """Adds the stacked observations to transitions ``[M]``."""
        if not self.frames:
            return data
        rows = index[0] if isinstance(index, tuple) else index
        envs = index[1] if isinstance(index, tuple) else torch.zeros_like(rows)
        steps = self.write_count - 1 - (self._newest_row - rows) % self.max_steps
        for key, store in self.frames.items():
            before, after = store.stacks(steps, envs)
            data = data.set(key, before).set(("next", *key), after)
        return data


def make_replay_buffer(
    capacity: int,
    *,
    batch_size: int,
    window_length: int = 3,
    num_envs: int = 1,
    storage: Literal["memory", "memmap"] = "memory",
    scratch_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    seed: int | None = None,
    keys: Iterable[NestedKey] | None = None,
    action_key: NestedKey = "action",
    per_env: bool = False,
    frame_stacks: Mapping[NestedKey, int] | None = None,
    prioritized: bool | Mapping[str, float] = False,
) -> WindowReplayBuffer:
    r"""Creates a replay buffer of masked windows.

    Sampling is uniform over all stored transitions, or ``prioritized``. A window never crosses the
    end of an episode (termination or time limit), a discontinuity in the data, or the newest
    transition; later entries are padding, False in ``"validity_mask"``. The first batch allocates
    memory for the whole capacity (see :func:`bytes_per_transition`).

    Args:
        capacity: maximum number of transitions, over all environments.
        batch_size: number ``B`` of windows in a sample.
        window_length: number ``T`` of transitions in a window.
        num_envs: number of environments, over all workers.
        storage: ``"memory"``, or ``"memmap"`` for files.
        scratch_dir: folder of these files; by default, a temporary folder (see ``TMPDIR``), which
            is removed with the buffer.
        device: device of the samples, and of a memory storage.
        seed: seed of the sampling; by default, TorchRL's global generator is used.
        keys: entries to store, including ``("next", "done")``; by default, the observations, the
            action, the reward and the flags.
        action_key: key of the action.
        per_env: sample ``batch_size`` windows from each environment, for
            :class:`~alm_torchrl.training.StackedLoss`.
        frame_stacks: number of frames of each observation that is stacked along its first
            dimension, as returned by :func:`alm_torchrl.envs.frame_stacks`; each frame is then
            stored once. Samples do not change.
        prioritized: sample first transitions by their priority (Schaul et al., 2016, arXiv
            1511.05952): with probability :math:`p_i^\alpha / \sum_j p_j^\alpha`, where ``p`` is
            the error of :meth:`WindowReplayBuffer.update_tensordict_priority` plus ``eps``, and the
            largest error so far for a new transition. The importance weight is
            :math:`(\min_j p_j^\alpha / p_i^\alpha)^\beta`. True uses ``alpha=0.6``, ``beta=0.4``
            and ``eps=1e-8``; a mapping replaces these. It needs TorchRL's C++ extension. Without a
            ``seed``, it uses NumPy's global generator.

    Raises:
        ValueError: if the sizes do not fit each other, or an option is invalid.
        RuntimeError: if ``prioritized`` is used and TorchRL's C++ extension does not load.

    Examples:
        >>> from alm_torchrl.envs import make_env
        >>> buffer = make_replay_buffer(100, batch_size=4, seed=0)
        >>> indices = buffer.extend(make_env("Pendulum-v1").rollout(20))
        >>> buffer.sample()["next", "observation"].shape
        torch.Size([4, 3, 3])
    """
    keys = None if keys is None else [tuple_key(key) for key in keys]
    capacity, batch_size, window_length, num_envs = _check_sizes(
        capacity=capacity, batch_size=batch_size, window_length=window_length, num_envs=num_envs
    )
    if keys is not None and ("next", "done") not in keys:
        raise ValueError(f"keys must include ('next', 'done'), which ends the windows: {keys}")
    if storage not in ("memory", "memmap"):
        raise ValueError(f"storage must be 'memory' or 'memmap', not {storage!r}")
    if scratch_dir is not None and storage != "memmap":
        raise ValueError("scratch_dir requires storage='memmap'")
    device, ndim = torch.device(device), 1 if num_envs == 1 else 2
    folder = None
    if storage == "memmap":
        # Without a folder, tensordict would map shared memory, which is no larger than the memory.
        folder = Path(scratch_dir or tempfile.mkdtemp(prefix="alm-replay-"))
        store = LazyMemmapStorage(capacity, scratch_dir=folder, ndim=ndim)
        if scratch_dir is None:
            weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
    else:
        store = LazyTensorStorage(capacity, device=device, ndim=ndim)
    frames = {
        tuple_key(name): _frame_store(name, stack, capacity // num_envs, num_envs, store, folder)
        for name, stack in (frame_stacks or {}).items()
    }
    sampler = PerEnvSampler() if per_env and num_envs > 1 else RandomSampler()
    if prioritized not in (False, None):
        sampler = prioritized_sampler(prioritized, capacity, store.device, per_env)
    writer = RoundRobinWriter()
    generator = None if seed is None else torch.Generator(store.device).manual_seed(index(seed))
    return WindowReplayBuffer(
        storage=store,
        sampler=sampler,
        writer=writer,
        sample_unit=EpisodeWindows(window_length, writer),
        batch_size=batch_size,
        dim_extend=ndim - 1,
        generator=generator,
        num_envs=num_envs,
        keys=keys,
        action_key=action_key,
        per_env=per_env,
        frames=frames,
        sample_device=device,
    )


def _frame_store(
    name: NestedKey, stack: int, steps: int, num_envs: int, storage: Storage, folder: Path | None
) -> FrameStore:
    """Returns the storage of an observation's frames, in a file if there is a folder."""
    empty: Callable[..., torch.Tensor] = torch.empty
    if folder is not None:
        file = str(folder / f"{'-'.join(tuple_key(name))}.frames")
        empty = partial(MemoryMappedTensor.empty, filename=file)
    return FrameStore(stack, steps, num_envs, storage.device, empty)


def bytes_per_transition(
    data: TensorDictBase,
    *,
    keys: Iterable[NestedKey] | None = None,
    action_key: NestedKey = "action",
    frame_stacks: Mapping[NestedKey, int] | None = None,
) -> int:
    """Returns the number of bytes that a transition of a batch needs in a replay buffer.

    See :func:`make_replay_buffer` for the options. First frames of episodes are not counted.

    Examples:
        >>> from alm_torchrl.envs import make_env
        >>> bytes_per_transition(make_env("Pendulum-v1").rollout(2))  # 4 * (2 * 3 + 1 + 1) + 3
        35
    """
    stored = transition_keys(data, action_key) if keys is None else [tuple_key(k) for k in keys]
    stacks = {tuple_key(key): stack for key, stack in (frame_stacks or {}).items()}
    total = 0
    for key in stored:
        leaf = data.get(key)
        size = leaf.nbytes // data.numel()
        if key in stacks:
            total += size // stacks[key] + 4 * stacks[key]
        elif key[0] != "next" or key[1:] not in stacks:
            total += size
    return total


def _check_sizes(**sizes: object) -> tuple[int, int, int, int]:
    """Returns the sizes as Python integers; raises if they do not fit each other."""
    numbers: list[int] = []
    for name, value in sizes.items():
        if not isinstance(value, SupportsIndex) or index(value) < 1:
            raise ValueError(f"{name} must be an integer of at least 1, not {value}")
        numbers.append(index(value))
    capacity, batch_size, window_length, num_envs = numbers
    if capacity % num_envs:
        raise ValueError(
            f"capacity {capacity} is not a multiple of num_envs={num_envs}: use "
            f"{capacity // num_envs * num_envs or num_envs}"
        )
    if capacity < batch_size:
        raise ValueError(f"capacity {capacity} is smaller than batch_size {batch_size}")
    if capacity // num_envs < window_length:
        raise ValueError(
            f"capacity {capacity} has room for {capacity // num_envs} steps of each of {num_envs} "
            f"environments, fewer than window_length {window_length}"
        )
    return capacity, batch_size, window_length, num_envs

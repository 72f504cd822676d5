"""A replay buffer that returns masked windows of consecutive transitions.

The parts are TorchRL's: a :class:`~torchrl.data.ReplayBuffer` on a memory or memory-mapped storage,
a :class:`~torchrl.data.RandomSampler` that draws every stored transition with the same probability,
and a sample unit, :class:`EpisodeWindows`, that turns each draw into the window that starts there.
What is added here is small: which keys are stored, windows without host synchronization
(:class:`~torchrl.data.Sequence` waits for a GPU), the ``[B, T]`` shape of a sample with its mask,
stacked frames that are stored once, and the end of an episode where a restored buffer goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from math import prod
from operator import index
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    RandomSampler,
    ReplayBuffer,
    RoundRobinWriter,
    Storage,
    TensorStorage,
)
from torchrl.data.replay_buffers import SampleUnit, Writer

from alm_torchrl.data.columns import as_column, as_flag
from alm_torchrl.data.frames import FrameStore
from alm_torchrl.data.seams import Seams, end_episodes

__all__ = ["WindowReplayBuffer", "bytes_per_transition", "make_replay_buffer"]

#: Entries of the next state that every transition needs, beside its observations.
OUTCOME_KEYS = ("reward", "done", "terminated", "truncated")
#: Entries that are no observation although an environment writes them before and after a step.
BOOKKEEPING_KEYS = (*OUTCOME_KEYS, "episode_reward", "step_count", "is_init")


def transition_keys(
    data: TensorDictBase, action_key: NestedKey = "action"
) -> list[tuple[str, ...]]:
    """Names what a transition needs: observations, action, next observations, reward and flags.

    An observation is an entry found both at the root and under ``"next"``, so that an observation
    of any name is kept, and what a policy writes on its way to an action (latents, means) is not.

    Args:
        data: a batch as a collector returns it, of any batch size.
        action_key: the entry that holds the action.

    Returns:
        The keys in tuple form, sorted.

    Raises:
        KeyError: if the action, the next state or its ``"done"`` flag is missing.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> step = {"pixels": torch.zeros(3), "done": torch.zeros(1, dtype=torch.bool)}
        >>> root = {**step, "action": torch.zeros(2), "latent": torch.zeros(5)}
        >>> transition_keys(TensorDict({**root, "next": {**step, "reward": torch.zeros(1)}}))
        [('action',), ('next', 'done'), ('next', 'pixels'), ('next', 'reward'), ('pixels',)]
    """
    leaves = {_tuple_key(key) for key in data.keys(include_nested=True, leaves_only=True)}
    action = _tuple_key(action_key)
    for needed in (action, ("next", "done")):
        if not any(key[: len(needed)] == needed for key in leaves):
            raise KeyError(f"a batch for the replay buffer lacks {needed}; it has {sorted(leaves)}")
    observations = observation_keys(leaves)
    kept = {*observations, *(("next", *key) for key in observations)}
    kept |= {key for key in leaves if key[0] == "next" and key[-1] in OUTCOME_KEYS}
    return sorted(kept | {key for key in leaves if key[: len(action)] == action})


def observation_keys(keys: Collection[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The keys that stand at the root and under ``"next"``, but for flags and counts."""
    return [key for key in keys if ("next", *key) in keys and key[-1] not in BOOKKEEPING_KEYS]


class EpisodeWindows(SampleUnit):
    """Expands every drawn transition into the window that starts there.

    A window ends where its episode does, or with the newest transition. What would lie beyond is
    the last transition of the window again, False in ``info["validity_mask"]``.

    Args:
        length: transitions in a window, ``T``.
        writer: of the same buffer; it knows which transition is the newest.
    """

    def __init__(self, length: int, writer: Writer) -> None:
        self.length = length
        self.writer = writer

    def expand(
        self, index: torch.Tensor | tuple, info: dict[str, Any], storage: Storage
    ) -> tuple[torch.Tensor | tuple, dict[str, Any]]:
        """Turns ``n`` indices into those of ``n`` windows.

        Args:
            index: time steps ``[n]``, or a tuple of time steps and environments.
            info: what the sampler says about them.
            storage: what the indices point into, time first.

        Returns:
            Indices ``[n * T]`` in the form that they came in, and ``info`` with
            ``"validity_mask"`` ``[n * T]``.
        """
        start, *lanes = index if isinstance(index, tuple) else (index,)
        written = storage.shape[0]
        newest = (self.writer.state_dict()["_cursor"] - 1) % written
        steps = torch.arange(self.length, device=start.device)
        reach = torch.minimum(steps, ((newest - start) % written).unsqueeze(1))
        lanes = [lane.unsqueeze(1).expand_as(reach) for lane in lanes]
        done = storage.get(slice(None)).get(("next", "done"))
        ends = done[(start.unsqueeze(1) + reach) % written, *lanes].squeeze(-1)
        open_before = torch.cat([torch.ones_like(ends[:, :1]), ~ends[:, :-1]], 1)
        valid = (open_before & (reach == steps)).int().cumprod(1)
        last = valid.sum(1, keepdim=True) - 1
        time = (start.unsqueeze(1) + torch.minimum(steps, last)) % written
        info = {**info, "validity_mask": valid.bool().flatten()}
        flat = tuple(part.flatten() for part in (time, *lanes))
        return (flat if lanes else flat[0]), info


class PerEnvSampler(RandomSampler):
    """Draws as many transitions from each environment's lane, lane after lane."""

    def sample(self, storage: TensorStorage, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """Draws ``batch_size`` time steps in each lane.

        Args:
            storage: of shape ``[time, lanes]``.
            batch_size: draws in each lane.

        Returns:
            Time steps and lanes, each ``[lanes * batch_size]``, and nothing about them.
        """
        written, lanes = storage.shape
        total, device = lanes * batch_size, storage.device
        time = torch.randint(written, (total,), generator=storage._rng, device=device)
        return (time, torch.arange(total, device=device) // batch_size), {}


class WindowReplayBuffer(ReplayBuffer):
    """A :class:`~torchrl.data.ReplayBuffer` of transitions that samples ``[B, T]`` windows.

    Build it with :func:`make_replay_buffer`, which documents the arguments.

    Args:
        num_envs: lanes of the storage, one for each environment that is stepped in parallel.
        keys: the entries to store; ``None`` keeps what :func:`transition_keys` finds.
        action_key: the entry that holds the action.
        per_env: draw a batch from every lane, rather than one from all.
        frames: for each stacked observation, by its key, what keeps its frames.
        **kwargs: as for :class:`~torchrl.data.ReplayBuffer`; ``sample_unit`` must be
            :class:`EpisodeWindows`.
    """

    def __init__(
        self,
        *,
        num_envs: int = 1,
        keys: Iterable[NestedKey] | None = None,
        action_key: NestedKey = "action",
        per_env: bool = False,
        frames: Mapping[NestedKey, FrameStore] | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_envs = num_envs
        self.per_env = per_env
        self.action_key = action_key
        self.stored_keys = None if keys is None else [_tuple_key(key) for key in keys]
        self.frames = {_tuple_key(key): store for key, store in (frames or {}).items()}
        self.sample_device: torch.device | None = None
        self._seams = Seams([])
        self._warned_of_seams = False
        super().__init__(**kwargs)

    @property
    def window_length(self) -> int:
        """Transitions in a window, ``T``."""
        return self._sample_unit.length

    @property
    def max_steps(self) -> int:
        """Time steps that one lane holds before it overwrites its oldest."""
        return self.storage.max_size // self.num_envs

    def extend(self, data: TensorDictBase, *, update_priority: bool | None = None) -> torch.Tensor:
        """Stores a batch of transitions, oldest first.

        An episode ends with a transition whose ``"done"``, ``"terminated"`` or ``"truncated"`` is
        True, all of which are stored as ``"done"``. Where an observation is not the next
        observation of the transition stored before it, and no episode ends, that transition is
        marked truncated with a warning, so that no window joins the two. Call
        :meth:`truncate_open_episodes` where the next batch begins a new rollout.

        Args:
            data: a collector's batch. With one environment ``[T]`` or ``[1, T]``. With several
                ``[num_envs, T]`` (leading dimensions are flattened into lanes, so the ``[workers,
                envs, T]`` of a multi-process collector fits) or ``[num_envs]``, one step of each.
            update_priority: as in TorchRL; without use here.

        Returns:
            The storage indices written.

        Raises:
            ValueError: if the batch does not have ``num_envs`` lanes, or is longer than a lane, if
                an entry of ``frame_stacks`` is no stack of frames, or if a flag is none (one of
                another shape or type that holds only 0 and 1 is read as bool ``[..., 1]``).
            KeyError: if an entry to store is missing from the batch.
        """
        data = self._transitions(data)
        if (seams := self._seams.find(data)) is not None:
            data = self._mark(data, seams)
        stored = self._without_frames(data).to(self.storage.device, non_blocking=True)
        # Without a device, TorchRL keeps count on the CPU and need not ask the GPU.
        index = super().extend(stored.clear_device_(), update_priority=update_priority)
        self._seams.remember(data)
        return index

    def add(self, data: TensorDictBase) -> torch.Tensor:
        """Stores one step: ``[]`` with one environment, ``[num_envs]`` with several."""
        return self.extend(data)

    def sample(self, batch_size: int | None = None, return_info: bool = False) -> Any:
        """Draws windows, their first transitions uniformly from everything stored.

        Args:
            batch_size: windows to draw, ``B``; the buffer's own when left out.
            return_info: also return TorchRL's information about the draw, flat ``[B * T]``.

        Returns:
            The stored entries, ``[B, T]``, and ``"validity_mask"``, bool ``[B, T]``: True where the
            transition belongs to the window, False past an episode's end or the newest transition,
            where the last valid transition is repeated. Index 0 is always True. With ``per_env``,
            everything has a leading ``[num_envs]``.

        Raises:
            RuntimeError: if nothing is stored yet.
        """
        if not len(self):
            raise RuntimeError("cannot sample from an empty replay buffer: extend it first")
        data, info = super().sample(batch_size, return_info=True)
        data = self._with_frames(data, info["index"])
        lanes = (self.num_envs, -1) if self.per_env else (-1,)
        windows = data.reshape(*lanes, self.window_length)
        windows.set("validity_mask", info["validity_mask"].reshape(windows.shape))
        if self.sample_device is not None and windows.device != self.sample_device:
            windows = windows.to(self.sample_device, non_blocking=True)
        return (windows, info) if return_info else windows

    def truncate_open_episodes(self) -> None:
        """Marks the newest transition of every lane as the end of its episode (truncated).

        For when the next transition stored will not follow it: the environments are reset, or the
        buffer is restored in another process. ``terminated`` is left alone, so a value function
        still bootstraps there.
        """
        self._seams.forget()
        self._close(torch.ones(self.num_envs, dtype=torch.bool))

    def empty(self, empty_write_count: bool = True) -> None:
        """Removes every transition."""
        super().empty(empty_write_count)
        self._seams.forget()

    @property
    def steps_written(self) -> int:
        """Time steps stored so far, those included that have been overwritten since."""
        return int(self.write_count)

    def read(self, start: int, stop: int) -> TensorDictBase:
        """Copies stored time steps, counted as :attr:`steps_written` counts them.

        Args:
            start: the first of them.
            stop: the one after the last.

        Returns:
            The entries on the CPU, ``[stop - start]`` or ``[stop - start, num_envs]``. What belongs
            to ``frame_stacks`` is given by :meth:`read_frames`.

        Raises:
            IndexError: if some of them are not stored, or not any more.
        """
        oldest = max(0, self.steps_written - self.max_steps)
        if not oldest <= start <= stop <= self.steps_written:
            raise IndexError(
                f"time steps {start} to {stop} are wanted, and {oldest} to {self.steps_written} "
                "are stored"
            )
        rows = torch.arange(start, stop, device=self.storage.device) % self.max_steps
        return self.storage.get(slice(None))[rows].to("cpu")

    def read_frames(self, start: int, stop: int) -> dict[tuple[str, ...], dict[str, torch.Tensor]]:
        """Copies the frames of the time steps that :meth:`read` copies the rest of.

        Args:
            start: the first of them.
            stop: the one after the last.

        Returns:
            For each key of ``frame_stacks`` what :meth:`alm_torchrl.data.FrameStore.read` returns.
        """
        rows = self.read(start, stop)
        return {key: store.read(start, stop, rows[key]) for key, store in self.frames.items()}

    def restore(self, parts: Iterable[tuple[Any, ...]], steps_written: int) -> None:
        """Puts back time steps copied by :meth:`read`, and closes the episodes that were running.

        Args:
            parts: of each, newest first, the first time step, the entries, and if there are
                ``frame_stacks`` what :meth:`read_frames` returned; where two overlap, the newer one
                counts.
            steps_written: as it was.

        Raises:
            ValueError: if the buffer is not empty, or the parts do not hold what it should.
        """
        if len(self):
            raise ValueError("only an empty replay buffer can be restored")
        oldest, missing = max(0, steps_written - self.max_steps), steps_written
        for start, data, *frames in parts:
            first, stop = max(start, oldest), min(start + len(data), missing)
            if start + len(data) < missing:
                break
            if first < stop:
                rows = torch.arange(first, stop) % self.max_steps
                wanted = data[first - start : stop - start]
                self.storage.set(rows, wanted.to(self.storage.device))
                for key, store in self.frames.items():
                    store.write(first, stop, wanted[key], frames[0][key], start + len(data))
                missing = first
        if missing > oldest:
            raise ValueError(f"time steps {oldest} to {missing} of the replay buffer are lacking")
        cursor = {"_cursor": steps_written % self.max_steps, "_write_count": steps_written}
        self.writer.load_state_dict(cursor)
        self._go_on()

    def dumps(self, path: str | Path) -> None:
        """Writes the buffer as a whole into a folder."""
        super().dumps(path)
        if self.frames:
            torch.save(self._frames_state(), Path(path) / "frames.pt")

    def loads(self, path: str | Path) -> None:
        """Restores what ``dumps`` saved, and closes the episodes that were running then."""
        super().loads(path)
        if self.frames:
            self._load_frames(torch.load(Path(path) / "frames.pt", weights_only=True))
        self._go_on()

    def state_dict(self) -> dict[str, Any]:
        """Everything, those tensors included that the buffer keeps using."""
        state = super().state_dict()
        return {**state, "frames": self._frames_state()} if self.frames else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a ``state_dict``, and closes the episodes that were running then."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "frames"})
        if self.frames:
            self._load_frames(state_dict["frames"])
        self._go_on()

    def _normalize(self, data: TensorDictBase) -> None:
        """Gives flags, reward and action one shape and type; any flag is an end, ``"done"``."""
        outcome, ended = data.get("next"), None
        for name in OUTCOME_KEYS[1:]:
            value = outcome.get(name, None)
            if value is None:
                continue
            flag = as_flag(("next", name), value, data.shape)
            if flag is not value:
                outcome.set(name, flag)
            ended = flag if ended is None else ended | flag
        outcome.set("done", ended)
        for part, key in ((outcome, "reward"), (data, self.action_key)):
            value = part.get(key, None)
            if isinstance(value, torch.Tensor) and value.shape == data.shape:
                part.set(key, as_column(value, data.shape))

    def _mark(self, data: TensorDictBase, seams: torch.Tensor) -> TensorDictBase:
        """Ends the episodes of transitions that the next one does not follow.

        Args:
            data: the batch to be stored, ``[num_envs, T]`` or ``[T]``.
            seams: which of its transitions do not follow the one before.

        Returns:
            The batch with its flags.
        """
        if not self._warned_of_seams:
            self._warned_of_seams = True
            warnings.warn(
                f"{int(seams.sum())} of {seams.numel()} transitions of a batch do not follow those "
                "stored before them: no episode ends there, and an observation is not the next "
                "observation before it. Each is stored as the begin of another episode, so that no "
                "window joins the two. Call truncate_open_episodes() before a rollout that begins "
                "anew, and give data of several environments as [num_envs, T] to a buffer made "
                "with num_envs",
                stacklevel=3,
            )
        self._close(seams[..., 0])
        closing = torch.cat([seams[..., 1:], torch.zeros_like(seams[..., :1])], -1)
        outcome = data.get("next")
        return data.set("next", outcome.copy().update(end_episodes(outcome, closing.unsqueeze(-1))))

    def _close(self, lanes: torch.Tensor) -> None:
        """Ends the episodes that are running in some lanes, bool ``[num_envs]``."""
        if not len(self):
            return
        newest = (self.writer.state_dict()["_cursor"] - 1) % self.max_steps
        outcome = self.storage[newest]["next"]
        closing = lanes.to(self.storage.device).reshape(outcome["done"].shape)
        for name, flags in end_episodes(outcome, closing).items():
            self.set_at_(("next", name), flags, newest)

    def _frames_state(self) -> dict[str, Any]:
        return {"/".join(key): store.state_dict() for key, store in self.frames.items()}

    def _load_frames(self, state: dict[str, Any]) -> None:
        for key, store in self.frames.items():
            store.load_state_dict(state["/".join(key)])

    def _go_on(self) -> None:
        """Makes a restored buffer ready for transitions that do not follow those in it."""
        self.truncate_open_episodes()
        if len(self):
            rows = torch.arange(self.storage.shape[0], device=self.storage.device)
            for key, store in self.frames.items():
                store.take_over(self._time_steps(rows), self.storage.get(slice(None))[key])

    def _time_steps(self, rows: torch.Tensor) -> torch.Tensor:
        """Which time steps lie in these rows of the storage, without host synchronization."""
        newest = (self.writer.state_dict()["_cursor"] - 1) % self.max_steps
        return self.steps_written - 1 - (newest - rows) % self.max_steps

    def _without_frames(self, data: TensorDictBase) -> TensorDictBase:
        """Moves the frames of a batch from :meth:`_transitions` into their stores."""
        lanes = data.unsqueeze(0) if self.num_envs == 1 else data
        for key, store in self.frames.items():
            following = ("next", *key)
            for needed in (key, following):
                if needed not in data.keys(include_nested=True):
                    raise KeyError(f"frame_stacks names {key}, but {needed} is not stored")
            places = store.append(lanes[key], lanes[following], self.steps_written)
            places = places.reshape(*data.shape, store.stack).to(data[key].device)
            data = data.exclude(following).set(key, places)
        return data

    def _with_frames(self, data: TensorDictBase, index: Any) -> TensorDictBase:
        """Puts the stacks of drawn transitions ``[M]`` together, where they are stored."""
        if not self.frames:
            return data
        rows = index[0] if isinstance(index, tuple) else index
        lanes = index[1] if isinstance(index, tuple) else torch.zeros_like(rows)
        steps = self._time_steps(rows)
        for key, store in self.frames.items():
            before, after = store.stacks(steps, lanes, data[key])
            data = data.set(key, before).set(("next", *key), after)
        return data

    def _transitions(self, data: TensorDictBase) -> TensorDictBase:
        """Selects the stored entries, in the shape ``[num_envs, T]``, or ``[T]``."""
        if self.stored_keys is None:
            self.stored_keys = transition_keys(data, self.action_key)
        if not self._seams.keys:
            self._seams.keys = observation_keys(self.stored_keys)
        try:
            data = data.select(*self.stored_keys)
        except KeyError as error:
            raise KeyError(
                f"a batch for the replay buffer lacks one of {self.stored_keys}: {error}"
            ) from None
        self._normalize(data)
        shape = data.shape
        steps = shape[-1] if len(shape) > 1 or (shape and self.num_envs == 1) else 1
        if prod(shape) != self.num_envs * steps:
            raise ValueError(
                f"a batch of shape {list(shape)} holds {prod(shape) // max(steps, 1)} environments "
                f"of {steps} steps, but the replay buffer was made for num_envs={self.num_envs}"
            )
        if steps > self.max_steps:
            raise ValueError(
                f"a batch of {steps} steps for each environment does not fit into the replay "
                f"buffer, which holds {self.max_steps}"
            )
        return data.reshape(steps) if self.num_envs == 1 else data.reshape(self.num_envs, steps)


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
) -> WindowReplayBuffer:
    """Makes the replay buffer of the ALM objective.

    Sampling is uniform over everything stored: each transition, terminal ones included, is as
    likely as any other to be at index 0 of a window. A window never crosses the end of an episode
    (a termination or a time limit), a transition that does not follow the one stored before it, or
    the seam between the newest and the oldest transition; what would lie beyond is padding, False
    in ``"validity_mask"``.

    Memory is taken when the first batch arrives, for the whole capacity:
    :func:`bytes_per_transition` of that batch, times ``capacity``. Vector observations of size
    ``o`` and actions of size ``a`` in float32 take ``8 o + 4 a + 7`` bytes (next observations are
    stored too): 0.17 kB for HalfCheetah-v5, 2.9 kB for Humanoid-v5, whose paper-sized buffer of
    1,000,000 transitions thus takes 2.9 GB.

    A stack of frames, and any other window of the last ``n`` observations, is stored frame by frame
    if it is named in ``frame_stacks``. A transition then takes the one frame that is new in its
    next observation, and ``4 n`` bytes that say where the others are; an episode takes the frames
    that it begins with. Three stacked 84 x 84 RGB frames take 21 kB a transition rather than
    127 kB. The windows drawn are the same.

    Args:
        capacity: transitions to hold, over all environments.
        batch_size: windows in a sample, ``B``.
        window_length: transitions in a window, ``T``.
        num_envs: environments that are stepped in parallel (workers times environments for a
            ``"multi"`` collector); each keeps its own lane.
        storage: ``"memory"``, or ``"memmap"`` for files.
        scratch_dir: folder of those files; a temporary one if left out. Only for ``"memmap"``.
        device: where samples are wanted. A memory storage lives there too; files stay on the CPU.
        seed: seed of the draws; TorchRL's global generator if left out.
        keys: entries to store, where the rule of :func:`transition_keys` does not fit. They must
            include ``("next", "done")``.
        action_key: the entry that holds the action.
        per_env: draw ``batch_size`` windows from each environment, for the several seeds of
            :class:`~alm_torchrl.training.StackedLoss`.
        frame_stacks: for each stacked observation, by its key, the number of frames in it, along
            its first dimension: ``{"pixels": 3}`` for uint8 ``[9, 84, 84]``, and ``{"history": 8}``
            for ``[8, O]``. :func:`alm_torchrl.envs.frame_stacks` reads it off an environment.

    Returns:
        A buffer whose ``extend(batch)`` stores a collector's batch and whose ``sample()`` returns
        windows ``[B, T]`` (``[num_envs, B, T]`` with ``per_env``).

    Raises:
        ValueError: if the sizes do not fit each other, or the storage is unknown.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> buffer = make_replay_buffer(100, batch_size=4, window_length=3, seed=0)
        >>> step = {"observation": torch.zeros(20, 5)}
        >>> outcome = {"reward": torch.zeros(20, 1), "done": torch.zeros(20, 1, dtype=torch.bool)}
        >>> batch = {**step, "action": torch.zeros(20, 2), "next": {**step, **outcome}}
        >>> indices = buffer.extend(TensorDict(batch, [20]))
        >>> sample = buffer.sample()
        >>> sample.shape, sample["next", "observation"].shape
        (torch.Size([4, 3]), torch.Size([4, 3, 5]))
        >>> sample["validity_mask"][:, 0].all()
        tensor(True)
    """
    keys = None if keys is None else [_tuple_key(key) for key in keys]
    capacity, batch_size, window_length, num_envs = _check_sizes(
        capacity=capacity, batch_size=batch_size, window_length=window_length, num_envs=num_envs
    )
    if keys is not None and ("next", "done") not in keys:
        raise ValueError(f"keys must include ('next', 'done'), which bounds the windows: {keys}")
    if storage not in ("memory", "memmap"):
        raise ValueError(f"storage must be 'memory' or 'memmap', not {storage!r}")
    if scratch_dir is not None and storage != "memmap":
        raise ValueError("scratch_dir is only of use with storage='memmap'")
    device, ndim = torch.device(device), 1 if num_envs == 1 else 2
    if storage == "memmap":
        store = LazyMemmapStorage(capacity, scratch_dir=scratch_dir, ndim=ndim)
    else:
        store = LazyTensorStorage(capacity, device=device, ndim=ndim)
    writer = RoundRobinWriter()
    frames: dict[NestedKey, FrameStore] = {}
    for key, stack in (frame_stacks or {}).items():
        name = f"{'-'.join(_tuple_key(key))}.frames"
        frames[key] = FrameStore(
            stack,
            capacity // num_envs,
            num_envs,
            device=store.device,
            memmap=storage == "memmap",
            filename=None if scratch_dir is None else str(Path(scratch_dir) / name),
        )
    buffer = WindowReplayBuffer(
        storage=store,
        sampler=PerEnvSampler() if per_env and num_envs > 1 else RandomSampler(),
        writer=writer,
        sample_unit=EpisodeWindows(window_length, writer),
        batch_size=batch_size,
        dim_extend=ndim - 1,
        generator=_generator(seed, store.device),
        num_envs=num_envs,
        keys=keys,
        action_key=action_key,
        per_env=per_env,
        frames=frames,
    )
    buffer.sample_device = device
    return buffer


def bytes_per_transition(
    data: TensorDictBase,
    *,
    keys: Iterable[NestedKey] | None = None,
    action_key: NestedKey = "action",
    frame_stacks: Mapping[NestedKey, int] | None = None,
) -> int:
    """Bytes that one transition of a batch takes in a replay buffer.

    Args:
        data: a batch as a collector returns it, of any batch size with at least one transition.
        keys: the entries stored; ``None`` for what :func:`transition_keys` finds.
        action_key: the entry that holds the action.
        frame_stacks: as for :func:`make_replay_buffer`; the frames that episodes begin with, a few
            for each of them, are not counted.

    Returns:
        Bytes; times a buffer's capacity, the memory it takes.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> step = {"observation": torch.zeros(20, 5)}
        >>> outcome = {"reward": torch.zeros(20, 1), "done": torch.zeros(20, 1, dtype=torch.bool)}
        >>> batch = {**step, "action": torch.zeros(20, 2), "next": {**step, **outcome}}
        >>> bytes_per_transition(TensorDict(batch, [20]))  # 4 * (2 * 5 + 2 + 1) + 1
        53
    """
    stored = transition_keys(data, action_key) if keys is None else [_tuple_key(k) for k in keys]
    stacks = {_tuple_key(key): stack for key, stack in (frame_stacks or {}).items()}
    total = 0
    for key in stored:
        if key[0] == "next" and key[1:] in stacks:
            continue
        leaf = data.get(key)
        size = leaf.element_size() * leaf.numel() // data.numel()
        total += size // stacks[key] + 4 * stacks[key] if key in stacks else size
    return total


def _check_sizes(**sizes: object) -> tuple[int, int, int, int]:
    """Python's own numbers, if they fit one another."""
    numbers: list[int] = []
    for name, value in sizes.items():
        if not isinstance(value, SupportsIndex) or index(value) < 1:
            raise ValueError(f"{name} must be a whole number and at least 1, not {value}")
        numbers.append(index(value))
    capacity, batch_size, window_length, num_envs = numbers
    if capacity % num_envs:
        raise ValueError(
            f"capacity {capacity} is not a multiple of num_envs={num_envs}: each environment keeps "
            f"the same share, so take {capacity // num_envs * num_envs or num_envs}"
        )
    if capacity < batch_size:
        raise ValueError(f"capacity {capacity} is smaller than batch_size {batch_size}")
    if capacity // num_envs < window_length:
        raise ValueError(
            f"capacity {capacity} leaves {capacity // num_envs} steps for each of {num_envs} "
            f"environments, fewer than window_length {window_length}"
        )
    return capacity, batch_size, window_length, num_envs


def _generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(index(seed))


def _tuple_key(key: NestedKey) -> tuple[str, ...]:
    key = unravel_key(key if isinstance(key, str) else tuple(key))
    return (key,) if isinstance(key, str) else key

"""Incremental saves of a replay buffer: each time step is written to disk once."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tensordict import TensorDict
from torchrl.data import PrioritizedSampler

from alm_torchrl.data.priorities import read_priorities, write_priorities
from alm_torchrl.data.replay import ReplaySlice, WindowReplayBuffer
from alm_torchrl.data.transitions import Key
from alm_torchrl.files import load_tensors, save_tensors, sha256

# Steps, or a random id of priorities, and the random id of the run.
_NAME = re.compile(r"(?:\d{12}-\d{12}|priorities-[0-9a-f]{16})-([0-9a-f]{8})\.pt")
_PRIORITIES = "priorities-"
_FRAMES = "frames:"  # prefix of entries that are not time steps


@dataclass(frozen=True)
class ReplayChunk:
    """A file of an :class:`IncrementalReplay`, with the time steps ``start`` to ``stop - 1``.

    It contains either the transitions or the priorities of these steps.
    """

    file: str
    start: int
    stop: int
    sha256: str


class IncrementalReplay:
    """Saves a replay buffer in files of a folder, each with the time steps since the last save.

    Files never change after they are written, so older checkpoints stay valid. File names end with
    a random id of the run. A chunk repeats the last time step of the previous chunk, because its
    episode may have been truncated after that save. Updates change priorities, so every save of a
    prioritized buffer writes all of them to a further file.
    """

    def __init__(self, replay: WindowReplayBuffer, folder: str | Path) -> None:
        self.replay = replay
        self.folder = Path(folder)
        self.chunks: list[ReplayChunk] = []
        self._run_id = secrets.token_hex(4)
        self._loaded: set[str] = set()

    def save(self) -> list[ReplayChunk]:
        """Writes the new time steps to disk and returns all chunks, oldest first."""
        written = self.replay.write_count
        oldest = max(0, written - self.replay.max_steps)
        saved = self.chunks[-1].stop if self.chunks else 0
        if saved < written:
            self.chunks.append(self._write(max(oldest, saved - 1), written))
        self.chunks = [chunk for chunk in self.chunks if chunk.stop > oldest]
        prioritized = self.chunks and isinstance(self.replay.sampler, PrioritizedSampler)
        return [*self.chunks, self._write_priorities()] if prioritized else list(self.chunks)

    def load(self, chunks: Iterable[ReplayChunk]) -> None:
        """Fills the empty buffer from the result of :meth:`save`; truncates the open episodes.

        Raises:
            ValueError: if the buffer has other sizes or entries, or a chunk is damaged.
        """
        chunks = list(chunks)
        self.chunks = [chunk for chunk in chunks if not chunk.file.startswith(_PRIORITIES)]
        if self.chunks:
            self._loaded = {chunk.file for chunk in chunks}
            if match := _NAME.fullmatch(self.chunks[-1].file):
                self._run_id = match[1]
            self.replay.restore(self._read(), self.chunks[-1].stop)
        if chunks != self.chunks and isinstance(self.replay.sampler, PrioritizedSampler):
            content = load_tensors(self.folder / chunks[-1].file)
            write_priorities(self.replay.sampler, self._stored(), content)

    def remove_all_but(self, chunks: Iterable[ReplayChunk]) -> None:
        """Removes all other chunks of this run, and keeps other files in the folder."""
        kept = {chunk.file for chunk in chunks}
        written = {path.name for path in self.folder.glob(f"*-{self._run_id}.pt*")}
        for name in (written | self._loaded) - kept:
            if name in self._loaded or _NAME.fullmatch(name.removesuffix(".partial")):
                (self.folder / name).unlink(missing_ok=True)

    def _write(self, start: int, stop: int) -> ReplayChunk:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{start:012d}-{stop:012d}-{self._run_id}.pt"
        _, data, frames = self.replay.read(start, stop)
        content = data.flatten_keys("/").to_dict()
        for key, tensors in frames.items():
            content |= {f"{_FRAMES}{'/'.join(key)}/{name}": t for name, t in tensors.items()}
        save_tensors(content, path)
        return ReplayChunk(path.name, start, stop, sha256(path))

    def _write_priorities(self) -> ReplayChunk:
        path = self.folder / f"{_PRIORITIES}{secrets.token_hex(8)}-{self._run_id}.pt"
        save_tensors(read_priorities(self.replay.sampler, self._stored()), path)
        return ReplayChunk(path.name, self.chunks[0].start, self.chunks[-1].stop, sha256(path))

    def _stored(self) -> torch.Tensor:
        """Returns the indices of the stored transitions, oldest first."""
        size, capacity = len(self.replay), self.replay.storage.max_size
        newest = self.replay.write_count * self.replay.num_envs
        return torch.arange(newest - size, newest) % capacity

    def _read(self) -> Iterator[ReplaySlice]:
        """Yields the chunks, newest first."""
        envs = [] if self.replay.num_envs == 1 else [self.replay.num_envs]
        for chunk in reversed(self.chunks):
            content = load_tensors(self.folder / chunk.file)
            leaves = content.values() if isinstance(content, dict) else [None]
            if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
                raise ValueError(f"{self.folder / chunk.file} must contain only tensors")
            frames: dict[Key, dict[str, torch.Tensor]] = {}
            for entry in [entry for entry in content if entry.startswith(_FRAMES)]:
                *key, name = entry.removeprefix(_FRAMES).split("/")
                frames.setdefault(tuple(key), {})[name] = content.pop(entry)
            if frames.keys() != self.replay.frames.keys():
                raise ValueError(
                    f"{chunk.file} has frames of {sorted(frames)}, but the replay buffer has "
                    f"frames of {sorted(self.replay.frames)}: use the same frame_stacks"
                )
            shape = [chunk.stop - chunk.start, *envs]
            if any(list(leaf.shape[: len(shape)]) != shape for leaf in content.values()):
                raise ValueError(
                    f"{chunk.file} does not have {shape[0]} steps of num_envs="
                    f"{self.replay.num_envs} environments"
                )
            yield chunk.start, TensorDict(content, shape).unflatten_keys("/"), frames

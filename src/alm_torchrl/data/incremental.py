"""A replay buffer on disk, as files that are written once each."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from alm_torchrl.data.replay import WindowReplayBuffer
from alm_torchrl.files import load_tensors, save_tensors, sha256

__all__ = ["IncrementalReplay", "ReplayChunk"]

_NAME = re.compile(r"\d{12}-\d{12}-([0-9a-f]{8})\.pt")  # steps, and whose they are
_FRAMES = "frames:"  # before the names of entries that are not time steps


@dataclass(frozen=True)
class ReplayChunk:
    """A file of a :class:`IncrementalReplay`.

    Attributes:
        file: its name.
        start: the first time step in it, as ``WindowReplayBuffer.steps_written`` counts.
        stop: the one after the last.
        sha256: its checksum.
    """

    file: str
    start: int
    stop: int
    sha256: str

    def check(self, folder: Path) -> None:
        """Raises an :class:`OSError` unless the file is in the folder as it was written."""
        path = folder / self.file
        if not path.is_file():
            raise OSError(f"{path} is missing")
        if sha256(path) != self.sha256:
            raise OSError(f"{path} is not as it was written")


class IncrementalReplay:
    """Writes what has been stored since it was last asked, so that saving takes as long as that.

    TorchRL's ``dumps`` writes a buffer as a whole, gigabytes of it every time. Here each time step
    is written once, to a file that is never touched again: what a checkpoint refers to stays as it
    was while training goes on. Its name ends with what is drawn once for each run, so that no other
    file is overwritten or removed. A part begins with the last time step of the part before it,
    whose episode may have been closed since.

    Args:
        replay: the buffer, in memory of any kind.
        folder: where the parts go; made if need be.
    """

    def __init__(self, replay: WindowReplayBuffer, folder: str | Path) -> None:
        self.replay = replay
        self.folder = Path(folder)
        self.parts: list[ReplayChunk] = []
        self._owner = secrets.token_hex(4)
        self._loaded: set[str] = set()

    def save(self) -> list[ReplayChunk]:
        """Writes a part with what is new, and waits until it is on the disk.

        Returns:
            The parts that make up the buffer, oldest first.

        Raises:
            OSError: if the part cannot be written; nothing is left of it then.
        """
        written = self.replay.steps_written
        oldest = max(0, written - self.replay.max_steps)
        saved = self.parts[-1].stop if self.parts else 0
        if saved < written:
            start = max(oldest, saved - 1)
            self.parts.append(self._write(start, written))
        self.parts = [part for part in self.parts if part.stop > oldest]
        return list(self.parts)

    def load(self, parts: Iterable[ReplayChunk]) -> None:
        """Fills the buffer, which is empty, and closes the episodes that were running.

        Args:
            parts: what :meth:`save` returned.

        Raises:
            ValueError: if the buffer has other sizes or entries than the one that was saved, or a
                part is damaged.
            OSError: if a part cannot be opened.
        """
        self.parts = list(parts)
        if self.parts:
            self._loaded = {part.file for part in self.parts}
            if named := _NAME.fullmatch(self.parts[-1].file):
                self._owner = named[1]
            self.replay.restore(self._read(), self.parts[-1].stop)

    def remove_all_but(self, parts: Iterable[ReplayChunk]) -> None:
        """Removes the parts that this run has written, in any session, and that are none of these.

        Nothing else is touched that lies in the folder, which may be a link to another.
        """
        kept = {part.file for part in parts}
        written = {path.name for path in self.folder.glob(f"*-{self._owner}.pt*")}
        for name in (written | self._loaded) - kept:
            if name in self._loaded or _NAME.fullmatch(name.removesuffix(".partial")):
                (self.folder / name).unlink(missing_ok=True)

    def _write(self, start: int, stop: int) -> ReplayChunk:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{start:012d}-{stop:012d}-{self._owner}.pt"
        content = {"/".join(key): leaf for key, leaf in _leaves(self.replay.read(start, stop))}
        for key, frames in self.replay.read_frames(start, stop).items():
            content |= {f"{_FRAMES}{'/'.join(key)}/{name}": t for name, t in frames.items()}
        save_tensors(content, path)
        return ReplayChunk(path.name, start, stop, sha256(path))

    def _read(self) -> Iterator[tuple[Any, ...]]:
        lanes = [] if self.replay.num_envs == 1 else [self.replay.num_envs]
        for part in reversed(self.parts):
            content = load_tensors(self.folder / part.file)
            leaves = content.values() if isinstance(content, dict) else [None]
            if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
                raise ValueError(f"{self.folder / part.file} holds something else than tensors")
            frames: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
            for entry in [entry for entry in content if entry.startswith(_FRAMES)]:
                *key, name = entry.removeprefix(_FRAMES).split("/")
                frames.setdefault(tuple(key), {})[name] = content.pop(entry)
            if frames.keys() != self.replay.frames.keys():
                raise ValueError(
                    f"{part.file} holds frames of {sorted(frames)}, but the replay buffer keeps "
                    f"frames of {sorted(self.replay.frames)}: take the same frame_stacks"
                )
            shape = [part.stop - part.start, *lanes]
            if any(list(leaf.shape[: len(shape)]) != shape for leaf in content.values()):
                raise ValueError(
                    f"{part.file} does not hold {shape[0]} steps of num_envs="
                    f"{self.replay.num_envs} environments"
                )
            entries = {tuple(name.split("/")): leaf for name, leaf in content.items()}
            yield part.start, TensorDict(entries, shape), frames


def _leaves(rows: TensorDictBase) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    for key, leaf in rows.items(include_nested=True, leaves_only=True):
        yield key if isinstance(key, tuple) else (key,), leaf

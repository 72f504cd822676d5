"""Storage of stacked observations that stores each frame once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import MemoryMappedTensor
from torch import Tensor

from alm_torchrl.data.transitions import equal


class FrameStore:
    """Stores the frames of a stacked observation, each frame once.

    A ring holds one frame per time step: the newest frame of the step's next observation. The
    observation of step ``k`` is a stack of the frames of steps ``k - n`` to ``k - 1``. The frames
    that an episode starts with belong to no step, so a pool holds them. Each transition stores the
    location of its ``n`` frames: an index into the pool, or -1 for the frame of a step.

    Args:
        stack: number of frames in an observation, ``n``, along its first dimension.
        max_steps: capacity of the replay buffer in time steps.
        num_envs: number of environments, ``N``.
        device: ignored with ``memmap``.
        memmap: keep the ring in a file instead of in memory.
        filename: path of the file; a temporary file by default.
    """

    def __init__(
        self,
        stack: int,
        max_steps: int,
        num_envs: int = 1,
        *,
        device: torch.device | str = "cpu",
        memmap: bool = False,
        filename: str | None = None,
    ) -> None:
        if stack < 1:
            raise ValueError(f"a stack must have at least 1 frame, not {stack}")
        self.stack = stack
        self.max_steps = max_steps
        self.num_envs = num_envs
        self.device = torch.device("cpu" if memmap else device)
        self._memmap, self._filename = memmap, filename
        self._ring: Tensor = torch.empty(0)  # [max_steps + stack, N, *frame] once allocated
        self._pool: Tensor = torch.empty(0)  # [P, *frame]
        self._free: list[int] = []  # unused indices of the pool
        self._places = torch.full((num_envs, stack), -1, dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return self._ring.nbytes + self._pool.nbytes

    def append(
        self,
        observations: Tensor,
        following: Tensor,
        starts: Tensor,
        step: int,
        stored: Callable[[], Tensor],
    ) -> Tensor:
        """Stores the new frames of consecutive time steps.

        Args:
            observations: stacks ``[N, T, n * C, ...]``.
            following: the next observations, of the same shape.
            starts: which transitions start an episode, bool ``[N, T]``.
            step: index of the first time step.
            stored: returns the locations that the replay buffer stores.

        Returns:
            The locations of the frames of each observation, int32 ``[N, T, n]``.
        """
        before, after = self._split(observations), self._split(following)
        if not equal(before[:, :, 1:], after[:, :, :-1]):
            raise ValueError(
                f"observations of shape {list(observations.shape[2:])} are not stacks of the last "
                f"{self.stack} frames: a next observation must drop the oldest frame and append one"
            )
        self._allocate(before[0, 0, 0])
        starts = starts.cpu()
        places = torch.full((*starts.shape, self.stack), -1, dtype=torch.int32)
        for time in range(starts.shape[1]):
            self._places = torch.roll(self._places, -1, 1)
            self._places[:, -1] = -1
            for env in starts[:, time].nonzero().flatten().tolist():
                used = lambda: (stored().cpu(), places, self._places)  # noqa: E731
                self._places[env] = self._store_first(before[env, time], used)
            places[:, time] = self._places
        self._write_ring(step, after[:, :, -1].transpose(0, 1))
        return places

    def stacks(self, steps: Tensor, envs: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Rebuilds observations and next observations, each ``[M, n * C, ...]``.

        The arguments are the time steps ``[M]``, their environments ``[M]``, and the locations of
        their frames ``[M, n]``, as returned by :meth:`append`.
        """
        back = torch.arange(-self.stack, 1, device=steps.device)
        rows = (steps.unsqueeze(1) + back) % len(self._ring)
        places = torch.cat([places, places.new_full((len(places), 1), -1)], 1).long()
        envs = envs.unsqueeze(1)
        return (
            self._look_up(rows[:, :-1], envs, places[:, :-1]),
            self._look_up(rows[:, 1:], envs, places[:, 1:]),
        )

    def read(self, start: int, stop: int, places: Tensor) -> dict[str, Tensor]:
        """Copies the frames of the time steps ``start`` to ``stop - 1`` to the CPU.

        Returns:
            ``newest``: the last frames of the ring before ``stop``, at most
            ``[stop - start + n, N, ...]``; ``first``: frames of the pool ``[P, ...]``; ``places``:
            their indices ``[P]``.
        """
        rows = torch.arange(max(0, start - self.stack), stop) % len(self._ring)
        used = places.unique().long()
        used = used[used >= 0].to(self.device)
        newest, first = self._ring[rows.to(self.device)], self._pool[used]
        return {"newest": newest.cpu(), "first": first.cpu(), "places": used.cpu()}

    def write(
        self, start: int, stop: int, places: Tensor, frames: dict[str, Tensor], end: int
    ) -> None:
        """Restores the time steps ``start`` to ``stop - 1`` from a result of :meth:`read`.

        ``places`` are the locations of their frames, and ``end`` is the ``stop`` of ``read``.
        """
        newest = frames["newest"]
        self._allocate(newest[0, 0])
        offset = end - len(newest)
        first = max(offset, start - self.stack)  # earlier frames would overwrite newer ones
        self._write_ring(first, newest[first - offset : stop - offset])
        wanted = torch.isin(frames["places"], places.long())
        used = frames["places"][wanted]
        if len(used):
            self._grow(int(used.max()) + 1)
            self._pool[used.to(self.device)] = frames["first"][wanted].to(self.device)
        self._free = []  # searched when one is needed

    def state_dict(self) -> dict[str, Any]:
        """Returns all frames, without a copy."""
        return {"newest": self._ring, "first": self._pool} if len(self._ring) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores all frames."""
        if state_dict:
            self._allocate(state_dict["newest"][0, 0])
            self._ring.copy_(state_dict["newest"])
            self._pool = state_dict["first"].to(self.device, copy=True)
            self._free = []

    def _split(self, stacked: Tensor) -> Tensor:
        """``[N, T, n * C, ...]`` to ``[N, T, n, C, ...]``."""
        if stacked.ndim < 3 or stacked.shape[2] % self.stack:
            raise ValueError(
                f"observations of shape {list(stacked.shape[2:])} are not stacks of {self.stack} "
                "frames along their first dimension"
            )
        return stacked.unflatten(2, (self.stack, -1))

    def _allocate(self, frame: Tensor) -> None:
        """Allocates the ring for frames like this one, unless it has been allocated."""
        if len(self._ring):
            return
        shape = (self.max_steps + self.stack, self.num_envs, *frame.shape)
        if self._memmap:
            file = MemoryMappedTensor.empty(shape, dtype=frame.dtype, filename=self._filename)
            self._ring = file.as_subclass(Tensor)
        else:
            self._ring = torch.empty(shape, dtype=frame.dtype, device=self.device)
        self._pool = torch.empty(0, *frame.shape, dtype=frame.dtype, device=self.device)

    def _write_ring(self, step: int, frames: Tensor) -> None:
        rows = torch.arange(step, step + len(frames)) % len(self._ring)
        self._ring[rows.to(self.device)] = frames.to(self.device)

    def _look_up(self, rows: Tensor, envs: Tensor, places: Tensor) -> Tensor:
        """Frames ``[M, n]`` of the ring, or of the pool where ``places`` is not -1."""
        frames = self._ring[rows, envs]
        if len(self._pool):
            pooled = (places >= 0).reshape(*places.shape, *[1] * (frames.ndim - 2))
            frames = torch.where(pooled, self._pool[places.clamp(min=0)], frames)
        return frames.flatten(1, 2)

    def _store_first(self, frames: Tensor, used: Callable[[], tuple[Tensor, ...]]) -> Tensor:
        """Stores the first frames of an episode in the pool, a repeated frame once."""
        new = [True] + [not equal(a, b) for a, b in zip(frames[1:], frames[:-1], strict=True)]
        if len(self._free) < sum(new):
            self._find_free(used())
        places = torch.tensor([self._free.pop() for _ in range(sum(new))])
        self._pool[places.to(self.device)] = frames[new].to(self.device)
        return places[torch.tensor(new).cumsum(0) - 1].int()

    def _find_free(self, used: tuple[Tensor, ...]) -> None:
        """Finds the unused indices of the pool; doubles the pool if they are few."""
        free = torch.ones(len(self._pool) + 1, dtype=torch.bool)
        for places in used:
            free[places.flatten().long() + 1] = False
        self._free = free[1:].nonzero().flatten().tolist()
        if len(self._free) < max(self.stack, len(self._pool) // 4):
            self._grow(max(16, self.stack, 2 * len(self._pool)))

    def _grow(self, size: int) -> None:
        old = len(self._pool)
        if size > old:
            more = self._pool.new_empty(size - old, *self._pool.shape[1:])
            self._pool = torch.cat([self._pool, more])
            self._free.extend(range(old, size))

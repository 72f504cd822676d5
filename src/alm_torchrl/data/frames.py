"""Stacked observations kept frame by frame, so that no frame is stored twice.

A stack of the last ``n`` frames and the stack after it hold ``n + 1`` frames, all but one of which
belong to the transitions before as well. TorchRL's offline :class:`~torchrl.envs.CatFrames` puts
stacks together from stored frames too, yet it draws whole slices, so that a frame per transition
is not enough for the first frames of a slice, and it wants the next observation stored.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from tensordict import MemoryMappedTensor
from torch import Tensor

__all__ = ["FrameStore"]


class FrameStore:
    """The frames behind a stacked observation, each stored once.

    Time step ``k`` (counted over everything ever stored) brings one new frame: the newest of its
    next observation. It lies in a ring. The observation of step ``k`` is made of the frames that
    steps ``k - n`` to ``k - 1`` brought, as far as its episode reaches back; the frames that the
    episode began with, which no step brought, lie in a pool that grows with the number of episodes
    stored. Which frames those are is written down for each transition as ``n`` numbers: a place in
    that pool, or -1 for the frame that a step brought. So a stack is what the environment returned,
    however it fills its stack at a reset, and the last next observation of an episode is kept.

    Args:
        stack: frames in an observation, ``n``, along its first dimension.
        max_steps: time steps that the replay buffer holds.
        num_envs: lanes, ``N``.
        device: where the frames live; ignored for files.
        memmap: keep the ring in a file rather than in memory.
        filename: of that file; a temporary one if left out.

    Raises:
        ValueError: if ``stack`` is less than 1.
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
            raise ValueError(f"a stack holds at least 1 frame, not {stack}")
        self.stack = stack
        self.max_steps = max_steps
        self.num_envs = num_envs
        self.device = torch.device("cpu" if memmap else device)
        self._memmap, self._filename = memmap, filename
        self._newest: Tensor | None = None  # [max_steps + stack, N, *frame]
        self._first = torch.empty(0)  # the pool [places, *frame]
        self._free: list[int] = []
        self._held: deque[tuple[int, list[int]]] = deque()  # first time step and its places
        self._last: Tensor | None = None  # the newest next observations [N, n, *frame]
        self._places = torch.full((num_envs, stack), -1, dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of all the frames that there is room for."""
        ring = 0 if self._newest is None else self._newest.nbytes
        return ring + self._first.nbytes

    def append(self, observations: Tensor, following: Tensor, step: int) -> Tensor:
        """Stores the new frames of some time steps.

        Args:
            observations: stacks ``[N, T, n * C, ...]``.
            following: the next observations, of the same shape.
            step: the first time step.

        Returns:
            For each transition where its observation's frames are, int32 ``[N, T, n]``.

        Raises:
            ValueError: if the observations are no stacks of ``n`` frames.
        """
        before, after = self._split(observations), self._split(following)
        if not torch.equal(before[:, :, 1:], after[:, :, :-1]):
            raise ValueError(
                f"observations of shape {list(observations.shape[2:])} are no stacks of the last "
                f"{self.stack} frames: a next observation must be the observation without its "
                "oldest frame, and one new frame behind"
            )
        if self._newest is None:
            self._allocate(before)
        length = before.shape[1]
        self._release(step + length)
        previous = before.new_zeros(before[:, 0].shape) if self._last is None else self._last
        earlier = torch.cat([previous.unsqueeze(1), after[:, :-1]], 1)
        goes_on = (before == earlier).flatten(2).all(-1).cpu()
        if self._last is None:
            goes_on[:, 0] = False
        places = torch.empty(self.num_envs, length, self.stack, dtype=torch.int32)
        for time in range(length):
            self._places = torch.roll(self._places, -1, 1)
            self._places[:, -1] = -1
            for lane in (~goes_on[:, time]).nonzero().flatten().tolist():
                self._places[lane] = torch.tensor(self._keep(before[lane, time], step + time))
            places[:, time] = self._places
        self._put(step, after[:, :, -1].transpose(0, 1))
        self._last = after[:, -1].clone()
        return places

    def stacks(self, steps: Tensor, lanes: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Puts observations together.

        Args:
            steps: time steps ``[M]``.
            lanes: their environments ``[M]``.
            places: where their frames are, as :meth:`append` returned it, ``[M, n]``.

        Returns:
            Observations and next observations, each ``[M, n * C, ...]``.
        """
        assert self._newest is not None  # something is stored
        back = torch.arange(-self.stack, 1, device=steps.device)
        rows = (steps.unsqueeze(1) + back) % len(self._newest)
        places = torch.cat([places, places.new_full((len(places), 1), -1)], 1).long()
        halves = (slice(None, -1), slice(1, None))
        return tuple(  # type: ignore[return-value]
            self._look_up(rows[:, half], lanes.unsqueeze(1), places[:, half]) for half in halves
        )

    def read(self, start: int, stop: int, places: Tensor) -> dict[str, Tensor]:
        """Copies all frames that some time steps need.

        Args:
            start: the first of them.
            stop: the one after the last.
            places: where their frames are, ``[..., n]``.

        Returns:
            On the CPU: the frames ``newest`` ``[T + n or less, N, ...]`` of the last steps before
            ``stop``, and from the pool the frames ``first`` ``[P, ...]`` at ``places`` ``[P]``.
        """
        assert self._newest is not None  # something is stored
        rows = torch.arange(max(0, start - self.stack), stop) % len(self._newest)
        used = places.unique().long()
        used = used[used >= 0].to(self.device)
        newest, first = self._newest[rows.to(self.device)], self._first[used]
        return {"newest": newest.cpu(), "first": first.cpu(), "places": used.cpu()}

    def write(
        self, start: int, stop: int, places: Tensor, frames: dict[str, Tensor], end: int
    ) -> None:
        """Puts back some of what :meth:`read` copied.

        Args:
            start: the first time step wanted of it.
            stop: the one after the last.
            places: where the frames of those time steps are, ``[..., n]``.
            frames: what :meth:`read` returned.
            end: the ``stop`` that it was given.
        """
        newest = frames["newest"]
        if self._newest is None:
            self._allocate(newest.unsqueeze(2).transpose(0, 1))
        offset = end - len(newest)  # others would come to lie on those of newer time steps
        first = max(offset, start - self.stack)
        self._put(first, newest[first - offset : stop - offset])
        wanted = torch.isin(frames["places"], places.long())
        used = frames["places"][wanted]
        if len(used):
            self._grow(int(used.max()) + 1)
            self._first[used.to(self.device)] = frames["first"][wanted].to(self.device)

    def take_over(self, steps: Tensor, places: Tensor) -> None:
        """Finds out which places of the pool are in use, after :meth:`write`.

        Args:
            steps: all time steps stored, ``[S]``.
            places: where their frames are, ``[S, ..., n]``.
        """
        places = places.cpu().long().flatten(1)
        last = torch.full((len(self._first) + 1,), -1, dtype=torch.long)
        steps = steps.cpu().unsqueeze(1).expand_as(places).flatten()
        last.scatter_reduce_(0, places.flatten() + 1, steps, "amax")  # -1 goes to the front
        used = sorted((time, place) for place, time in enumerate(last[1:].tolist()) if time >= 0)
        self._held = deque((time - self.stack + 1, [place]) for time, place in used)
        taken = {place for _, place in used}
        self._free = [place for place in range(len(self._first)) if place not in taken]
        self._last = None

    def state_dict(self) -> dict[str, Any]:
        """All frames, as they lie."""
        return {"newest": self._newest, "first": self._first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes frames from a :meth:`state_dict`; then :meth:`take_over` is due."""
        if state_dict["newest"] is None:
            return
        if self._newest is None:
            self._allocate(state_dict["newest"].unsqueeze(2).transpose(0, 1))
        assert self._newest is not None
        self._newest.copy_(state_dict["newest"])
        self._first = state_dict["first"].to(self.device, copy=True)

    def _split(self, stacked: Tensor) -> Tensor:
        """``[N, T, n * C, ...]`` to ``[N, T, n, C, ...]``."""
        if stacked.ndim < 3 or stacked.shape[2] % self.stack:
            raise ValueError(
                f"observations of shape {list(stacked.shape[2:])} are no stacks of {self.stack} "
                "frames along their first dimension"
            )
        return stacked.unflatten(2, (self.stack, -1))

    def _allocate(self, example: Tensor) -> None:
        """Takes the memory, for frames like those of ``[N, T, n, *frame]``."""
        shape = (self.max_steps + self.stack, self.num_envs, *example.shape[3:])
        if self._memmap:
            file = MemoryMappedTensor.empty(shape, dtype=example.dtype, filename=self._filename)
            self._newest = file.as_subclass(Tensor)
        else:
            self._newest = torch.empty(shape, dtype=example.dtype, device=self.device)
        self._first = torch.empty(0, *example.shape[3:], dtype=example.dtype, device=self.device)

    def _put(self, step: int, frames: Tensor) -> None:
        assert self._newest is not None  # allocated before
        rows = torch.arange(step, step + len(frames)) % len(self._newest)
        self._newest[rows.to(self.device)] = frames.to(self.device)

    def _look_up(self, rows: Tensor, lanes: Tensor, places: Tensor) -> Tensor:
        """Frames ``[M, n]`` from the ring or, where there is a place, from the pool."""
        assert self._newest is not None  # allocated before
        frames = self._newest[rows, lanes]
        if len(self._first):
            chosen = (places >= 0).reshape(*places.shape, *[1] * (frames.ndim - 2))
            frames = torch.where(chosen, self._first[places.clamp(min=0)], frames)
        return frames.flatten(1, 2)

    def _keep(self, frames: Tensor, step: int) -> list[int]:
        """Puts the frames that an episode begins with into the pool, repeated ones once."""
        places: list[int] = []
        for index, frame in enumerate(frames):
            if index and torch.equal(frame, frames[index - 1]):
                places.append(places[-1])
                continue
            if not self._free:
                self._grow(max(16, 2 * len(self._first)))
            places.append(self._free.pop())
            self._first[places[-1]] = frame.to(self.device)
        self._held.append((step, sorted(set(places))))
        return places

    def _grow(self, size: int) -> None:
        old = len(self._first)
        if size > old:
            more = self._first.new_empty(size - old, *self._first.shape[1:])
            self._first = torch.cat([self._first, more])
            self._free.extend(range(old, size))

    def _release(self, stop: int) -> None:
        """Frees the first frames that no step needs any more once those before ``stop`` are in."""
        oldest = stop - self.max_steps
        while self._held and self._held[0][0] + self.stack - 1 < oldest:
            self._free.extend(self._held.popleft()[1])

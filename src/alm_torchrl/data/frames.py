"""Storage of stacked observations that stores each frame once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alm_torchrl.data.transitions import equal


class FrameStore:
    """Stores each frame of a stacked observation once.

    A ring holds one frame per time step: the newest frame of the step's next observation. The
    observation of step ``k`` is a stack of the frames of steps ``k - n`` to ``k - 1``. The first
    frames of an episode belong to no step, so a pool holds them. A second ring holds the places of
    the ``n`` frames of each step: an index into the pool, or -1 for a frame in the first ring.
    ``empty`` allocates the first ring, like :func:`torch.empty`.
    """

    def __init__(
        self,
        stack: int,
        max_steps: int,
        num_envs: int,
        device: torch.device,
        empty: Callable[..., Tensor],
    ) -> None:
        if stack < 1:
            raise ValueError(f"a stack must have at least 1 frame, not {stack}")
        self.stack = stack
        self.max_steps = max_steps
        self.num_envs = num_envs
        self.device = device
        self._empty = empty
        self._ring: Tensor = torch.empty(0)  # [max_steps + n, N, *frame] once allocated
        self._pool: Tensor = torch.empty(0)  # [P, *frame]
        self._free: list[int] = []  # unused indices of the pool; may be incomplete
        shape = (max_steps, num_envs, stack)
        self._places = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._newest = torch.full(shape[1:], -1, dtype=torch.int32)  # the newest places

    def append(self, observations: Tensor, following: Tensor, starts: Tensor, step: int) -> None:
        """Stores the new frames of consecutive time steps, beginning with number ``step``.

        Observations and next observations are ``[N, T, n * C, ...]``; ``starts`` marks the
        transitions that start an episode, bool ``[N, T]``.
        """
        is_stack = observations.ndim > 2 and observations.shape[2] % self.stack == 0
        if is_stack:
            both = (observations, following)
            before, after = (part.unflatten(2, (self.stack, -1)) for part in both)
            is_stack = equal(before[:, :, 1:], after[:, :, :-1])
        if not is_stack:
            raise ValueError(
                f"observations of shape {list(observations.shape[2:])} are not stacks of "
                f"{self.stack} frames along their first dimension: a next observation must drop "
                "the oldest frame and append one"
            )
        self._allocate(before[0, 0, 0])
        starts = starts.cpu()
        places = torch.full((starts.shape[1], self.num_envs, self.stack), -1, dtype=torch.int32)
        for time in range(len(places)):
            self._newest = torch.roll(self._newest, -1, 1)
            self._newest[:, -1] = -1
            for env in starts[:, time].nonzero().flatten().tolist():
                self._newest[env] = self._store_first(before[env, time], places)
            places[time] = self._newest
        _write(self._places, step, places)
        _write(self._ring, step, after[:, :, -1].transpose(0, 1))

    def stacks(self, steps: Tensor, envs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns observations and next observations ``[M, n * C, ...]`` of time steps ``[M]``."""
        places = self._places[steps % self.max_steps, envs].long()
        places = torch.cat([places, places.new_full((len(places), 1), -1)], 1)
        back = torch.arange(-self.stack, 1, device=steps.device)
        rows = (steps.unsqueeze(1) + back) % len(self._ring)
        envs = envs.unsqueeze(1)
        return (
            self._look_up(rows[:, :-1], envs, places[:, :-1]),
            self._look_up(rows[:, 1:], envs, places[:, 1:]),
        )

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """Copies the frames of the time steps ``start`` to ``stop - 1`` to the CPU.

        Returns:
            ``places`` ``[stop - start, N, n]``; ``newest``, the frames of these and up to ``n``
            earlier steps; ``first``, frames of the pool ``[P, ...]``, and their ``indices``.
        """
        steps = torch.arange(max(0, start - self.stack), stop, device=self.device)
        places = self._places[steps[steps >= start] % self.max_steps]
        used = places.unique().long()
        used = used[used >= 0]
        newest = self._ring[steps % len(self._ring)]
        copies = {"places": places, "newest": newest, "first": self._pool[used], "indices": used}
        return {name: tensor.cpu() for name, tensor in copies.items()}

    def write(self, start: int, stop: int, frames: dict[str, Tensor], end: int) -> None:
        """Restores the steps ``start`` to ``stop - 1`` from the result of ``read(..., end)``."""
        newest, offset = frames["newest"], end - len(frames["newest"])
        self._allocate(newest[0, 0])
        first = max(offset, start - self.stack)  # earlier frames could overwrite newer ones
        _write(self._ring, first, newest[first - offset : stop - offset])
        offset = end - len(frames["places"])
        places = frames["places"][start - offset : stop - offset]
        _write(self._places, start, places)
        wanted = torch.isin(frames["indices"], places.long())
        used = frames["indices"][wanted]
        if len(used):
            self._grow(int(used.max()) + 1)
            self._pool[used.to(self.device)] = frames["first"][wanted].to(self.device)
        self._free = []

    def state_dict(self) -> dict[str, Any]:
        """Returns all frames, without a copy."""
        return {"places": self._places, "newest": self._ring, "first": self._pool}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores all frames."""
        if len(state_dict["newest"]):
            self._allocate(state_dict["newest"][0, 0])
            self._ring.copy_(state_dict["newest"])
            self._places.copy_(state_dict["places"])
            self._pool = state_dict["first"].to(self.device, copy=True)
            self._free = []

    def _allocate(self, frame: Tensor) -> None:
        """Allocates the ring for frames like this one, if it is not allocated yet."""
        if len(self._ring):
            return
        shape = (self.max_steps + self.stack, self.num_envs, *frame.shape)
        ring = self._empty(shape, dtype=frame.dtype, device=self.device)
        self._ring = ring.as_subclass(Tensor)
        self._pool = torch.empty(0, *frame.shape, dtype=frame.dtype, device=self.device)

    def _look_up(self, rows: Tensor, envs: Tensor, places: Tensor) -> Tensor:
        """Returns frames ``[M, n]`` of the ring, or of the pool where ``places`` is not -1."""
        frames = self._ring[rows, envs]
        if len(self._pool):
            pooled = (places >= 0).reshape(*places.shape, *[1] * (frames.ndim - 2))
            frames = torch.where(pooled, self._pool[places.clamp(min=0)], frames)
        return frames.flatten(1, 2)

    def _store_first(self, frames: Tensor, pending: Tensor) -> Tensor:
        """Stores the first frames of an episode in the pool, repeated frames only once."""
        new = [True] + [not equal(a, b) for a, b in zip(frames[1:], frames[:-1], strict=True)]
        if len(self._free) < sum(new):
            self._find_free(pending)
        places = torch.tensor([self._free.pop() for _ in range(sum(new))])
        self._pool[places.to(self.device)] = frames[new].to(self.device)
        return places[torch.tensor(new).cumsum(0) - 1].int()

    def _find_free(self, pending: Tensor) -> None:
        """Finds the unused indices of the pool; doubles the pool if there are few."""
        free = torch.ones(len(self._pool) + 1, dtype=torch.bool)
        for places in (self._places.cpu(), pending, self._newest):
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


def _write(ring: Tensor, step: int, values: Tensor) -> None:
    """Writes the values of consecutive time steps to a ring."""
    rows = torch.arange(step, step + len(values)) % len(ring)
    ring[rows.to(ring.device)] = values.to(ring.device)

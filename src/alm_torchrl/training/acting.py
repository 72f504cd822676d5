"""Acting that does not wait for a GPU."""

from __future__ import annotations

import copy
from collections import deque

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

__all__ = ["PolicyCopy"]


class PolicyCopy(TensorDictModuleBase):
    """A policy that acts on the CPU with weights published after an update.

    On a single observation, small networks are faster on the CPU than the launches of a GPU. The
    weights are copied behind the update that is running, without waiting for it.

    With ``lag=0``, acting waits for the update before it, as the algorithm has it. With ``lag=1``
    it takes the weights that the update before started from, and so happens while a GPU computes
    that update. What changes is who collected the data: a policy that is one update old (off-policy
    learning allows for any; the authors' code has none). On a CPU there is nothing to gain.

    Args:
        policy: the policy that is learnt, on any device.
        lag: publications that acting is behind, 0 or 1.

    Raises:
        ValueError: for any other lag.
    """

    def __init__(self, policy: TensorDictModuleBase, lag: int = 0) -> None:
        super().__init__()
        if lag not in (0, 1):
            raise ValueError(f"the policy may lag 0 or 1 updates behind, not {lag}")
        self.in_keys, self.out_keys = policy.in_keys, policy.out_keys
        self._source = _tensors(policy)
        self._shares = lag == 0 and all(value.device.type == "cpu" for value in self._source)
        self.policy = policy if self._shares else copy.deepcopy(policy).to("cpu")
        self._slots: deque[tuple[list[Tensor], torch.cuda.Event | None]] = deque()
        self._lag = lag
        self.restart()

    def restart(self) -> None:
        """Acts with the weights as they are, as at the start."""
        self._slots.clear()
        for _ in range(self._lag + 1):
            self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the weights as they are once the work launched so far is done."""
        if self._shares:
            return
        full = len(self._slots) > self._lag
        slot = self._slots.popleft()[0] if full else [_host_copy(value) for value in self._source]
        torch._foreach_copy_(slot, self._source, non_blocking=True)
        event = None
        if self._source[0].is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._slots.append((slot, event))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Acts with the oldest weights kept: the newest published, or those before them."""
        if not self._shares:
            slot, event = self._slots[0]
            if event is not None:
                event.synchronize()
            for own, published in zip(_tensors(self.policy), slot, strict=True):
                own.data = published
        return self.policy(tensordict)


def _tensors(policy: TensorDictModuleBase) -> list[Tensor]:
    """Parameters and buffers, which hold the scale of the noise."""
    return [*policy.parameters(), *policy.buffers()]


def _host_copy(value: Tensor) -> Tensor:
    """Memory on the host like that of a tensor, which a GPU can write to by itself."""
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)

"""Policies for collection: CPU copies and version-stamped weights."""

from __future__ import annotations

import copy
from collections import deque

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.collectors import BaseCollector

__all__ = ["CPUPolicy", "PolicyPublisher", "VersionedPolicy"]


class VersionedPolicy(TensorDictModuleBase):
    """A policy that notes with every action how many updates its weights have seen.

    The number is a buffer beside the weights, so that it goes wherever they go: it says what was
    acted with, and not what should have been.

    Args:
        policy: the policy.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> layer = torch.nn.Linear(3, 2)
        >>> policy = VersionedPolicy(TensorDictModule(layer, ["observation"], ["action"]))
        >>> policy.update.fill_(7)
        tensor(7)
        >>> policy(TensorDict(observation=torch.zeros(4, 3), batch_size=[4]))["policy_update"]
        tensor([7, 7, 7, 7])
    """

    update: Tensor

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.policy = policy
        self.in_keys, self.out_keys = policy.in_keys, [*policy.out_keys, "policy_update"]
        device = next((value.device for value in _tensors(policy)), None)
        self.register_buffer("update", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Acts, and writes ``"policy_update"``, int64 of the batch's shape."""
        tensordict = self.policy(tensordict)
        # A copy: the buffer may have moved on before the steps of a batch are put together.
        return tensordict.set("policy_update", self.update.expand(tensordict.shape).clone())


class PolicyPublisher:
    """Sends the weights that are learnt to the workers of a collector.

    Args:
        policy: the policy that is learnt, on any device; the collector acts with a copy of it.
        collector: one with workers, such as
            :func:`make_collector(kind="multi") <alm_torchrl.data.make_collector>`.
        every: updates between two times that the weights are sent.

    Raises:
        ValueError: if ``every`` is less than 1.
    """

    def __init__(self, policy: VersionedPolicy, collector: BaseCollector, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"weights can be sent every 1 or more updates, not {every}")
        self._policy, self._collector, self._every = policy, collector, every
        self._sent = 0

    def publish(self, update: int) -> None:
        """Sends the weights as they are after ``update`` updates, if it is time to."""
        if update - self._sent >= self._every:
            self.restart(update)

    @torch.no_grad()
    def restart(self, update: int) -> None:
        """Sends the weights as they are after ``update`` updates."""
        self._policy.update.fill_(update)
        weights = TensorDict.from_module(self._policy).data.to("cpu")
        self._collector.update_policy_weights_(weights)
        self._sent = update


class CPUPolicy(TensorDictModuleBase):
    """A policy that acts on the CPU with weights published after an update.

    On a single observation, small networks are faster on the CPU than the launches of a GPU. The
    weights are copied behind the update that is running, without waiting for it (on CUDA).

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
        stamped = VersionedPolicy(policy)
        self.in_keys, self.out_keys = stamped.in_keys, stamped.out_keys
        self._source, self._update = _tensors(stamped), stamped.update
        self._shares = lag == 0 and all(value.device.type == "cpu" for value in self._source)
        self.policy = stamped if self._shares else copy.deepcopy(stamped).to("cpu")
        self._slots: deque[tuple[list[Tensor], torch.cuda.Event | None]] = deque()
        self._lag = lag
        self.restart()

    def restart(self, update: int = 0) -> None:
        """Acts with the weights as they are after ``update`` updates, as at the start."""
        self._slots.clear()
        for _ in range(self._lag + 1):
            self.publish(update)

    @torch.no_grad()
    def publish(self, update: int) -> None:
        """Copies the weights as they are once the ``update`` updates launched so far are done."""
        self._update.fill_(update)
        if self._shares:
            return
        full = len(self._slots) > self._lag
        slot = self._slots.popleft()[0] if full else [_host_copy(value) for value in self._source]
        # Only CUDA has an event to wait for; from any other device the copy itself waits
        on_cuda = self._source[0].is_cuda
        torch._foreach_copy_(slot, self._source, non_blocking=on_cuda)
        event = None
        if on_cuda:
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

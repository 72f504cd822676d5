"""Policies for collection: CPU copies and version-stamped weights."""

from __future__ import annotations

import copy
from collections import deque

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.collectors import BaseCollector


class VersionedPolicy(TensorDictModuleBase):
    """A policy that also writes the number of updates that its weights have received.

    The number is the buffer ``update``, so workers receive it with the weights.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> layer = torch.nn.Linear(3, 2)
        >>> policy = VersionedPolicy(TensorDictModule(layer, ["observation"], ["action"]))
        >>> policy(TensorDict(observation=torch.zeros(4, 3), batch_size=[4]))["policy_update"]
        tensor([0, 0, 0, 0])
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
        # A copy, because the buffer may change before the steps of a batch are stacked.
        return tensordict.set("policy_update", self.update.expand(tensordict.shape).clone())


class PolicyPublisher:
    """Sends the trained weights to the workers of a collector.

    Args:
        policy: the trained policy, on any device; the collector acts with a copy of it.
        collector: a collector with workers; see :func:`alm_torchrl.data.make_collector`.
        every: updates between two transfers.
    """

    def __init__(self, policy: VersionedPolicy, collector: BaseCollector, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        self._policy, self._collector, self._every = policy, collector, every
        self._sent = 0

    def publish(self, update: int) -> None:
        """Sends the weights of update number ``update`` if a transfer is due."""
        if update - self._sent >= self._every:
            self.restart(update)

    @torch.no_grad()
    def restart(self, update: int) -> None:
        """Sends the weights of update number ``update``."""
        self._policy.update.fill_(update)
        weights = TensorDict.from_module(self._policy).data.to("cpu")
        self._collector.update_policy_weights_(weights)
        self._sent = update


class CPUPolicy(TensorDictModuleBase):
    """Acts on the CPU with a copy of the trained weights.

    For a small network and a single observation, a CPU is faster than a GPU. From a GPU, the
    weights are copied after the running update, without waiting for it.

    Args:
        policy: the trained policy, on any device.
        lag: 0 or 1. With 0, acting waits for the last update, as in the authors' code. With 1, it
            uses the weights before that update, and so can run during it on a GPU.
    """

    def __init__(self, policy: TensorDictModuleBase, lag: int = 0) -> None:
        super().__init__()
        if lag not in (0, 1):
            raise ValueError(f"lag={lag} must be 0 or 1")
        stamped = VersionedPolicy(policy)
        self.in_keys, self.out_keys = stamped.in_keys, stamped.out_keys
        self._source, self._update = _tensors(stamped), stamped.update
        self._shares = lag == 0 and all(value.device.type == "cpu" for value in self._source)
        self.policy = stamped if self._shares else copy.deepcopy(stamped).to("cpu")
        self._slots: deque[tuple[list[Tensor], torch.cuda.Event | None]] = deque()
        self._lag = lag
        self.restart()

    def restart(self, update: int = 0) -> None:
        """Publishes the weights of update number ``update`` and discards older ones."""
        self._slots.clear()
        for _ in range(self._lag + 1):
            self.publish(update)

    @torch.no_grad()
    def publish(self, update: int) -> None:
        """Copies the weights of update number ``update``, which may still be running on a GPU."""
        self._update.fill_(update)
        if self._shares:
            return
        on_cuda = self._source[0].is_cuda
        if len(self._slots) > self._lag:
            slot, _ = self._slots.popleft()
        else:  # pinned memory, for asynchronous copies
            slot = [torch.empty_like(t, device="cpu", pin_memory=on_cuda) for t in self._source]
        # An event marks the end of copies from CUDA; copies from other devices wait.
        torch._foreach_copy_(slot, self._source, non_blocking=on_cuda)
        event = torch.cuda.Event() if on_cuda else None
        if event is not None:
            event.record()
        self._slots.append((slot, event))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Acts with the weights of the last publication, or of ``lag`` publications before."""
        if not self._shares:
            slot, event = self._slots[0]
            if event is not None:
                event.synchronize()
            for own, published in zip(_tensors(self.policy), slot, strict=True):
                own.data = published
        return self.policy(tensordict)


def _tensors(policy: TensorDictModuleBase) -> list[Tensor]:
    """Returns parameters and buffers, such as the noise scale."""
    return [*policy.parameters(), *policy.buffers()]

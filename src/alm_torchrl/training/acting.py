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
    """Writes with every action the number of updates behind the policy's weights.

    The number is a buffer, so it travels with the weights to workers.

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
        # A copy, because the buffer may change before the steps of a batch are stacked.
        return tensordict.set("policy_update", self.update.expand(tensordict.shape).clone())


class PolicyPublisher:
    """Sends the trained weights to the workers of a collector.

    Args:
        policy: the trained policy, on any device; the collector acts with a copy of it.
        collector: a collector with workers, such as
            :func:`make_collector(kind="multi") <alm_torchrl.data.make_collector>`.
        every: updates between two transfers.

    Raises:
        ValueError: if ``every`` is less than 1.
    """

    def __init__(self, policy: VersionedPolicy, collector: BaseCollector, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        self._policy, self._collector, self._every = policy, collector, every
        self._sent = 0

    def publish(self, update: int) -> None:
        """Sends the weights after ``update`` updates if a transfer is due."""
        if update - self._sent >= self._every:
            self.restart(update)

    @torch.no_grad()
    def restart(self, update: int) -> None:
        """Sends the weights after ``update`` updates."""
        self._policy.update.fill_(update)
        weights = TensorDict.from_module(self._policy).data.to("cpu")
        self._collector.update_policy_weights_(weights)
        self._sent = update


class CPUPolicy(TensorDictModuleBase):
    """Acts on the CPU with a copy of the trained weights.

    For a single observation, a small network is faster on the CPU than on a GPU. On CUDA, the
    weights are copied after the running update, without waiting for it.

    With ``lag=0``, acting waits for the last update, as in the authors' code. With ``lag=1``, it
    uses the weights before that update, and so overlaps with it on a GPU.

    Args:
        policy: the trained policy, on any device.
        lag: how many publications acting is behind, 0 or 1.

    Raises:
        ValueError: for any other lag.
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
        """Publishes the weights after ``update`` updates and forgets older ones."""
        self._slots.clear()
        for _ in range(self._lag + 1):
            self.publish(update)

    @torch.no_grad()
    def publish(self, update: int) -> None:
        """Copies the weights once the ``update`` updates launched so far have finished."""
        self._update.fill_(update)
        if self._shares:
            return
        full = len(self._slots) > self._lag
        slot = self._slots.popleft()[0] if full else [_host_copy(value) for value in self._source]
        # Only CUDA has an event to wait for; on other devices the copy itself waits.
        on_cuda = self._source[0].is_cuda
        torch._foreach_copy_(slot, self._source, non_blocking=on_cuda)
        event = None
        if on_cuda:
            event = torch.cuda.Event()
            event.record()
        self._slots.append((slot, event))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Acts with the newest published weights, or with those ``lag`` publications before."""
        if not self._shares:
            slot, event = self._slots[0]
            if event is not None:
                event.synchronize()
            for own, published in zip(_tensors(self.policy), slot, strict=True):
                own.data = published
        return self.policy(tensordict)


def _tensors(policy: TensorDictModuleBase) -> list[Tensor]:
    """Parameters and buffers; a buffer holds the noise scale."""
    return [*policy.parameters(), *policy.buffers()]


def _host_copy(value: Tensor) -> Tensor:
    """Host memory like a tensor's, pinned for asynchronous copies."""
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)

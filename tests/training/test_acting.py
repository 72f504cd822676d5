"""Acting with a copy of the policy: which weights it has, without host synchronization."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from alm_torchrl.training import CPUPolicy, PolicyPublisher, VersionedPolicy, make_trainer
from tests.synchronization import HostReads


class Constant(nn.Module):
    """Returns its parameter plus its buffer for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("noise", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0 * x + self.weight + self.noise


def make_policy() -> tuple[Constant, TensorDictModule]:
    network = Constant()
    return network, TensorDictModule(network, in_keys=["observation"], out_keys=["action"])


def act(policy: CPUPolicy) -> float:
    return policy(TensorDict(observation=torch.ones(1)))["action"].item()


def learn(network: Constant) -> None:
    """One update, and a step of the noise, both in place."""
    network.weight.data += 1
    network.noise += 10


def test_without_lag_the_newest_weights_act() -> None:
    network, policy = make_policy()
    copied = CPUPolicy(policy)
    for update in range(4):
        assert act(copied) == 11 * update
        learn(network)
        copied.publish(update + 1)


def test_with_lag_the_previous_weights_act() -> None:
    """Until an update is published, the weights before it act; then they are one update behind."""
    network, policy = make_policy()
    copied = CPUPolicy(policy, lag=1)
    acted = []
    for update in range(5):
        acted.append(act(copied))
        learn(network)
        assert act(copied) == acted[-1]  # nothing changes before it is published
        copied.publish(update + 1)
    assert acted == [0, 0, 11, 22, 33]
    assert network.weight.item() == 5  # the trained weights do not change


def test_publishing_does_not_synchronize() -> None:
    _, policy = make_policy()
    copied = CPUPolicy(policy, lag=1)
    with HostReads() as reads:
        copied.publish(1)
        copied(TensorDict(observation=torch.ones(1)))
    assert not reads.found
    assert reads.operators > 0


def test_copies_without_events_are_synchronous(monkeypatch) -> None:
    """As on an Apple GPU: only copies from CUDA are asynchronous."""
    copy, waits = torch._foreach_copy_, []

    def note(to, source, non_blocking=False):
        waits.append(not non_blocking)
        copy(to, source)

    monkeypatch.setattr(torch, "_foreach_copy_", note)
    CPUPolicy(make_policy()[1], lag=1).publish(1)
    assert waits
    assert all(waits)


def test_another_lag_is_refused() -> None:
    with pytest.raises(ValueError, match="lag=2 must be 0 or 1"):
        CPUPolicy(make_policy()[1], lag=2)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_acts_with_the_weights_of_the_previous_update(
    make_module, tmp_path: Path, lag
) -> None:
    module = make_module(policy_lag=lag)
    copied, source = module.experience.policy, next(module.agent.actor.parameters())
    index = next(i for i, p in enumerate(module.agent.policy().parameters()) if p is source)
    history, behind = [source.detach().clone()], []

    def look(*_) -> None:
        acting = list(copied.policy.parameters())[index]
        behind.append(next(i for i, old in enumerate(history[::-1]) if torch.equal(old, acting)))

    def publish(update: int) -> None:
        history.append(source.detach().clone())
        CPUPolicy.publish(copied, update)

    copied.policy.register_forward_hook(look)
    copied.publish = publish
    make_trainer(tmp_path, seed=0, title="", eval_every=6, accelerator="cpu").fit(module)
    assert len(history) == 12
    assert behind == [0] + [lag] * 11


@pytest.mark.parametrize("lag", [0, 1])
def test_staleness_without_workers_is_the_lag(make_module, tmp_path: Path, lag) -> None:
    module = make_module(policy_lag=lag)
    make_trainer(tmp_path, seed=0, title="", eval_every=6, accelerator="cpu").fit(module)
    assert list(module.experience._ages) == [0.0] + [float(lag)] * 11


def test_a_transfer_interval_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="every=0 must be at least 1"):
        PolicyPublisher(VersionedPolicy(make_policy()[1]), None, every=0)

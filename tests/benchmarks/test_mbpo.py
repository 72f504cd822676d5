"""MBPO's ensemble learns, chooses its elites and stops, and its step has the published counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchrl.data import Bounded
from torchrl.objectives import SACLoss

from benchmarks import mbpo
from benchmarks.mbpo import (
    MBPO_SIZES,
    DynamicsEnsemble,
    DynamicsTraining,
    MBPOSizes,
    MBPOWork,
    count_epochs,
    regression_data,
    split,
)
from benchmarks.workloads import TASKS, windows
from experiments.sac import make_loss

TINY = MBPOSizes(members=3, elites=2, width=32, batch=32, every=50, starts=40)


NOISE = torch.tensor([0.1, 0.2, 0.3])


@pytest.fixture
def linear() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, noisy targets and the matrix of a linear system: 2 states, 1 action."""
    torch.manual_seed(0)
    inputs = torch.randn(1500, 3) * torch.tensor([1.0, 5.0, 1.0]) + torch.tensor([0.0, 3.0, 0.0])
    matrix = torch.tensor([[0.5, -0.2, 0.1], [0.1, 0.02, -0.03], [1.0, 0.3, -0.5]])
    return inputs, inputs @ matrix + NOISE * torch.randn(1500, 3), matrix


def test_the_ensemble_learns_a_linear_system_and_its_noise(linear) -> None:
    inputs, targets, matrix = linear
    ensemble = DynamicsEnsemble(2, 1, TINY)
    train = DynamicsTraining(ensemble, TINY)
    first, second = train(inputs, targets), train(inputs, targets)
    assert (
        first > second > TINY.patience
    )  # the second training starts with the weights of the first
    loc, log_var = ensemble(inputs.expand(3, -1, -1))
    assert (loc - inputs @ matrix).square().mean((1, 2)).max() < 0.1 * NOISE.square().mean()
    torch.testing.assert_close((0.5 * log_var).exp().mean((0, 1)), NOISE, rtol=0.25, atol=0)
    following, reward = ensemble.step(inputs[:1000, :2], inputs[:1000, 2:])
    change = torch.cat([reward, following - inputs[:1000, :2]], -1)
    deviations = (change - inputs[:1000] @ matrix).square().mean(0).sqrt()
    torch.testing.assert_close(deviations, NOISE, rtol=0.25, atol=0)


def test_networks_of_the_ensemble_are_separate(linear) -> None:
    inputs, _, _ = linear
    ensemble = DynamicsEnsemble(2, 1, TINY)
    loc, log_var = ensemble(inputs.expand(3, -1, -1))
    assert loc.shape == log_var.shape == (3, 1500, 3)
    assert not torch.allclose(loc[0], loc[1])
    chosen = torch.tensor([2, 0])
    torch.testing.assert_close(ensemble(inputs.expand(2, -1, -1), chosen)[0], loc[chosen])
    loc[1].sum().backward()
    gradient = ensemble.layers[0].weight.grad
    assert gradient[1].any()
    assert not gradient[[0, 2]].any()


def test_the_elites_are_the_best_on_held_out_transitions(linear, monkeypatch) -> None:
    inputs, targets, _ = linear
    sizes = MBPOSizes(members=5, elites=2, width=16, batch=32)
    ensemble = DynamicsEnsemble(2, 1, sizes)
    errors = torch.tensor([3.0, 1.0, 5.0, 0.5, 2.0])
    monkeypatch.setattr(ensemble, "errors", lambda *_: errors)
    DynamicsTraining(ensemble, sizes)(inputs, targets)
    assert ensemble.elites.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("losses", "epochs"),
    [
        ([1.0] * 20, 7),  # the first epoch improves on nothing; then six without improvement
        ([1.0, 0.995] * 20, 7),  # less than 1 %
        ([1.0, 1.0, 0.98, *[0.98] * 20], 9),
        ([1.0, 0.9, 0.8, 0.7, *[0.7] * 20], 10),
    ],
)
def test_the_training_stops_after_six_epochs_without_improvement(
    linear, monkeypatch, losses, epochs
) -> None:
    inputs, targets, _ = linear
    ensemble = DynamicsEnsemble(2, 1, TINY)
    remaining = iter(losses)
    # One network that improves is enough to go on.
    monkeypatch.setattr(ensemble, "errors", lambda *_: torch.tensor([1.0, 1.0, next(remaining)]))
    assert DynamicsTraining(ensemble, TINY)(inputs, targets) == epochs


def test_each_network_keeps_its_best_weights(linear, monkeypatch) -> None:
    inputs, targets, _ = linear
    ensemble = DynamicsEnsemble(2, 1, TINY)
    seen: list[Tensor] = []
    losses = iter([[1.0, 1.0, 1.0], [0.5, 2.0, 1.0], *[[1.0, 2.0, 2.0]] * 20])

    def errors(*_: Tensor) -> Tensor:
        seen.append(ensemble.layers[0].weight.detach().clone())
        return torch.tensor(next(losses))

    monkeypatch.setattr(ensemble, "errors", errors)
    DynamicsTraining(ensemble, TINY)(inputs, targets)
    torch.testing.assert_close(
        ensemble.layers[0].weight.detach(), torch.stack([seen[1][0], seen[0][1], seen[0][2]])
    )


def test_counts_are_the_published_ones(monkeypatch) -> None:
    sizes = MBPO_SIZES["halfcheetah"]
    assert (sizes.members, sizes.elites, sizes.width, sizes.batch) == (7, 5, 200, 256)
    assert sizes.starts / sizes.every == 400
    assert sizes.updates == 40
    inputs = torch.zeros(5000, 23)
    kept, held = split(inputs, torch.zeros(5000, 18))
    assert (len(kept[0]), len(held[0])) == (4000, 1000)
    assert len(split(torch.zeros(50_000, 1), torch.zeros(50_000, 1))[1][0]) == 5000
    ensemble = DynamicsEnsemble(17, 6, sizes)
    assert [tuple(layer.weight.shape) for layer in ensemble.layers] == [
        (7, 23, 200), *[(7, 200, 200)] * 3, (7, 200, 36)
    ]  # fmt: skip
    train = DynamicsTraining(ensemble, sizes)
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(ensemble, "loss", lambda rows, _: record(calls, rows, ensemble))
    train.epoch(inputs, torch.zeros(5000, 18), torch.zeros(7, 4000, dtype=torch.long))
    assert calls == [(7, 256, 23)] * 15 + [(7, 160, 23)]


def record(calls: list[tuple[int, ...]], rows: Tensor, ensemble: DynamicsEnsemble) -> Tensor:
    calls.append(tuple(rows.shape))
    return ensemble.max_log_var.sum()


def test_imagined_transitions_go_into_their_own_buffer() -> None:
    task = TASKS["halfcheetah"]
    spec = Bounded(-1.0, 1.0, (task.actions,))
    actor, _ = make_loss(SACLoss, task.observations, spec)
    transitions = windows(task, (100,), torch.device("cpu"))
    work = MBPOWork(actor, transitions, TINY)
    work.imagine()
    work.imagine()
    assert len(work.imagined) == 2 * TINY.starts
    stored = work.imagined[:]
    assert stored["next", "observation"].shape == (80, 17)
    assert (stored["action"].abs() <= 1).all()
    known = {tuple(row.tolist()) for row in transitions["observation"]}
    assert all(tuple(row.tolist()) in known for row in stored["observation"])
    weight = work.training.ensemble.layers[0].weight.detach().clone()
    work.epoch(60)()
    assert not torch.equal(weight, work.training.ensemble.layers[0].weight)


def test_targets_are_reward_and_change_of_the_observation() -> None:
    transitions = windows(TASKS["halfcheetah"], (5,), torch.device("cpu"))
    inputs, targets = regression_data(transitions)
    torch.testing.assert_close(inputs[:, :17], transitions["observation"])
    torch.testing.assert_close(targets[:, :1], transitions["next", "reward"])
    torch.testing.assert_close(inputs[:, :17] + targets[:, 1:], transitions["next", "observation"])


def test_epochs_are_counted_on_real_transitions(monkeypatch) -> None:
    trained: list[int] = []
    train = DynamicsTraining.__call__

    def counted(self: DynamicsTraining, inputs: Tensor, targets: Tensor) -> int:
        trained.append(len(inputs))
        return train(self, inputs, targets)

    monkeypatch.setattr(mbpo.DynamicsTraining, "__call__", counted)
    line, content = count_epochs("halfcheetah", (100, 200), TINY, trainings=2)
    assert trained == [100, 150, 200, 200, 250, 300]
    assert set(content["epochs"]) == {"100", "200"}
    counts = content["epochs"]["200"]
    assert len(counts["further"]) == 2
    assert min(counts["first"], *counts["further"]) >= 7
    assert f"200 transitions: {counts['first']} epochs of a new ensemble" in line

"""Categorical rewards and values: encoding, prediction, cross-entropy, layers and keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from alm_torchrl.modules import QValueEnsemble, RewardModel, TwoHot
from alm_torchrl.modules.rebuildable import describe, rebuild

LATENT, ACT, HIDDEN = 4, 2, 8
TARGETS = torch.tensor([-30_000.0, -7.3, -0.2, 0.0, 1e-3, 1.0, 5.5, 900.0, 30_000.0]).double()


def symlog(value: float) -> float:
    return math.copysign(math.log(1 + abs(value)), value)


@pytest.mark.parametrize(("bins", "limit"), [(101, 10.0), (41, 8.0), (2, 3.0), (255, 20.0)])
def test_encoding_is_the_definition(bins: int, limit: float) -> None:
    two_hot = TwoHot(bins, limit)
    weights = two_hot.encode(TARGETS)
    step = 2 * limit / (bins - 1)
    for target, found in zip(TARGETS.tolist(), weights.tolist(), strict=True):
        position = (min(max(symlog(target), -limit), limit) + limit) / step
        below = min(int(position), bins - 2)
        wanted = [0.0] * bins
        wanted[below], wanted[below + 1] = 1 - (position - below), position - below
        assert found == pytest.approx(wanted, abs=1e-9)


def test_prediction_is_the_definition() -> None:
    two_hot = TwoHot(bins=5, limit=3.0)
    logits = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row, found in zip(logits.reshape(-1, 5), two_hot.decode(logits).flatten(), strict=True):
        weights = [math.exp(x) for x in row.tolist()]
        mean = sum(w * b for w, b in zip(weights, (-3, -1.5, 0, 1.5, 3), strict=True)) / sum(
            weights
        )
        assert found.item() == pytest.approx(math.copysign(math.exp(abs(mean)) - 1, mean))


def test_prediction_inverts_the_encoding() -> None:
    two_hot = TwoHot()
    logits = two_hot.encode(TARGETS).log()
    torch.testing.assert_close(two_hot.decode(logits)[1:-1], TARGETS[1:-1], rtol=1e-9, atol=1e-9)
    largest = math.exp(10) - 1
    assert two_hot.decode(logits)[[0, -1]].tolist() == pytest.approx([-largest, largest])


def test_loss_is_the_cross_entropy_with_the_two_hot_target() -> None:
    two_hot = TwoHot(bins=21, limit=4.0)
    logits = torch.randn(9, 3, 21, dtype=torch.float64)
    target = TARGETS.unsqueeze(-1)
    found = two_hot.loss(logits, target)
    wanted = F.cross_entropy(
        logits.reshape(-1, 21),
        two_hot.encode(target.expand(9, 3)).reshape(-1, 21),
        reduction="none",
    )
    torch.testing.assert_close(found, wanted.reshape(9, 3))


def test_loss_is_smallest_at_the_target() -> None:
    two_hot = TwoHot()
    logits = nn.Parameter(torch.zeros(7, 1, 101, dtype=torch.float64))
    target = TARGETS[1:-1].unsqueeze(-1)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(400):
        optimizer.zero_grad()
        two_hot.loss(logits, target).sum().backward()
        optimizer.step()
    torch.testing.assert_close(two_hot.decode(logits.detach()), target, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("options", "found"), [({"bins": 1}, "bins=1"), ({"limit": 0.0}, "limit=0")]
)
def test_invalid_bins(options: dict[str, float], found: str) -> None:
    with pytest.raises(ValueError, match=f"at least 2 bins and a finite limit > 0, got .*{found}"):
        TwoHot(**options)


@pytest.mark.parametrize("shape", [(3,), (3, 2), ()])
@pytest.mark.parametrize("key", ["out", ("nested", "out")])
def test_networks_write_logits_and_predictions(
    shape: tuple[int, ...], key: str | tuple[str, str]
) -> None:
    two_hot = TwoHot(bins=HIDDEN)  # as many bins as hidden units
    inputs = {"latent": torch.randn(*shape, LATENT), "action": torch.randn(*shape, ACT)}
    networks = (
        RewardModel(LATENT, ACT, HIDDEN, two_hot=two_hot, out_key=key),
        QValueEnsemble(LATENT, ACT, HIDDEN, two_hot=two_hot, num_networks=3, out_key=key),
    )
    for network, size in zip(networks, (1, 3), strict=True):
        logits, values = network(**inputs)
        assert network.out_keys == [
            "out_logits" if key == "out" else ("nested", "out_logits"), key
        ]  # fmt: skip
        assert logits.shape == (*shape, size, HIDDEN)
        assert values.shape == (*shape, size)
        assert values.abs().max() < 1e-6  # predictions start at zero
        hidden = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][:2]
        assert all(layer.weight.abs().max() > 0.1 for layer in hidden)
        for parameter in network.parameters():
            parameter.data += torch.randn_like(parameter)
        logits, values = network(**inputs)
        torch.testing.assert_close(values, two_hot.decode(logits))
        assert values.abs().max() > 0.01


def test_each_value_has_bins_of_its_own() -> None:
    network = QValueEnsemble(LATENT, ACT, HIDDEN, two_hot=TwoHot(bins=5))
    for parameter in network.parameters():
        parameter.data += torch.randn_like(parameter)
    logits, values = network(latent=torch.randn(6, LATENT), action=torch.randn(6, ACT))
    assert not torch.allclose(values[:, 0], values[:, 1])
    (logits[:, 0].sum() + values[:, 0].sum()).backward()
    first, second = ([*member.parameters()] for member in network.module.network)
    assert all(parameter.grad.abs().sum() > 0 for parameter in first)
    assert all(parameter.grad.abs().sum() == 0 for parameter in second)


def test_a_saved_network_is_rebuilt() -> None:
    network = RewardModel(LATENT, ACT, HIDDEN, two_hot=TwoHot(bins=7, limit=2.0))
    again = rebuild(describe(network))
    assert again.two_hot == TwoHot(bins=7, limit=2.0)
    again.load_state_dict(network.state_dict())

"""Episodes that end in imagination: the continuation model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives.utils import ValueEstimators

from alm_torchrl.modules import ContinuationModel
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.objectives.functional import k_step_bound, lambda_returns

Make = Callable[..., Any]
GAMMA, LMBDA, COEFF = torch.tensor([0.99, 0.95, 0.1]).tolist()  # as the loss rounds them


@pytest.fixture
def make(make_loss: Make, make_networks: Make) -> Make:
    """A loss with a continuation model whose probabilities are far from one."""

    def build(**options: Any) -> ALMLoss:
        networks = make_networks()
        torch.manual_seed(3)
        networks["continuation_model"] = ContinuationModel(4, 8)
        return make_loss(networks=networks, **options)

    return build


def ended(td: TensorDict) -> TensorDict:
    """The batch with a termination in the first row and a time limit in the second."""
    td["next", "done"][0, 0] = td["next", "terminated"][0, 0] = True
    td["next", "done"][1, 0] = True
    return td


def hand_returns(reward: Tensor, value: Tensor, d: Tensor, lmbda: float = LMBDA) -> Tensor:
    """Returns ``[B, K]`` as a mixture of n-step returns, each written out."""
    steps = reward.shape[1]
    out = []
    for start in range(steps):
        total, n_step = torch.zeros_like(reward[:, 0]), []
        alive = torch.ones_like(total)
        for n in range(start, steps):
            total = total + GAMMA ** (n - start) * alive * reward[:, n]
            alive = alive * d[:, n]
            n_step.append(total + GAMMA ** (n - start + 1) * alive * value[:, n])
        weights = [(1 - lmbda) * lmbda**i for i in range(len(n_step) - 1)]
        weights.append(1 - sum(weights))
        out.append(sum(w * g for w, g in zip(weights, n_step, strict=True)))
    return torch.stack(out, 1)


def test_lambda_returns_are_mixtures_of_n_step_returns() -> None:
    generator = torch.Generator().manual_seed(0)
    reward, value, d = torch.rand(3, 7, 5, 1, generator=generator, dtype=torch.float64)
    found = lambda_returns(reward, value, d, torch.tensor(GAMMA, dtype=torch.float64), LMBDA)
    expected = hand_returns(*(x.squeeze(-1) for x in (reward, value, d)))
    torch.testing.assert_close(found.squeeze(-1), expected, rtol=1e-10, atol=0)


def test_the_bound_counts_a_step_if_it_is_reached() -> None:
    generator = torch.Generator().manual_seed(0)
    reward, d = torch.rand(2, 7, 4, 1, generator=generator, dtype=torch.float64)
    value = torch.rand(7, 1, generator=generator, dtype=torch.float64)
    gamma = torch.tensor(GAMMA, dtype=torch.float64)
    expected, alive = torch.zeros(7, 1, dtype=torch.float64), torch.ones(7, 1).double()
    for t in range(4):
        expected += GAMMA**t * alive * reward[:, t]
        alive = alive * d[:, t]
    expected += GAMMA**4 * alive * value
    torch.testing.assert_close(k_step_bound(reward, value, gamma, d), expected)
    never = torch.ones_like(d)
    torch.testing.assert_close(
        k_step_bound(reward, value, gamma, never), k_step_bound(reward, value, gamma)
    )


def test_the_continuation_loss_is_the_cross_entropy_of_terminations(
    make: Make, make_windows: Make
) -> None:
    loss, td = make(), ended(make_windows())
    z = loss.encode(td[:, 0])
    following = loss.encode(td["next"][:, 0])
    logit = loss.continuation(z, td["action"][:, 0], following).squeeze(-1)
    p = logit.sigmoid()
    expected = torch.cat([-(1 - p[:1]).log(), -p[1:].log()]).mean()  # a time limit continues
    found, _ = loss.continuation_loss(td)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(loss(td)["loss_continuation"], expected, rtol=1e-8, atol=0)


def test_the_actor_is_paid_for_steps_that_are_reached(make: Make, make_windows: Make) -> None:
    loss, td = make(horizon=3), ended(make_windows())
    rollout = loss.imagine(loss.encode(td[:, 0]))
    d = rollout["continuation"].squeeze(-1)
    assert 0.05 < d.min() < d.max() < 0.95
    reward = (rollout["reward"] + COEFF * rollout["log_ratio"]).squeeze(-1)
    returns = hand_returns(reward, rollout["next", "value"].squeeze(-1), d)
    alive = torch.stack([torch.ones_like(d[:, 0]), d[:, 0], d[:, 0] * d[:, 1]], 1).detach()
    weights = GAMMA ** torch.arange(3, dtype=torch.float64)
    expected = -(weights * alive * returns).mean()
    found, _ = loss.actor_loss(td)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
    parameters = list(loss.actor_params.parameters())
    for one, other in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_each_loss_trains_its_own_networks(make: Make, make_windows: Make) -> None:
    loss = make()
    owners = {
        "loss_world_model": {"encoder_params", "dynamics_params"},
        "loss_reward": {"reward_model_params"},
        "loss_classifier": {"classifier_params"},
        "loss_value": {"qvalue_network_params"},
        "loss_actor": {"actor_params"},
        "loss_continuation": {"continuation_model_params"},
    }
    assert loss.out_keys == list(owners)
    out = loss(ended(make_windows()))
    for name, expected in owners.items():
        loss.zero_grad()
        out[name].backward(retain_graph=True)
        found = {n.split(".")[0] for n, p in loss.named_parameters() if p.grad is not None}
        assert found == expected, name
    groups = loss.parameter_groups()
    assert groups["continuation"] == list(loss.continuation_model_params.parameters())
    assert sum(map(len, groups.values())) == len(list(loss.parameters()))


def test_no_step_of_td0_looks_past_the_first(make: Make, make_windows: Make) -> None:
    loss = make(horizon=2)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    rollout = loss.imagine(loss.encode(make_windows()[:, 0]))
    reward = rollout["reward"] + COEFF * rollout["log_ratio"]
    expected = reward + GAMMA * rollout["continuation"] * rollout["next", "value"]
    torch.testing.assert_close(loss.lambda_return(rollout), expected)


def test_without_a_continuation_model_there_is_none_to_train(
    make_loss: Make, make_windows: Make
) -> None:
    loss, td = make_loss(), make_windows()
    assert "loss_continuation" not in loss.out_keys
    assert "continuation" not in loss.parameter_groups()
    with pytest.raises(ValueError, match="give ALMLoss a continuation_model"):
        loss.continuation_loss(td)


@pytest.mark.slow
def test_compiled_terms_equal_eager_ones(make: Make, make_windows: Make) -> None:
    loss, td = make(dtype=torch.float64), ended(make_windows())
    for term in (loss.continuation_loss, loss.actor_loss):
        eager = term(td)[0]
        compiled = torch.compile(term, fullgraph=True, backend="aot_eager")(td)[0]
        torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=0)

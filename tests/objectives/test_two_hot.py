"""ALMLoss with categorical rewards and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch._dynamo.testing import CompileCounterWithBackend

from alm_torchrl.agent import AgentConfig, ALMAgent
from alm_torchrl.modules import QValueEnsemble, RewardModel, TwoHot
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.objectives.functional import td_target
from alm_torchrl.training.seeds import StackedLoss

Make = Callable[..., Any]
LATENT, ACT, HIDDEN, BINS = 4, 2, 8, 11


@pytest.fixture
def loss(make_networks: Make, make_loss: Make) -> ALMLoss:
    torch.manual_seed(0)
    networks = make_networks() | {
        "reward_model": RewardModel(LATENT, ACT, HIDDEN, two_hot=TwoHot(BINS, 3.0)),
        "qvalue_network": QValueEnsemble(LATENT, ACT, HIDDEN, two_hot=TwoHot(BINS, 4.0)),
    }
    return make_loss(networks=networks, reduction="none")


def cross_entropy(logits: torch.Tensor, target: torch.Tensor, limit: float) -> torch.Tensor:
    """The loss written as loops over samples and bins."""
    bins = torch.linspace(-limit, limit, BINS, dtype=torch.float64)
    losses = torch.zeros(logits.shape[:-1], dtype=torch.float64)
    for index in torch.cartesian_prod(*map(torch.arange, losses.shape)):
        where = tuple(index.tolist())
        y = target[where[0], 0]
        scaled = torch.sign(y) * torch.log1p(y.abs())
        below = int(torch.searchsorted(bins, scaled, right=True)) - 1
        upper = (scaled - bins[below]) / (bins[below + 1] - bins[below])
        log_probabilities = logits[where] - logits[where].logsumexp(-1)
        losses[where] = -((1 - upper) * log_probabilities[below])
        losses[where] -= upper * log_probabilities[below + 1]
    return losses


def first_logits(loss: ALMLoss, name: str, latent: torch.Tensor, action: torch.Tensor) -> Any:
    return getattr(loss, name)(TensorDict(latent=latent, action=action, batch_size=[len(latent)]))


def test_losses_are_cross_entropies(loss: ALMLoss, make_windows: Make) -> None:
    windows = make_windows()
    windows["next", "terminated"][2, 0] = windows["next", "done"][2, 0] = True
    first, reward = windows[:, 0], windows["next", "reward"][:, 0]
    latent, action = loss.encode(first), first["action"]

    logits = first_logits(loss, "reward_model", latent, action)["predicted_reward_logits"]
    found, _ = loss.reward_loss(windows)
    torch.testing.assert_close(found, cross_entropy(logits, reward, 3.0)[:, 0])

    following = loss.encode(first["next"])
    value = loss.value(following, loss.act(following), loss.target_qvalue_network_params)
    ended = first["next", "terminated"]
    target = td_target(reward, ended, value, loss.value_estimator.gamma)
    output = first_logits(loss, "qvalue_network", latent, action)
    found, metrics = loss.value_loss(windows)
    wanted = cross_entropy(output["state_action_value_logits"], target, 4.0).mean(-1)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(metrics["q_value"], output["state_action_value"].mean().detach())
    torch.testing.assert_close(metrics["target_value"], target.mean())


def test_all_terms_read_rewards_and_values_in_their_units(
    loss: ALMLoss, make_windows: Make
) -> None:
    """The world model and the actor use the predictions, with a gradient through the bins."""
    windows = make_windows()
    rollout = loss.world_model_rollout(windows)
    latent, action = rollout["latent"], windows["action"]
    step = TensorDict(latent=latent, action=action, batch_size=windows.shape)
    written = loss.reward_model(step)
    torch.testing.assert_close(rollout["reward"], written["predicted_reward"])
    decoded = TwoHot(BINS, 3.0).decode(written["predicted_reward_logits"])
    torch.testing.assert_close(rollout["reward"], decoded)
    assert loss.value(latent[:, 0], action[:, 0]).shape == (6, 1)
    for name, group in {"world_model": "world_model", "actor": "actor"}.items():
        term, _ = getattr(loss, f"{name}_loss")(windows)
        gradients = torch.autograd.grad(term.sum(), loss.parameter_groups()[group])
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert sum(gradient.abs().sum() for gradient in gradients) > 0


def test_a_reward_model_with_bins_learns_the_reward(loss: ALMLoss, make_windows: Make) -> None:
    windows = make_windows(16)
    params = loss.parameter_groups()["reward"]
    optimizer = torch.optim.Adam(params, lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        loss.reward_loss(windows)[0].sum().backward()
        optimizer.step()
    first = windows[:, 0]
    predicted = loss.reward(loss.encode(first), first["action"])
    assert (predicted - first["next", "reward"]).abs().mean() < 0.05


def test_a_compiled_loss_equals_the_eager_one(loss: ALMLoss, make_windows: Make) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    windows = make_windows()
    for term in (loss.reward_loss, loss.value_loss):
        compiled = torch.compile(term, backend=counter, fullgraph=True)
        torch.testing.assert_close(compiled(windows)[0], term(windows)[0])
    torch._dynamo.reset()


def test_stacked_losses_equal_single_ones(make_windows: Make) -> None:
    two_hot = TwoHot(BINS, 3.0)
    kwargs = {name: {"two_hot": two_hot} for name in ("reward_model", "qvalue_network")}
    config = AgentConfig(
        {"observation": 5}, (-1.0,) * ACT, (1.0,) * ACT, latent_dim=LATENT, hidden_dim=HIDDEN,
        dynamics_hidden_dim=HIDDEN, network_kwargs=kwargs,
    )  # fmt: skip
    agents = [ALMAgent(config) for _ in range(2)]
    for agent in agents:
        for parameter in agent.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    losses = [ALMLoss(**agent.networks()) for agent in agents]
    for one in losses:
        one.deterministic_sampling_mode = one.deterministic_sampling_mode.DETERMINISTIC
        one.generated_rows = lambda step: torch.arange(len(step["latent"])) < 3
    windows = torch.stack([make_windows(seed=seed, dtype=torch.float32) for seed in (1, 2)])
    apart = [one(batch) for one, batch in zip(losses, windows, strict=True)]
    together = StackedLoss(losses)(windows)
    for key in losses[0].out_keys:
        wanted = torch.stack([one[key] for one in apart])
        torch.testing.assert_close(together[key], wanted, rtol=1e-4, atol=1e-5)


def test_a_saved_agent_keeps_its_bins(tmp_path: Any) -> None:
    config = AgentConfig(
        {"observation": 5}, (-1.0,) * ACT, (1.0,) * ACT, latent_dim=LATENT, hidden_dim=HIDDEN,
        network_kwargs={"reward_model": {"two_hot": TwoHot(bins=7)}},
    )  # fmt: skip
    ALMAgent(config).save(tmp_path / "agent.pt")
    assert ALMAgent.load(tmp_path / "agent.pt").reward_model.two_hot == TwoHot(bins=7)

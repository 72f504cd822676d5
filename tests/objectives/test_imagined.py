"""Imagined episodes as training data for the policy and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from alm_torchrl.modules import ContinuationModel, LatentDynamics
from alm_torchrl.objectives import ALMLoss, ImaginedReplay
from alm_torchrl.objectives.functional import lambda_returns, survival
from alm_torchrl.training import StackedLoss

Make = Callable[..., Any]
GAMMA, LMBDA = torch.tensor([0.99, 0.95]).tolist()  # as the loss rounds them


@pytest.fixture
def make(make_loss: Make, make_networks: Make) -> Make:
    """A loss with a continuation model that always predicts one logit."""

    def build(logit: float = 0.0, **options: Any) -> ALMLoss:
        networks = make_networks()
        networks["continuation_model"] = ContinuationModel(4, 8)
        loss = make_loss(networks=networks, **options)
        for parameter in loss.continuation_model_params.parameters():
            parameter.data.zero_()
        parameter.data.fill_(logit)
        return loss

    return build


def with_imagined(windows: TensorDict, dtype: torch.dtype = torch.float64) -> TensorDict:
    """The batch with steps of imagined episodes, different in every row."""
    generator = torch.Generator().manual_seed(4)
    steps = {
        name: torch.randn(6, 1, size, generator=generator, dtype=dtype).expand(6, 3, size)
        for name, size in (("latent", 4), ("action", 2), ("value_target", 1))
    }
    return windows.set("imagined", TensorDict(steps, batch_size=[6, 3]))


@pytest.mark.parametrize("with_model", [False, True])
def test_episodes_that_do_not_end(
    make: Make, make_loss: Make, make_windows: Make, with_model: bool
) -> None:
    loss, td = make(50.0) if with_model else make_loss(), make_windows()
    episodes = loss.imagine_episodes(td, 5)
    assert episodes.shape == (6, 5)
    latent, rewards, values = loss.encode(td[:, 0]), [], []
    for t in range(5):
        action = loss.act(latent)
        torch.testing.assert_close(episodes["latent"][:, t], latent)
        torch.testing.assert_close(episodes["action"][:, t], action)
        rewards.append(loss.reward(latent, action))
        latent, _ = loss.next(latent, action)
        values.append(loss.value(latent, loss.act(latent), loss.target_qvalue_network_params))
    reward, value = torch.stack(rewards, 1), torch.stack(values, 1)
    gamma = torch.tensor(GAMMA, dtype=torch.float64)
    expected = lambda_returns(reward, value, torch.ones_like(reward), gamma, LMBDA)
    torch.testing.assert_close(episodes["value_target"], expected)
    assert not episodes["value_target"].requires_grad


def test_an_episode_that_ends_is_followed_by_another(make: Make, make_windows: Make) -> None:
    loss, td = make(-50.0), make_windows()
    episodes = loss.imagine_episodes(td, 4)
    starts = loss.encode(td[:, 0])
    distance = (episodes["latent"].unsqueeze(2) - starts).abs().amax(-1).amin(-1)
    assert distance.max() < 1e-12  # every step is the first of an episode
    reward = loss.reward(episodes["latent"], episodes["action"])
    torch.testing.assert_close(episodes["value_target"], reward)
    torch.testing.assert_close(episodes["action"], loss.act(episodes["latent"]))


def test_episodes_end_with_the_probability_of_the_model(make: Make, make_windows: Make) -> None:
    loss, td = make(1.0), make_windows(batch=400)
    torch.manual_seed(0)
    episodes = loss.imagine_episodes(td, 3)
    starts = loss.encode(td[:, 0])
    distance = (episodes["latent"][:, 1:].unsqueeze(2) - starts).abs().amax(-1).amin(-1)
    ended = float((distance < 1e-12).double().mean())
    assert ended == pytest.approx(1 - torch.tensor(1.0).sigmoid().item(), abs=0.064)  # 4 deviations


def test_policy_and_values_train_on_imagined_steps(make: Make, make_windows: Make) -> None:
    loss, td = make(1.0), with_imagined(make_windows())
    td["next", "done"][0, 0] = True
    steps = td["imagined"][:, 0]
    values = loss.action_values(steps["latent"], steps["action"])
    expected = (values - steps["value_target"]).square().mean()
    torch.testing.assert_close(loss.value_loss(td)[0], expected)
    rollout = loss.imagine(steps["latent"])
    weights = GAMMA ** torch.arange(3, dtype=torch.float64)[:, None]
    weights = weights * survival(rollout["continuation"].detach())[:, :-1]
    expected = -(weights * loss.lambda_return(rollout)).mean()
    torch.testing.assert_close(loss.actor_loss(td)[0], expected)
    out, plain = loss(td), loss(td.exclude("imagined"))
    assert out.keys() == plain.keys()
    for name in ("loss_world_model", "loss_reward", "loss_continuation"):
        torch.testing.assert_close(out[name], plain[name])


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_the_mask_of_the_windows_does_not_apply(
    make: Make, make_windows: Make, reduction: str
) -> None:
    loss, td = make(1.0, reduction=reduction), with_imagined(make_windows())
    td["validity_mask"] = torch.zeros(6, 3, dtype=torch.bool)
    steps = td["imagined"][:, 0]
    values = loss.action_values(steps["latent"], steps["action"])
    errors = (values - steps["value_target"]).square().mean(-1)
    expected = errors if reduction == "none" else errors.sum()
    torch.testing.assert_close(loss.value_loss(td)[0], expected)


def test_weights_are_refused(make: Make, make_windows: Make) -> None:
    td = with_imagined(make_windows())
    td["priority_weight"] = torch.ones(6, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="no importance weights and priorities: sample uniformly"):
        make()(td)
    make(use_prioritized_weights=False)(td)


def test_residual_dynamics_predict_a_change() -> None:
    dynamics = LatentDynamics(4, 2, 8, residual=True)
    plain = LatentDynamics(4, 2, 8)
    plain.network.load_state_dict(dynamics.network.network.state_dict())
    step = TensorDict({"latent": torch.randn(3, 4), "action": torch.rand(3, 2)}, batch_size=[3])
    found, change = (model.get_dist(step.clone()) for model in (dynamics, plain))
    raw = plain.network(step["latent"], step["action"])
    loc, scale = plain.head(raw + torch.cat([step["latent"], torch.zeros(3, 4)], -1))
    torch.testing.assert_close(found.mean, loc)
    torch.testing.assert_close(found.stddev, scale)
    torch.testing.assert_close(found.stddev, change.stddev)
    torch.testing.assert_close(found.mean, step["latent"] + change.mean, rtol=0, atol=0.01)


def test_each_loss_trains_its_own_networks(make: Make, make_windows: Make) -> None:
    loss = make(1.0)
    out = loss(with_imagined(make_windows()))
    owners = {"loss_value": "qvalue_network_params", "loss_actor": "actor_params"}
    for name, owner in owners.items():
        loss.zero_grad()
        out[name].backward(retain_graph=True)
        found = {n.split(".")[0] for n, p in loss.named_parameters() if p.grad is not None}
        assert found == {owner}


def test_the_buffer_is_refilled_and_forgets(make: Make, make_windows: Make) -> None:
    loss, calls = make(1.0), []
    imagined = ImaginedReplay(loss, 4, refill=2)

    def play(windows: TensorDict, steps: int) -> TensorDict:
        calls.append(windows.shape)
        entry = torch.full((len(windows), steps, 1), float(len(calls)), dtype=torch.float64)
        return TensorDict({"value_target": entry}, batch_size=[len(windows), steps])

    loss.imagine_episodes = play
    seen = [imagined(make_windows())["imagined", "value_target"] for _ in range(50)]
    assert calls == [(3, 3)] * 25  # 3 episodes of 4 steps are two batches of 6
    assert all(entry.shape == (6, 3, 1) for entry in seen)
    assert seen[0].unique().tolist() == seen[1].unique().tolist() == [1.0]
    newest = torch.cat(seen[-2:]).unique()
    assert newest.min() >= 16
    assert newest.max() <= 25
    assert torch.cat(seen[-20:]).max() == 25


def test_a_state_dict_contains_the_steps(make: Make, make_windows: Make) -> None:
    loss, td = make(1.0), make_windows()
    imagined, other = ImaginedReplay(loss, 4), ImaginedReplay(loss, 4)
    other.load_state_dict(imagined.state_dict())
    imagined(td)
    other.load_state_dict(imagined.state_dict())
    found = []
    for replay in (imagined, other):
        torch.manual_seed(0)
        found.append([replay(td)["imagined"] for _ in range(30)])
    assert all((one == two).all() for one, two in zip(*found, strict=True))


def test_each_seed_has_its_own_episodes(make_loss: Make, make_networks: Make, make_windows: Make):
    networks = [make_networks() for _ in range(2)]
    losses = [make_loss(networks=n, seed=i) for i, n in enumerate(networks)]
    stacked, td = StackedLoss(losses), torch.stack([make_windows(), make_windows(seed=2)])
    windows = ImaginedReplay(stacked, 4)(td)
    assert windows["imagined"].shape == (2, 6, 3)
    for loss, own in zip(losses, stacked.imagine_episodes(td, 4), strict=True):
        first = loss.encode(td[losses.index(loss)][:, 0])
        torch.testing.assert_close(own["latent"][:, 0], first)
    assert stacked(windows)["loss_value"].shape == (2,)


@pytest.mark.parametrize("steps", [0, 1.5])
def test_a_wrong_number_of_steps_is_refused(make: Make, steps: Any) -> None:
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        ImaginedReplay(make(), steps)


@pytest.mark.slow
def test_compiled_terms_equal_eager_ones(make: Make, make_windows: Make) -> None:
    loss, td = make(1.0), with_imagined(make_windows())
    for term in (loss.value_loss, loss.actor_loss):
        eager = term(td)[0]
        compiled = torch.compile(term, fullgraph=True, backend="aot_eager")(td)[0]
        torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=0)

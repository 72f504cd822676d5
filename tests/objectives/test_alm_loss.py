"""ALMLoss: what trains what, keys, masks, reductions, estimators, errors and state."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import ValueEstimators
from torchrl.objectives.value import TDLambdaEstimator

from alm_torchrl.agent import AgentConfig, ALMAgent
from alm_torchrl.modules import (
    LatentDynamics,
    LatentModule,
    MLPEncoder,
    QValueEnsemble,
    RewardModel,
)
from alm_torchrl.modules.networks import LayerNormMLP
from alm_torchrl.objectives import ALMLoss

NETWORKS = {"encoder", "dynamics", "reward_model", "classifier", "qvalue_network", "actor"}
OWN = {
    "loss_world_model": {"encoder", "dynamics"},
    "loss_reward": {"reward_model"},
    "loss_classifier": {"classifier"},
    "loss_value": {"qvalue_network"},
    "loss_actor": {"actor"},
}
TERMS = list(OWN)
METRICS = {
    "kl",
    "prior_entropy",
    "posterior_entropy",
    "latent_spread",
    "classifier_accuracy",
    "q_value",
    "target_value",
    "imagined_reward",
    "imagined_log_ratio",
    "imagined_value",
    "imagined_return",
}
Make = Callable[..., Any]


def term(loss: ALMLoss, name: str, td: TensorDict, seed: int = 0) -> Tensor:
    """One loss by its own method."""
    torch.manual_seed(seed)
    value, _ = getattr(loss, name.removeprefix("loss_") + "_loss")(td)
    return value


def forward(loss: ALMLoss, td: TensorDict, seed: int = 0) -> TensorDict:
    torch.manual_seed(seed)
    return loss(td)


def gradients(loss: ALMLoss, value: Tensor) -> dict[str, Tensor]:
    """The gradient of each parameter, zeros where there is none."""
    names, parameters = zip(*loss.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    zeros = map(torch.zeros_like, parameters)
    return {
        name: zero if g is None else g for name, g, zero in zip(names, found, zeros, strict=True)
    }


def all_losses_and_gradients(loss: ALMLoss, td: TensorDict) -> dict[str, Tensor]:
    out = forward(loss, td).select(*TERMS)
    total = sum(value.sum() for value in out.values())
    return {**out, **gradients(loss, total)}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_differ(found: Tensor, other: Tensor) -> None:
    assert (found - other).abs().max() > 1e-6


# ------------------------------------------------------------------------------ what trains what


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("way", ["forward", "method"])
def test_a_loss_trains_its_own_networks_alone(
    make_loss: Make, make_windows: Make, name: str, way: str
) -> None:
    loss, td = make_loss(deterministic=False), make_windows()
    targets = {n: b.clone() for n, b in loss.named_buffers() if n.startswith("target_")}
    assert len(targets) > 10
    value = forward(loss, td)[name] if way == "forward" else term(loss, name, td)
    value.backward()
    for parameter_name, parameter in loss.named_parameters():
        network = parameter_name.split("_params.")[0]
        assert network in NETWORKS
        if network in OWN[name]:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.any(), parameter_name
        else:
            assert parameter.grad is None or not parameter.grad.any(), parameter_name
    for target_name, target in loss.named_buffers():
        if target_name.startswith("target_"):
            assert not target.requires_grad
            assert target.grad is None
            assert torch.equal(target, targets[target_name])


def test_one_backward_equals_five(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(), make_windows()
    together = gradients(loss, sum(forward(loss, td)[name] for name in TERMS))
    apart = {name: torch.zeros_like(g) for name, g in together.items()}
    for name in TERMS:
        for parameter_name, gradient in gradients(loss, term(loss, name, td)).items():
            apart[parameter_name] += gradient
    assert_same(together, apart)
    assert all(gradient.any() for gradient in together.values())


def test_methods_give_the_losses_and_metrics_of_forward(
    make_loss: Make, make_windows: Make
) -> None:
    loss, td = make_loss(), make_windows()
    out, metrics = forward(loss, td), {}
    for name in TERMS:
        torch.testing.assert_close(term(loss, name, td), out[name])
        torch.manual_seed(0)
        metrics |= getattr(loss, name.removeprefix("loss_") + "_loss")(td)[1]
    assert set(metrics) == METRICS
    for name, value in metrics.items():
        torch.testing.assert_close(value, out[name])


def test_optimizing_the_sum_lowers_what_is_fitted(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(deterministic=False), make_windows(batch=64)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    first = forward(loss, td)
    for seed in range(30):
        out = forward(loss, td, seed)
        optimizer.zero_grad()
        sum(out[name] for name in TERMS).backward()
        optimizer.step()
    last = forward(loss, td)
    for name in ("loss_world_model", "loss_reward", "loss_classifier", "loss_value"):
        assert last[name] < 0.9 * first[name], name


def test_the_policy_outside_shares_the_parameters(make_networks: Make, make_windows: Make) -> None:
    networks = make_networks()
    loss = ALMLoss(**networks)
    SoftUpdate(loss, tau=0.005)
    owned = {id(p) for p in loss.parameters()}
    assert {id(p) for network in networks.values() for p in network.parameters()} == owned
    latent = TensorDict(latent=torch.randn(3, 4), batch_size=[3])
    before = networks["actor"].get_dist(latent).loc.clone()
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    term(loss, "loss_actor", make_windows(dtype=torch.float32)).backward()
    optimizer.step()
    assert_differ(networks["actor"].get_dist(latent).loc, before)


def test_parameter_groups_hold_every_parameter_once(make_loss: Make) -> None:
    loss = make_loss()
    groups = loss.parameter_groups()
    assert list(groups) == ["world_model", "reward", "value", "actor"]
    ids = [id(p) for group in groups.values() for p in group]
    assert sorted(ids) == sorted(id(p) for p in loss.parameters())
    names = {id(p): name.split("_params.")[0] for name, p in loss.named_parameters()}
    assert {names[id(p)] for p in groups["world_model"]} == {"encoder", "dynamics"}
    assert {names[id(p)] for p in groups["reward"]} == {"reward_model", "classifier"}
    assert {names[id(p)] for p in groups["value"]} == {"qvalue_network"}
    assert {names[id(p)] for p in groups["actor"]} == {"actor"}


# ---------------------------------------------------------------------------- the input and output


def test_input_is_left_as_it_was(make_loss: Make, make_windows: Make) -> None:
    loss = make_loss(deterministic=False)
    td = make_windows()
    td["validity_mask"] = torch.ones(6, 3, dtype=torch.bool)
    td["next", "done"][0, 1] = True
    td.lock_()
    kept, before = td.clone(), {key: id(value) for key, value in td.items(True, True)}
    out = forward(loss, td)
    sum(out[name] for name in TERMS).backward()
    assert {key: id(value) for key, value in td.items(True, True)} == before
    for key, value in kept.items(True, True):
        assert torch.equal(td[key], value)
        assert td[key].grad is None


def test_output_is_five_losses_and_detached_metrics(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(deterministic=False), make_windows()
    out = forward(loss, td)
    assert set(out.keys()) == {*TERMS, *METRICS}
    assert loss.out_keys == TERMS
    for name, value in out.items():
        assert value.shape == ()
        assert value.isfinite()
        assert value.requires_grad == (name in TERMS)


def test_extra_entries_are_ignored(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(), make_windows()
    wanted = all_losses_and_gradients(loss, td)
    td["mask"] = torch.zeros(6, 3, dtype=torch.bool)
    td["latent"] = torch.full((6, 3, 4), torch.nan)
    td["collector", "mask"] = torch.zeros(6, 3, dtype=torch.bool)
    assert_same(all_losses_and_gradients(loss, td), wanted)


def test_windows_may_be_longer_than_the_horizon(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(), make_windows(steps=5)
    wanted = all_losses_and_gradients(loss, td[:, :3])
    assert_same(all_losses_and_gradients(loss, td), wanted)


def test_transitions_are_windows_of_one_step(make_loss: Make, make_windows: Make) -> None:
    td = make_windows(steps=1)
    td["next", "terminated"][2] = td["next", "done"][2] = True
    td["validity_mask"] = torch.ones(6, 1, dtype=torch.bool)
    one = make_loss(horizon=1)
    wanted = all_losses_and_gradients(one, td)
    assert_same(all_losses_and_gradients(one, td[:, 0]), wanted)
    three = make_loss(horizon=3)
    for name in TERMS[1:]:
        torch.testing.assert_close(term(three, name, td[:, 0]), term(three, name, td))
    # The world model then has one step to learn from, whatever the horizon.
    torch.testing.assert_close(
        term(three, "loss_world_model", td[:, 0]), term(one, "loss_world_model", td)
    )


def test_transition_losses_read_the_first_step_alone(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(), make_windows()
    td["next", "terminated"][1, 0] = td["next", "done"][1, 0] = True
    other = make_windows(seed=9)
    other[:, 0] = td[:, 0]
    for name in TERMS[1:]:
        wanted = term(loss, name, td[:, 0])
        torch.testing.assert_close(term(loss, name, td), wanted)
        torch.testing.assert_close(term(loss, name, other), wanted)
        torch.testing.assert_close(forward(loss, other)[name], wanted)
    assert_differ(term(loss, "loss_world_model", other), term(loss, "loss_world_model", td))


# ------------------------------------------------------------------------------------------- keys


def test_every_key_can_be_nested(make_loss: Make, make_windows: Make) -> None:
    td = make_windows()
    td["next", "terminated"][0, 1] = td["next", "done"][0, 1] = True
    td["next", "terminated"][5, 0] = td["next", "done"][5, 0] = True
    td["next", "truncated"] = torch.zeros(6, 3, 1, dtype=torch.bool)
    td["next", "truncated"][2, 0] = True
    td["validity_mask"] = torch.ones(6, 3, dtype=torch.bool)
    td["validity_mask"][3, 2:] = False
    plain = make_loss()
    wanted = all_losses_and_gradients(plain, td)
    keys = {
        "observation_key": ("agents", "o"),
        "latent_key": ("deep", "er", "z"),
        "action_key": ("agents", "a"),
    }
    loss = make_loss(keys=keys)
    loss.set_keys(
        reward=("agents", "r"),
        done=("flags", "d"),
        terminated=("flags", "t"),
        truncated=("flags", "l"),
        validity_mask=("window", "valid"),
    )
    nested = TensorDict(
        {
            ("agents", "o"): td["observation"],
            ("agents", "a"): td["action"],
            ("window", "valid"): td["validity_mask"],
            ("next", "agents", "o"): td["next", "observation"],
            ("next", "agents", "r"): td["next", "reward"],
            ("next", "flags", "d"): td["next", "done"],
            ("next", "flags", "t"): td["next", "terminated"],
            ("next", "flags", "l"): td["next", "truncated"],
        },
        batch_size=[6, 3],
    )
    optional = {("window", "valid"), ("next", "flags", "l")}
    assert set(loss.in_keys) == set(nested.keys(True, True)) - optional
    assert_same(all_losses_and_gradients(loss, nested), wanted)


def test_the_batch_may_name_the_action_otherwise(make_loss: Make, make_windows: Make) -> None:
    td = make_windows()
    loss = make_loss()
    wanted = all_losses_and_gradients(loss, td)
    loss.set_keys(action=("behavior", "taken"))
    td["behavior", "taken"] = td.pop("action")
    assert_same(all_losses_and_gradients(loss, td), wanted)
    loss.set_keys(action=None)
    assert loss.tensor_keys.action == "action"


def test_action_key_is_the_actors_by_default(make_loss: Make) -> None:
    loss = make_loss(keys={"action_key": ("b", "u")})
    assert loss.tensor_keys.action == ("b", "u")
    loss.set_keys(action="other")
    loss.set_keys(action=None)
    assert loss.tensor_keys.action == ("b", "u")
    with pytest.raises(ValueError, match="value_key is not an accepted"):
        loss.set_keys(value_key="x")


@pytest.mark.parametrize("steps", [1, 3])
def test_call_by_keyword(make_loss: Make, make_windows: Make, steps: int) -> None:
    loss, td = make_loss(horizon=steps), make_windows(steps=steps)
    torch.manual_seed(0)
    by_name = loss(
        observation=td["observation"],
        action=td["action"],
        next_observation=td["next", "observation"],
        next_reward=td["next", "reward"],
        next_done=td["next", "done"],
        next_terminated=td["next", "terminated"],
    )
    out = forward(loss, td)
    assert len(by_name) == 5
    for name, value in zip(loss.out_keys, by_name, strict=True):
        torch.testing.assert_close(value, out[name])


# -------------------------------------------------------------------------------------- reduction


@pytest.mark.parametrize("short_windows", ["mask", "drop"])
def test_reductions_agree(make_loss: Make, make_windows: Make, short_windows: str) -> None:
    td = make_windows()
    td["next", "done"][4, 0] = td["next", "done"][1, 1] = True
    by_window = forward(make_loss(reduction="none", short_windows=short_windows), td)
    total = forward(make_loss(reduction="sum", short_windows=short_windows), td)
    mean = forward(make_loss(reduction="mean", short_windows=short_windows), td)
    for name in TERMS:
        assert by_window[name].shape == (6,)
        assert by_window[name].requires_grad
        torch.testing.assert_close(total[name], by_window[name].sum())
        dropped = 2 if short_windows == "drop" and name == "loss_world_model" else 0
        torch.testing.assert_close(mean[name], total[name] / (6 - dropped))


def test_rows_of_the_unreduced_losses_are_independent(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(reduction="none"), make_windows()
    loss.generated_rows = lambda state: torch.zeros(len(state), dtype=torch.bool)
    together = forward(loss, td)
    for row in (0, 4):
        alone = forward(loss, td[row : row + 1])
        for name in TERMS:
            torch.testing.assert_close(together[name][row : row + 1], alone[name])


# ------------------------------------------------------------------------------------------ masks


def garbage(kind: str, like: Tensor) -> Tensor:
    if like.dtype == torch.bool:
        return torch.ones_like(like)
    if kind == "random":
        return 1e3 * torch.randn(like.shape, dtype=like.dtype)
    return torch.full_like(like, float(kind))


@pytest.mark.parametrize("kind", ["nan", "inf", "random", "0"])
@pytest.mark.parametrize("cut_by", ["terminated", "done", "validity_mask"])
@pytest.mark.parametrize("short_windows", ["mask", "drop"])
def test_what_follows_an_episode_counts_for_nothing(
    make_loss: Make, make_windows: Make, kind: str, cut_by: str, short_windows: str
) -> None:
    """Anything may stand past the end: every loss and every gradient stays the same."""
    loss, td = make_loss(short_windows=short_windows), make_windows()
    ends = {0: 0, 3: 1, 4: 2}  # window: its last step
    valid = torch.ones(6, 3, dtype=torch.bool)
    for row, last in ends.items():
        if cut_by == "validity_mask":
            valid[row, last + 1 :] = False
        else:
            td["next", "done"][row, last] = True
            td["next", "terminated"][row, last] = cut_by == "terminated"
    if cut_by == "validity_mask":
        td["validity_mask"] = valid
    wanted = all_losses_and_gradients(loss, td)
    torch.manual_seed(5)
    for row, last in ends.items():
        for key in loss.in_keys:
            past = td[key][row, last + 1 :]
            past.copy_(garbage(kind, past))
    assert_same(all_losses_and_gradients(loss, td), wanted)
    for name in (*METRICS, *TERMS):
        assert forward(loss, td)[name].isfinite()


@pytest.mark.parametrize("flag", ["terminated", "truncated"])
def test_every_flag_ends_an_episode(make_loss: Make, make_windows: Make, flag: str) -> None:
    """Data of others marks a seam in one of them alone."""
    loss, td = make_loss(), make_windows()
    td["next", flag] = torch.zeros(6, 3, 1, dtype=torch.bool)
    td["next", flag][2, 1] = True
    found = all_losses_and_gradients(loss, td)
    whole = td.clone()
    whole["next", "done"][2, 1] = True
    assert_same(found, all_losses_and_gradients(loss, whole))
    assert_differ(found["loss_world_model"], term(loss, "loss_world_model", make_windows()))


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("cut_by", ["done", "terminated", "validity_mask"])
def test_a_short_window_counts_as_the_steps_it_has(
    make_loss: Make, make_windows: Make, last: int, cut_by: str
) -> None:
    """It is the loss of a horizon as long as the window, its value on the last latent reached."""
    td = make_windows()
    short = make_loss(horizon=last + 1, reduction="none")
    if cut_by == "validity_mask":
        td["validity_mask"] = torch.ones(6, 3, dtype=torch.bool)
        td["validity_mask"][:, last + 1 :] = False
    else:
        td["next", "done"][:, last] = True
        td["next", "terminated"][:, last] = cut_by == "terminated"
    found = term(make_loss(reduction="none"), "loss_world_model", td)
    torch.testing.assert_close(found, term(short, "loss_world_model", td[:, : last + 1]))
    torch.testing.assert_close(
        make_loss().world_model_rollout(td)["value"],
        short.world_model_rollout(td[:, : last + 1])["value"],
    )


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_terminal_state_has_no_value(make_loss: Make, make_windows: Make, last: int) -> None:
    td = make_windows()
    td["next", "done"][1:3, last] = True
    truncated = term(make_loss(reduction="none"), "loss_world_model", td)
    value = make_loss().world_model_rollout(td)["value"].squeeze(-1)
    assert (value.abs() > 1e-3).all()
    td["next", "terminated"][1, last] = True
    found = term(make_loss(reduction="none"), "loss_world_model", td)
    expected = truncated.clone()
    expected[1] += value[1]
    torch.testing.assert_close(found, expected)
    assert make_loss().world_model_rollout(td)["value"][1] == 0
    authors = make_loss(reduction="none", bootstrap_terminated=True)
    torch.testing.assert_close(term(authors, "loss_world_model", td), truncated)


def test_a_termination_past_the_window_end_does_not_touch_the_value(
    make_loss: Make, make_windows: Make
) -> None:
    """The next episode's termination is not this one's."""
    td = make_windows()
    td["next", "done"][0, 0] = True
    wanted = term(make_loss(), "loss_world_model", td)
    td["next", "done"][0, 2] = td["next", "terminated"][0, 2] = True
    torch.testing.assert_close(term(make_loss(), "loss_world_model", td), wanted)


def test_only_terminations_end_the_value_target(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(reduction="none"), make_windows(steps=1)
    running = term(loss, "loss_value", td)
    td["next", "done"][0] = True
    torch.testing.assert_close(term(loss, "loss_value", td), running)
    td["next", "terminated"][0] = True
    found = term(loss, "loss_value", td)
    assert_differ(found[0], running[0])
    torch.testing.assert_close(found[1:], running[1:])
    latent = target_latent(loss, td["observation"][:, 0])
    values = loss.qvalue_network(latent=latent, action=td["action"][:, 0])
    expected = (values - td["next", "reward"][:, 0]).square().mean(-1)
    torch.testing.assert_close(found[0], expected[0])


def test_short_windows_can_be_dropped(make_loss: Make, make_windows: Make) -> None:
    td = make_windows()
    td["next", "done"][0, 1] = td["next", "done"][5, 0] = True
    td["next", "done"][2, 2] = td["next", "terminated"][2, 2] = True  # a full window all the same
    loss = make_loss(short_windows="drop")
    expected = term(make_loss(), "loss_world_model", td[1:5])
    torch.testing.assert_close(term(loss, "loss_world_model", td), expected)
    for name in TERMS[1:]:
        torch.testing.assert_close(term(loss, name, td), term(make_loss(), name, td))
    td["next", "done"][:, 0] = True
    nothing_left = term(loss, "loss_world_model", td)
    assert nothing_left == 0
    assert not any(g.any() for g in gradients(loss, nothing_left).values())


def test_a_batch_of_one(make_loss: Make, make_windows: Make) -> None:
    out = forward(make_loss(), make_windows(batch=1))
    assert all(value.isfinite() for value in out.values())
    assert out["latent_spread"] == 0


# ---------------------------------------------------------- horizons, against a hand-written loop


def target_latent(loss: ALMLoss, observation: Tensor) -> Tensor:
    state = TensorDict(observation=observation, batch_size=observation.shape[:-1])
    with loss.target_encoder_params.to_module(loss.encoder):
        return loss.encoder.get_dist(state).base_dist.loc


def minimum_q(loss: ALMLoss, z: Tensor, a: Tensor) -> Tensor:
    return loss.qvalue_network(latent=z, action=a).amin(-1, keepdim=True)


def mean_action(loss: ALMLoss, z: Tensor) -> Tensor:
    return loss.actor.get_dist(TensorDict(latent=z, batch_size=z.shape[:-1])).deterministic_sample


def next_mean(loss: ALMLoss, z: Tensor, a: Tensor) -> Tensor:
    state = TensorDict(latent=z, action=a, batch_size=z.shape[:-1])
    return loss.dynamics.get_dist(state).base_dist.loc


def world_model_by_hand(loss: ALMLoss, td: TensorDict, horizon: int) -> Tensor:
    z = loss.encoder.get_dist(td[:, 0]).base_dist.loc
    total = torch.zeros(len(td), 1, dtype=torch.float64)
    for t in range(horizon):
        action = td["action"][:, t]
        step = TensorDict(latent=z, action=action, batch_size=z.shape[:-1])
        prior = loss.dynamics.get_dist(step)
        with torch.no_grad(), loss.target_encoder_params.to_module(loss.encoder):
            target = loss.encoder.get_dist(td["next"][:, t])
        kl = torch.distributions.kl_divergence(prior, target).unsqueeze(-1)
        total = total + kl - loss.reward_model(latent=z, action=action)
        z = prior.base_dist.loc
    return (total - minimum_q(loss, z, mean_action(loss, z).detach())).mean()


def imagined_by_hand(loss: ALMLoss, z: Tensor, horizon: int) -> tuple[list[Tensor], list[Tensor]]:
    """Augmented rewards and values along the mean rollout, without a gradient."""
    rewards, values = [], []
    for _ in range(horizon):
        a = mean_action(loss, z)
        following = next_mean(loss, z, a)
        logits = loss.classifier(latent=z, action=a, next_latent=following)
        ratio = logits[..., 1:] - logits[..., :1]
        rewards.append(loss.reward_model(latent=z, action=a) + loss.consistency_coeff * ratio)
        z = following
        values.append(minimum_q(loss, z, mean_action(loss, z)))
    return rewards, values


def lambda_return_by_hand(
    rewards: list[Tensor], values: list[Tensor], gamma: float, lmbda: float
) -> list[Tensor]:
    returns, following = [], values[-1]
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        following = reward + gamma * ((1 - lmbda) * value + lmbda * following)
        returns.insert(0, following)
    return returns


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_world_model_at_any_horizon(make_loss: Make, make_windows: Make, horizon: int) -> None:
    loss, td = make_loss(horizon=horizon), make_windows(steps=horizon)
    found, wanted = term(loss, "loss_world_model", td), world_model_by_hand(loss, td, horizon)
    torch.testing.assert_close(found, wanted)
    mine, theirs = gradients(loss, found), gradients(loss, wanted)
    for name, gradient in mine.items():
        if name.startswith(("encoder", "dynamics")):
            torch.testing.assert_close(gradient, theirs[name])


@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize(
    ("estimator", "gamma", "lmbda"),
    [
        (None, 0.99, 0.95),
        (ValueEstimators.TDLambda, 0.9, 0.5),
        (ValueEstimators.TD0, 0.9, 0.0),
        (ValueEstimators.TD1, 0.9, 1.0),
        ("td1", 0.8, 1.0),
    ],
)
def test_actor_at_any_horizon_and_with_any_estimator(
    make_loss: Make,
    make_windows: Make,
    horizon: int,
    estimator: ValueEstimators | str | None,
    gamma: float,
    lmbda: float,
) -> None:
    loss, td = make_loss(horizon=horizon), make_windows(steps=1)
    if estimator is not None:
        settings = {"lmbda": lmbda} if estimator is ValueEstimators.TDLambda else {}
        assert loss.make_value_estimator(estimator, gamma=gamma, **settings) is loss
    rewards, values = imagined_by_hand(loss, target_latent(loss, td["observation"][:, 0]), horizon)
    returns = lambda_return_by_hand(rewards, values, gamma, lmbda)
    weighted = torch.stack([gamma**t * r for t, r in enumerate(returns)])
    found = term(loss, "loss_actor", td)
    # The discount and lambda are kept in float32.
    torch.testing.assert_close(found, -weighted.mean(), rtol=1e-6, atol=1e-6)
    out = forward(make_loss(horizon=horizon), make_windows(steps=horizon))
    assert out["loss_actor"].isfinite()


def test_the_discount_reaches_the_value_loss(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(reduction="none"), make_windows()
    for gamma in (0.99, 0.5):
        if gamma != 0.99:
            loss.make_value_estimator(gamma=gamma)
        z, following = (
            target_latent(loss, td["observation"][:, 0]),
            target_latent(loss, td["next", "observation"][:, 0]),
        )
        action = mean_action(loss, following)
        with loss.target_qvalue_network_params.to_module(loss.qvalue_network):
            value = minimum_q(loss, following, action)
        target = (td["next", "reward"][:, 0] + gamma * value).detach()
        values = loss.qvalue_network(latent=z, action=td["action"][:, 0])
        expected = (values - target).square().mean(-1)
        found = term(loss, "loss_value", td)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_an_estimator_of_ones_own(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(), make_windows()
    wanted = term(loss, "loss_actor", td)
    loss.make_value_estimator(
        TDLambdaEstimator(
            gamma=0.99, lmbda=0.95, value_network=None, differentiable=True, vectorized=False
        )
    )
    torch.testing.assert_close(term(loss, "loss_actor", td), wanted)


def test_other_estimators_are_refused(make_loss: Make) -> None:
    with pytest.raises(NotImplementedError, match="TDLambda"):
        make_loss().make_value_estimator(ValueEstimators.GAE)


def test_the_consistency_coefficient_can_be_scheduled(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(consistency_coeff=0.5), make_windows()
    buffer, found = loss.consistency_coeff, {}
    for coeff in (0.5, 0.0, 2.0):
        if coeff != 0.5:
            loss.consistency_coeff = coeff
        assert loss.consistency_coeff is buffer
        found[coeff] = forward(loss, td)
    slope = (found[0.5]["loss_actor"] - found[0.0]["loss_actor"]) / 0.5
    assert slope.abs() > 1e-4
    torch.testing.assert_close(found[2.0]["loss_actor"], found[0.0]["loss_actor"] + 2 * slope)
    for name in TERMS[:4]:
        torch.testing.assert_close(found[2.0][name], found[0.5][name])


# ---------------------------------------------------------------------------------------- metrics


def test_metrics_say_what_their_names_say(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(), make_windows()
    td["next", "done"][2, 0] = True
    out = forward(loss, td)
    rollout = loss.world_model_rollout(td)
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[2, 1:] = False
    torch.testing.assert_close(out["kl"], rollout["kl"].squeeze(-1)[mask].mean())
    torch.testing.assert_close(out["prior_entropy"], rollout["prior_entropy"][mask].mean())
    posterior = loss.encoder.get_dist(td[:, 0])
    torch.testing.assert_close(out["posterior_entropy"], posterior.entropy().mean())
    assert rollout["latent"].shape == (6, 3, 4)
    torch.testing.assert_close(rollout["latent"][:, 0], posterior.base_dist.loc)

    z = target_latent(loss, td["observation"][:, 0])
    values = loss.qvalue_network(latent=z, action=td["action"][:, 0])
    torch.testing.assert_close(out["q_value"], values.mean())
    rewards, values = imagined_by_hand(loss, z, 3)
    torch.testing.assert_close(out["imagined_value"], torch.stack(values).mean())
    augmented = out["imagined_reward"] + loss.consistency_coeff * out["imagined_log_ratio"]
    torch.testing.assert_close(augmented, torch.stack(rewards).mean())
    returns = lambda_return_by_hand(rewards, values, 0.99, 0.95)
    torch.testing.assert_close(out["imagined_return"], returns[0].mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("bias", "accuracy"), [((-50.0, 50.0), 3 / 5), ((50.0, -50.0), 2 / 5)])
def test_accuracy_counts_encoded_latents_as_class_one(
    make_loss: Make, make_windows: Make, bias: tuple[float, float], accuracy: float
) -> None:
    """Of five rows, two are imagined (class 0) and three encoded (class 1)."""
    loss = make_loss()
    with torch.no_grad():
        list(loss.classifier_params.parameters())[-1].copy_(torch.tensor(bias))
        for weight in list(loss.classifier_params.parameters())[:-1]:
            weight.zero_()
    out = forward(loss, make_windows(batch=5))
    assert out["classifier_accuracy"].item() == pytest.approx(accuracy)


# -------------------------------------------------------------------------------- other components


def test_a_single_value_network_and_plain_modules(make_networks: Make, make_windows: Make) -> None:
    class Head(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.linear = nn.LazyLinear(size)

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.linear(torch.cat(inputs, -1))

    networks = make_networks()
    networks["qvalue_network"] = TensorDictModule(
        Head(1), in_keys=["action", "latent"], out_keys=["q"]
    )
    networks["qvalue_network"](latent=torch.zeros(1, 4), action=torch.zeros(1, 2))
    loss = ALMLoss(**networks)
    SoftUpdate(loss, tau=0.005)
    out = forward(loss, make_windows(dtype=torch.float32))
    sum(out[name] for name in TERMS).backward()
    assert all(p.grad is not None and p.grad.any() for p in loss.qvalue_network_params.parameters())


def test_soft_update_moves_both_targets_and_nothing_else(
    make_networks: Make, make_windows: Make
) -> None:
    loss = ALMLoss(**make_networks())
    update = SoftUpdate(loss, tau=0.1)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter += 1
    before = copy.deepcopy(loss.state_dict())
    update.step()
    moved = {k for k, v in loss.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.startswith("target_")}
    assert {k.split("_params")[0] for k in moved} == {"target_encoder", "target_qvalue_network"}
    for name in moved:
        online = before[name.removeprefix("target_")]
        torch.testing.assert_close(loss.state_dict()[name], 0.1 * online + 0.9 * before[name])


# ------------------------------------------------------------------------------------------ state


def test_state_dict_round_trip_is_bit_exact(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(deterministic=False), make_windows()
    loss.actor.noise.advance(30_000)
    loss.consistency_coeff = 0.37
    loss.make_value_estimator(gamma=0.9, lmbda=0.7)
    other = make_loss(seed=7, deterministic=False)
    assert_differ(forward(other, td)["loss_actor"], forward(loss, td)["loss_actor"])
    result = other.load_state_dict(copy.deepcopy(loss.state_dict()), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    found, wanted = forward(other, td), forward(loss, td)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("part", ["loss", "encoder", "layers"])
@pytest.mark.parametrize("saves", ["plain", "compiled"])
def test_a_state_dict_goes_between_compiled_and_plain(
    make_networks: Make, part: str, saves: str
) -> None:
    def build(compiled: bool) -> ALMLoss:
        networks = make_networks()
        if part == "encoder" and compiled:
            networks["encoder"] = torch.compile(networks["encoder"])
        if part == "layers" and compiled:
            networks["encoder"][0].module = torch.compile(networks["encoder"][0].module)
        return ALMLoss(**networks)

    source, other = build(saves == "compiled"), build(saves == "plain")
    state = (
        torch.compile(source) if part == "loss" and saves == "compiled" else source
    ).state_dict()
    names = list(state)
    other.load_state_dict(state)
    assert list(state) == names
    assert len(names) == len(other.state_dict())
    for found, wanted in zip(other.state_dict().values(), state.values(), strict=True):
        assert torch.equal(found, wanted)


def test_the_schedule_is_one_for_policy_and_loss(make_networks: Make, make_windows: Make) -> None:
    networks, td = make_networks(), make_windows(dtype=torch.float32)
    actor = networks["actor"]
    policy, loss = actor.acting(), ALMLoss(**networks)
    SoftUpdate(loss, tau=0.005)
    before = forward(loss, td)
    actor.noise.advance(50_000)
    after = forward(loss, td)
    assert_differ(before["loss_value"], after["loss_value"])
    state = TensorDict(latent=torch.zeros(1, 4), batch_size=[1])
    assert policy(state)["action_scale"].max() == pytest.approx(0.3)
    key = next(k for k in loss.state_dict() if k.endswith("noise.scale"))
    assert loss.state_dict()[key].item() == pytest.approx(0.3)
    # Loading into the loss reaches the policy too.
    saved = copy.deepcopy(loss.state_dict())
    actor.noise.advance(50_000)
    loss.load_state_dict(saved)
    assert actor.noise.scale.item() == pytest.approx(0.3)
    assert actor.noise.step_count.item() == 50_000
    assert policy(state)["action_scale"].max().item() == pytest.approx(0.3)


def copied(networks: nn.ModuleDict, loss: ALMLoss) -> tuple[nn.ModuleDict, ALMLoss]:
    return copy.deepcopy((networks, loss))


def pickled(networks: nn.ModuleDict, loss: ALMLoss) -> tuple[nn.ModuleDict, ALMLoss]:
    return pickle.loads(pickle.dumps((networks, loss)))  # noqa: S301


def saved(networks: nn.ModuleDict, loss: ALMLoss) -> tuple[nn.ModuleDict, ALMLoss]:
    file = io.BytesIO()
    torch.save((networks, loss), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def alone(networks: nn.ModuleDict, loss: ALMLoss) -> tuple[nn.ModuleDict, ALMLoss]:
    other = copy.deepcopy(loss)
    return nn.ModuleDict({name: getattr(other, name) for name in networks}), other


def moved(networks: nn.ModuleDict, loss: ALMLoss) -> tuple[nn.ModuleDict, ALMLoss]:
    return networks, loss.to(torch.float64)


def moved_together(networks: nn.ModuleDict, loss: ALMLoss) -> tuple[nn.ModuleDict, ALMLoss]:
    both = nn.ModuleDict({"networks": networks, "loss": loss}).double()
    return both["networks"], both["loss"]


def moved_after(networks: nn.ModuleDict, loss: ALMLoss) -> tuple[nn.ModuleDict, ALMLoss]:
    return networks.double(), loss.double()


@pytest.mark.parametrize("how", [copied, pickled, saved, alone, moved, moved_together, moved_after])
def test_what_is_shared_stays_shared(make_networks: Make, make_windows: Make, how: Make) -> None:
    """Weights, noise schedule and running statistics, of the networks, the loss and its targets."""
    encoder = MLPEncoder(5, 4, 8, normalize=True)
    networks = nn.ModuleDict({**make_networks(), "encoder": encoder})
    loss = ALMLoss(**networks)
    SoftUpdate(loss, tau=0.005)
    networks["actor"].noise.advance(30_000)
    networks, loss = how(networks, loss)
    for name, network in networks.items():
        for key, tensor in TensorDict.from_module(network).items(True, True):
            shared = getattr(loss, f"{name}_params").get(key)
            assert shared.data_ptr() == tensor.data_ptr(), (name, key)
            assert shared.dtype == tensor.dtype
    assert {id(p) for p in loss.parameters()} == {id(p) for p in networks.parameters()}
    networks["encoder"].update_statistics(TensorDict(observation=100 * torch.rand(50, 5)))
    networks["actor"].noise.advance(20_000)
    dtype = next(loss.parameters()).dtype
    state = TensorDict(observation=torch.zeros(2, 5, dtype=dtype), batch_size=[2])
    assert loss.target_encoder_params.get(("module", "0", "module", "norms", "0", "mean")).min() > 9
    assert loss.state_dict()["actor_params.module.0.module.noise.scale"] == pytest.approx(0.3)
    assert forward(loss, make_windows(dtype=dtype)).isfinite().all()
    assert networks["encoder"](state)["latent"].shape == (2, 4)


def test_a_copy_is_apart_from_the_loss_that_it_was_made_of(make_networks: Make) -> None:
    loss = ALMLoss(**make_networks())
    other = copy.deepcopy(loss)
    other.actor.noise.advance(50_000)
    assert loss.actor.noise.scale == 0.5
    theirs = {tensor.data_ptr() for tensor in other.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in loss.state_dict().values()}


def give_others(networks: dict[str, nn.Module]) -> None:
    state = {key: value.clone() for key, value in networks["actor"].state_dict().items()}
    networks["actor"].load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [lambda networks: networks["actor"].double(), give_others])
def test_networks_that_no_longer_share_are_refused(
    make_networks: Make, make_windows: Make, change: Make
) -> None:
    networks = make_networks()
    loss = ALMLoss(**networks)
    SoftUpdate(loss, tau=0.005)
    change(networks)
    with pytest.raises(RuntimeError, match="move networks with .*, or build the loss later"):
        forward(loss, make_windows(dtype=torch.float32))
    forward(loss.double(), make_windows())


def test_buffers_are_no_parameters(make_loss: Make) -> None:
    """An optimizer must get neither targets nor the noise schedule."""
    loss = make_loss()
    for name, parameter in loss.named_parameters():
        assert parameter.requires_grad
        assert not name.startswith("target_")
        assert "noise" not in name


# ----------------------------------------------------------------------------------------- errors


ENTRIES = [
    "observation",
    "action",
    ("next", "observation"),
    ("next", "reward"),
    ("next", "done"),
    ("next", "terminated"),
]


@pytest.mark.parametrize("key", ENTRIES)
def test_a_missing_entry_is_named(make_loss: Make, make_windows: Make, key: Any) -> None:
    with pytest.raises(KeyError) as caught:
        forward(make_loss(), make_windows().exclude(key))
    message = str(caught.value)
    assert f"entry {key!r} is missing" in message
    assert all(str(other) in message for other in ENTRIES if other != key)


def with_entry(td: TensorDict, key: Any, value: Tensor) -> TensorDict:
    loose = TensorDict(td.to_dict())
    loose.set(key, value)
    return loose


@pytest.mark.parametrize(
    ("key", "shape", "wanted"),
    [
        ("observation", (6, 2, 5), "[6, 3, ...]"),
        ("observation", (6, 3), "[6, 3, ...]"),
        ("action", (6, 2), "[6, 3, ...]"),
        ("action", (3, 6, 2), "[6, 3, ...]"),
        (("next", "observation"), (6, 3, 7), "[6, 3, 5]"),
        (("next", "reward"), (6, 3), "[B, T, 1]"),
        (("next", "reward"), (6, 3, 1, 1), "[B, T, 1]"),
        (("next", "done"), (6, 2), "[6, 3, 1]"),
        (("next", "terminated"), (3, 6), "[6, 3, 1]"),
        (("next", "truncated"), (6,), "[6, 3, 1]"),
        (("next", "terminated"), (6, 3, 2), "[6, 3, 1]"),
        ("validity_mask", (6, 2), "[6, 3]"),
        ("validity_mask", (3, 6), "[6, 3]"),
        ("validity_mask", (6, 3, 2), "[6, 3]"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "value_loss"])
def test_a_wrong_shape_is_named(
    make_loss: Make, make_windows: Make, key: Any, shape: tuple[int, ...], wanted: str, method: str
) -> None:
    like = make_windows().get(key, torch.ones(0, dtype=torch.bool))
    td = with_entry(make_windows(), key, torch.zeros(shape, dtype=like.dtype))
    with pytest.raises(ValueError, match="expected") as caught:
        getattr(make_loss(), method)(td)
    message = str(caught.value)
    assert f"entry {key!r} has shape {shape}" in message
    assert wanted in message


@pytest.mark.parametrize(
    ("key", "size", "message"),
    [
        (
            "observation",
            7,
            r"encoder cannot read 'observation' of shape \(6, 4, 7\); .* up to 5; build",
        ),
        (
            "action",
            3,
            r"dynamics cannot read 'latent' of shape \(6, 4\), 'action' of shape \(6, 3\);"
            r" its first layer expects last sizes that add up to 6; build it",
        ),
    ],
)
def test_a_wrong_size_is_named(
    make_loss: Make, make_windows: Make, key: str, size: int, message: str
) -> None:
    td = make_windows()
    entries = [key, ("next", key)] if key == "observation" else [key]
    for entry in entries:
        td[entry] = torch.zeros(6, 3, size, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        forward(make_loss(), td)


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        (
            "reward_model",
            TensorDictModule(LayerNormMLP(6, 2, 8), ["latent", "action"], ["r"]),
            r"reward_model wrote entry 'r' of shape \(6, 3, 2\); expected \(6, 3, 1\)",
        ),
        (
            "classifier",
            TensorDictModule(
                LayerNormMLP(10, 1, 8), ["latent", "action", ("next", "latent")], ["logits"]
            ),
            r"classifier wrote entry 'logits' of shape \(6, 1\); expected \(6, 2\)",
        ),
        (
            "reward_model",
            RewardModel(5, 2, 8),
            r"reward_model cannot read 'latent' of shape .* up to 7; build",
        ),
        (
            "dynamics",
            LatentModule(
                LayerNormMLP(6, 2, 8), ["latent", "action"], latent_key=("next", "latent")
            ),
            r"the dynamics writes latents of shape \(6, 1, 1\), the encoder of shape \(6, 1, 4\)",
        ),
    ],
)
def test_networks_of_other_sizes_are_named(
    make_networks: Make, make_loss: Make, make_windows: Make, name: str, module: Any, message: str
) -> None:
    """Some of them would broadcast, and a wrong loss come out without a word."""
    horizon = 1 if name == "dynamics" else 3
    loss = make_loss(networks={**make_networks(), name: module}, horizon=horizon)
    with pytest.raises(ValueError, match=message):
        forward(loss, make_windows(steps=horizon))


def test_an_error_of_a_network_itself_is_passed_on(
    make_networks: Make, make_loss: Make, make_windows: Make
) -> None:
    class Broken(LayerNormMLP):
        def forward(self, *inputs: Tensor) -> Tensor:
            raise RuntimeError("out of luck")

    broken = TensorDictModule(Broken(6, 1, 8), ["latent", "action"], ["r"])
    loss = make_loss(networks={**make_networks(), "reward_model": broken})
    with pytest.raises(RuntimeError, match="out of luck"):
        forward(loss, make_windows())


FLAGS = [("next", "done"), ("next", "terminated"), ("next", "truncated"), "validity_mask"]


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("number", [0.5, -1.0, float("nan")])
def test_a_flag_that_is_none_is_named(
    make_loss: Make, make_windows: Make, key: Any, number: float
) -> None:
    shape = (6, 3) if key == "validity_mask" else (6, 3, 1)
    td = with_entry(make_windows(), key, torch.full(shape, number))
    message = r"of dtype torch\.float32 has values other than 0 and 1; use torch\.bool"
    with pytest.raises(ValueError, match=message) as caught:
        forward(make_loss(), td)
    assert repr(key) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
@pytest.mark.parametrize("column", [True, False])
def test_offline_data_may_be_of_other_types(
    make_loss: Make, make_windows: Make, dtype: torch.dtype, column: bool
) -> None:
    """Flags as numbers, rewards and flags ``[B, T]``, and everything else in double precision."""
    loss, td = make_loss(dtype=torch.float32), make_windows()
    for row, name in enumerate(("done", "terminated", "truncated")):
        td["next", name] = torch.zeros(6, 3, 1, dtype=torch.bool)
        td["next", name][row, 1] = True
    wanted = all_losses_and_gradients(
        loss, td.apply(lambda leaf: leaf.float() if leaf.is_floating_point() else leaf)
    )
    for name in ("done", "terminated", "truncated"):
        td["next", name] = td["next", name].to(dtype)
    if not column:
        for name in ("done", "terminated", "truncated", "reward"):
            td["next", name] = td["next", name].squeeze(-1)
    assert_same(all_losses_and_gradients(loss, td), wanted)


def test_the_one_action_of_a_task_may_lack_its_dimension(make_windows: Make) -> None:
    agent = ALMAgent(AgentConfig({"observation": 5}, (-1.0,), (1.0,), 4, 8, 8))
    loss = ALMLoss(**agent.networks())
    SoftUpdate(loss, tau=0.005)
    td = make_windows(dtype=torch.float32)
    td["action"] = td["action"][..., :1]
    wanted = all_losses_and_gradients(loss, td)
    td["action"] = td["action"].squeeze(-1)
    assert_same(all_losses_and_gradients(loss, td), wanted)


def test_a_horizon_may_be_a_number_of_numpy(make_networks: Make) -> None:
    horizon = ALMLoss(**make_networks(), horizon=np.int64(5)).horizon
    assert type(horizon) is int
    assert horizon == 5


def test_short_windows_are_refused_where_they_matter(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(horizon=3), make_windows(steps=2)
    for call in (loss, loss.world_model_loss, loss.world_model_rollout):
        with pytest.raises(ValueError, match=r"has shape \(6, 2, 1\), expected \[B, 3, 1\]"):
            call(td)
    for name in TERMS[1:]:
        assert term(loss, name, td).isfinite()


def test_the_validity_mask_may_have_a_trailing_dimension(
    make_loss: Make, make_windows: Make
) -> None:
    loss, td = make_loss(), make_windows()
    td["validity_mask"] = torch.ones(6, 3, dtype=torch.bool)
    td["validity_mask"][1, 1:] = False
    wanted = all_losses_and_gradients(loss, td)
    td["validity_mask"] = td["validity_mask"].unsqueeze(-1)
    assert_same(all_losses_and_gradients(loss, td), wanted)


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("encoder", nn.Linear(2, 2), "encoder must end in a distribution.*got Linear"),
        ("encoder", RewardModel(4, 2, 8), "encoder must end in a distribution.*got RewardModel"),
        ("dynamics", RewardModel(4, 2, 8), "dynamics must end in a distribution"),
        ("actor", nn.Linear(2, 2), "actor must end in a distribution"),
        ("reward_model", nn.Linear(2, 2), "reward_model must read and write a TensorDict"),
        ("classifier", nn.Linear(2, 2), "classifier must read and write a TensorDict"),
        ("qvalue_network", nn.Linear(2, 2), "qvalue_network must read and write a TensorDict"),
        ("dynamics", LatentDynamics(4, 2, 8, latent_key="z"), r"dynamics reads \['z'\]"),
        ("qvalue_network", QValueEnsemble(4, 2, 8, action_key="u"), r"reads \['u'\].*'action'"),
        (
            "classifier",
            TensorDictModule(LayerNormMLP(10, 2, 8), ["latent", "action", "z"], ["logits"]),
            r"classifier reads \['z'\].*'latent'.*'action'.*\('next', 'latent'\)",
        ),
    ],
)
def test_modules_that_do_not_fit_are_refused(
    make_networks: Make, name: str, module: nn.Module, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ALMLoss(**{**make_networks(), name: module})


def test_the_networks_are_left_whole_after_an_error(
    make_networks: Make, make_windows: Make
) -> None:
    """They run with the targets' parameters meanwhile, and the policy outside shares them."""
    networks = make_networks()
    loss = ALMLoss(**networks)
    SoftUpdate(loss, tau=0.005)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter += 0.1
    td = make_windows(dtype=torch.float32)
    state = {name: copy.deepcopy(n.state_dict()) for name, n in networks.items()}
    own = {name: [id(p) for p in n.parameters()] for name, n in networks.items()}
    wanted = forward(loss, td)
    for key in ("action", "observation"):
        wrong = td.clone()
        for entry in (key, ("next", key)):
            if wrong.get(entry, None) is not None:
                wrong[entry] = wrong[entry][..., :1]
        with pytest.raises(ValueError, match="cannot read"):
            forward(loss, wrong)
    for name, network in networks.items():
        assert [id(p) for p in network.parameters()] == own[name]
        for entry, value in network.state_dict().items():
            assert torch.equal(value, state[name][entry])
    for name, value in forward(loss, td).items():
        assert torch.equal(value, wanted[name])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"horizon": 0}, "horizon must be a whole number of at least 1, got 0"),
        ({"horizon": 2.5}, r"horizon must be a whole number of at least 1, got 2\.5"),
        ({"reduction": "avg"}, "reduction='avg' is not one of none, mean, sum"),
        ({"short_windows": "pad"}, "short_windows='pad' is not one of mask, drop"),
    ],
)
def test_bad_settings_are_refused(
    make_networks: Make, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ALMLoss(**make_networks(), **kwargs)

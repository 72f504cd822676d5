"""What each ablation of ALMLoss makes of the losses, in float64, by a second implementation.

The reference below is written in plain torch from the equations, without a module of the package.
It first reproduces the authors' numbers, and is then held against the loss with every switch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F
from torchrl.objectives.utils import ValueEstimators

from alm_torchrl.objectives import ALMLoss
from tests.objectives.test_golden import (
    ACT,
    COEFF,
    GAMMA,
    GOLDEN,
    LMBDA,
    NETWORKS,
    OBS,
    Golden,
    golden_loss,
    networks,
    parameter_names,
    tensor,
)

Make = Callable[..., Any]
KINDS = ["reverse_kl", "forward_kl", "squared_distance", "classifier"]
HORIZONS = [1, 2, 3, 5, 10]
SWITCHES: dict[str, dict[str, Any]] = {
    "no consistency reward": {"consistency_coeff": 0.0},
    "no reward term": {"reward_term": False},
    "no value term": {"value_term": False},
    "neither": {"reward_term": False, "value_term": False},
    "forward KL": {"consistency": "forward_kl"},
    "squared distance": {"consistency": "squared_distance"},
    "classifier": {"consistency": "classifier"},
    "stop-gradient target": {"latent_target": "stop_gradient"},
    "online target": {"latent_target": "online"},
    "teacher forcing": {"teacher_forcing": True},
    "bound": {"actor_objective": "bound"},
    "value": {"actor_objective": "value"},
    "multiplier": {"consistency_level": 2.0},
}
TERMS = ["loss_world_model", "loss_reward", "loss_classifier", "loss_value", "loss_actor"]
OWN = {
    "loss_world_model": {"encoder", "dynamics"},
    "loss_reward": {"reward_model"},
    "loss_classifier": {"classifier"},
    "loss_value": {"qvalue_network"},
    "loss_actor": {"actor"},
    "loss_multiplier": {"log_multiplier"},
}


# ------------------------------------------------------------------------------- the reference


def plain(x: Tensor, w: list[Tensor]) -> Tensor:
    for layer in (0, 2):
        x = F.elu(x @ w[layer].T + w[layer + 1])
    return x @ w[4].T + w[5]


def trunk(x: Tensor, w: list[Tensor]) -> Tensor:
    x = torch.tanh(F.layer_norm(x @ w[0].T + w[1], (len(w[0]),), w[2], w[3]))
    return F.elu(x @ w[4].T + w[5]) @ w[6].T + w[7]


def normal(raw: Tensor) -> D.Normal:
    loc, scale = raw.chunk(2, -1)
    scale = 10 - F.softplus(10 - scale)
    return D.Normal(30 * torch.tanh(loc / 30), 0.1 + F.softplus(scale - 0.1))


class Reference:
    """The losses from the equations, over the authors' weights and without noise."""

    def __init__(self, target: str = "moving_average", **settings: Any) -> None:
        self.weights = {
            net: [tensor(f"weights/{net}/{name}").requires_grad_() for name in parameter_names(net)]
            for net in (*NETWORKS, "encoder_target", "critic_target")
        }
        self.online = target == "online"
        if target != "moving_average":
            self.weights["encoder_target"] = self.weights["encoder"]
        self.settings = settings

    def target(self, observation: Tensor) -> D.Normal:
        dist = normal(plain(observation, self.weights["encoder_target"]))
        return dist if self.online else D.Normal(dist.loc.detach(), dist.scale.detach())

    def act(self, z: Tensor) -> Tensor:
        loc = torch.tanh(plain(z, self.weights["actor"]))
        assert loc.abs().max() < 1 - 1e-6  # where the clamp does nothing
        return loc

    def model(self, z: Tensor, a: Tensor) -> D.Normal:
        return normal(plain(torch.cat([z, a], -1), self.weights["model"]))

    def reward(self, z: Tensor, a: Tensor) -> Tensor:
        return trunk(torch.cat([z, a], -1), self.weights["reward"]).squeeze(-1)

    def value(self, z: Tensor, a: Tensor) -> Tensor:
        w, x = self.weights["critic"], torch.cat([z, a], -1)
        return torch.minimum(trunk(x, w[:8]), trunk(x, w[8:])).squeeze(-1)

    def log_ratio(self, z: Tensor, a: Tensor, following: Tensor) -> Tensor:
        logits = trunk(torch.cat([z, a, following], -1), self.weights["classifier"])
        return logits[..., 1] - logits[..., 0]

    def consistency(self, kind: str, z: Tensor, a: Tensor, observation: Tensor) -> Tensor:
        m, e = self.model(z, a), self.target(observation)
        return {
            "reverse_kl": lambda: D.kl_divergence(m, e).sum(-1),
            "forward_kl": lambda: D.kl_divergence(e, m).sum(-1),
            "squared_distance": lambda: ((m.loc - e.loc) ** 2).sum(-1),
            "classifier": lambda: -self.log_ratio(z, a, m.loc),
        }[kind]()

    def along(
        self, td: TensorDict, kind: str = "reverse_kl", forced: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Consistency and reward of every step, ``[B, T]``, and the value at the end, ``[B]``."""
        z = normal(plain(td["observation"][:, 0], self.weights["encoder"])).loc
        consistency, reward = [], []
        for t in range(td.shape[1]):
            a = td["action"][:, t]
            consistency.append(self.consistency(kind, z, a, td["next", "observation"][:, t]))
            reward.append(self.reward(z, a))
            sample = z = self.model(z, a).loc
            if forced:
                z = self.target(td["next", "observation"][:, t]).loc.detach()
        value = self.value(sample, self.act(sample).detach())
        return torch.stack(consistency, 1), torch.stack(reward, 1), value

    def imagined(self, observation: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, log-ratios and next values of every step, ``[B, K]``."""
        z = self.target(observation).loc.detach()
        reward, ratio, value = [], [], []
        for _ in range(steps):
            a = self.act(z.detach())
            reward.append(self.reward(z, a))
            following = self.model(z, a).loc
            ratio.append(self.log_ratio(z, a, following.detach()))
            z = following
            value.append(self.value(z, self.act(z).detach()))
        return torch.stack(reward, 1), torch.stack(ratio, 1), torch.stack(value, 1)

    def lambda_loss(self, observation: Tensor, steps: int, c: float, lmbda: float) -> Tensor:
        reward, ratio, value = self.imagined(observation, steps)
        total, following = torch.zeros(()), value[:, -1]
        for t in reversed(range(steps)):
            step = reward[:, t] + c * ratio[:, t]
            following = step + GAMMA * ((1 - lmbda) * value[:, t] + lmbda * following)
            total = total + GAMMA**t * following / steps
        return -total.mean()

    def bound_loss(self, observation: Tensor, steps: int, c: float) -> Tensor:
        reward, ratio, value = self.imagined(observation, steps)
        powers = GAMMA ** torch.arange(steps, dtype=torch.float64)
        total = (powers * (reward + c * ratio)).sum(1) + GAMMA**steps * value[:, -1]
        return -total.mean()

    def value_loss(self, observation: Tensor) -> Tensor:
        z = self.target(observation).loc.detach()
        return -self.value(z, self.act(z)).mean()


def assert_exact(found: Tensor, wanted: Tensor) -> None:
    """To the precision of the golden numbers."""
    assert found.dtype == wanted.dtype == torch.float64
    floor = 1e-5 * wanted.abs().max().item()
    np.testing.assert_allclose(
        found.detach().numpy(), wanted.detach().numpy(), rtol=1e-8, atol=1e-8 * floor + 1e-15
    )


def assert_same_loss(
    found: Tensor, loss: ALMLoss, wanted: Tensor, reference: Reference, *nets: str
) -> None:
    """The same number, and the same gradient for every parameter of the networks named."""
    assert_exact(found, wanted)
    theirs = [w for net in nets for w in reference.weights[net]]
    ours = [p for net in nets for p in getattr(loss, NETWORKS[net]).parameters()]
    expected = torch.autograd.grad(wanted, theirs, allow_unused=True)
    gradients = torch.autograd.grad(found, ours, allow_unused=True)
    assert any(g is not None and g.any() for g in expected)
    for gradient, g, p in zip(gradients, expected, ours, strict=True):
        zero = torch.zeros_like(p)
        assert_exact(zero if gradient is None else gradient, zero if g is None else g)


def build(**options: Any) -> ALMLoss:
    loss, _ = golden_loss(networks(), **options)
    if "consistency_coeff" in options:
        loss.consistency_coeff = torch.tensor(options["consistency_coeff"], dtype=torch.float64)
    return loss


def long_windows(steps: int) -> TensorDict:
    """Windows longer than the authors' numbers hold."""
    generator = torch.Generator().manual_seed(steps)
    never = torch.zeros(6, steps, 1, dtype=torch.bool)

    def randn(size: int) -> Tensor:
        return torch.randn(6, steps, size, generator=generator, dtype=torch.float64)

    return TensorDict(
        observation=randn(OBS),
        action=randn(ACT).tanh(),
        next=TensorDict(observation=randn(OBS), reward=randn(1), done=never, terminated=never),
        batch_size=[6, steps],
    )


WINDOWS, TRANSITIONS = Golden.inputs()
STATE = tensor("transition/state")


def world_model(reference: Reference, td: TensorDict, kind: str = "reverse_kl") -> Tensor:
    consistency, reward, value = reference.along(td, kind)
    return ((consistency - reward).sum(1) - value).mean()


def test_the_reference_gives_the_authors_numbers() -> None:
    reference = Reference()
    kl, reward, value = reference.along(WINDOWS)
    assert_exact(kl.T.unsqueeze(-1), tensor("world_model/kl"))
    assert_exact(reward.T.unsqueeze(-1), tensor("world_model/reward"))
    assert_exact(value.unsqueeze(-1), tensor("world_model/value"))
    losses = {
        "world_model": (world_model(reference, WINDOWS), ["encoder", "model"]),
        "actor": (reference.lambda_loss(STATE, 3, COEFF, LMBDA), ["actor"]),
    }
    for prefix, (loss, nets) in losses.items():
        assert_exact(loss, tensor(f"{prefix}/loss"))
        weights = [w for net in nets for w in reference.weights[net]]
        names = [f"{prefix}/grad/{net}/{name}" for net in nets for name in parameter_names(net)]
        for name, gradient in zip(names, torch.autograd.grad(loss, weights), strict=True):
            assert_exact(gradient, tensor(name))


# ----------------------------------------------------------------------------- the world model


@pytest.mark.parametrize("reward_term", [True, False])
@pytest.mark.parametrize("value_term", [True, False])
def test_terms_of_the_world_model(reward_term: bool, value_term: bool) -> None:
    loss = build(reward_term=reward_term, value_term=value_term)
    found, _ = loss.world_model_loss(WINDOWS)
    number = GOLDEN["world_model/kl"].sum(0)
    if reward_term:
        number = number - GOLDEN["world_model/reward"].sum(0)
    if value_term:
        number = number - GOLDEN["world_model/value"]
    assert_exact(found, torch.tensor(number.mean()))
    reference = Reference()
    consistency, reward, value = reference.along(WINDOWS)
    wanted = (consistency - reward_term * reward).sum(1) - value_term * value
    assert_same_loss(found, loss, wanted.mean(), reference, "encoder", "model")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["moving_average", "stop_gradient", "online"])
def test_consistency_and_its_target(kind: str, target: str) -> None:
    loss, reference = build(consistency=kind, latent_target=target), Reference(target)
    found, metrics = loss.world_model_loss(WINDOWS)
    wanted = world_model(reference, WINDOWS, kind)
    assert_same_loss(found, loss, wanted, reference, "encoder", "model")
    rollout = loss.world_model_rollout(WINDOWS)
    assert_exact(rollout["consistency"].squeeze(-1), reference.along(WINDOWS, kind)[0])
    assert_exact(metrics["kl"], reference.along(WINDOWS)[0].mean())
    if kind != "reverse_kl":
        assert_exact(metrics["consistency"], reference.along(WINDOWS, kind)[0].mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["moving_average", "online"])
def test_teacher_forcing(kind: str, target: str) -> None:
    options = {"consistency": kind, "latent_target": target, "teacher_forcing": True}
    loss, reference = build(**options), Reference(target)
    found, _ = loss.world_model_loss(WINDOWS)
    consistency, reward, value = reference.along(WINDOWS, kind, forced=True)
    wanted = ((consistency - reward).sum(1) - value).mean()
    assert_same_loss(found, loss, wanted, reference, "encoder", "model")
    assert not torch.isclose(
        found, build(**options | {"teacher_forcing": False})(WINDOWS)["loss_world_model"]
    )


def test_teacher_forcing_in_windows_that_an_episode_ends() -> None:
    loss, reference, td = build(teacher_forcing=True), Reference(), WINDOWS.clone()
    consistency, reward, value = reference.along(td[:, :2], forced=True)
    wanted = ((consistency - reward).sum(1) - value).mean()
    td["next", "done"][:, 1] = True
    td["next", "observation"][:, 2] = float("nan")
    found, _ = loss.world_model_loss(td)
    assert_same_loss(found, loss, wanted, reference, "encoder", "model")


@pytest.mark.parametrize("target", ["stop_gradient", "online"])
def test_without_a_target_encoder_every_loss_encodes_online(target: str) -> None:
    without, averaged = build(latent_target=target), build()
    averaged.target_encoder_params.data.copy_(averaged.encoder_params.data)
    out, expected = without(WINDOWS), averaged(WINDOWS)
    for name in TERMS:
        assert_exact(out[name], expected[name])
    assert not any(name.startswith("target_encoder") for name, _ in without.named_buffers())
    gradients = []
    for loss, losses in ((without, out), (averaged, expected)):
        total = sum(losses[name] for name in TERMS[1:])
        gradients.append(torch.autograd.grad(total, list(loss.parameters()), allow_unused=True))
    for found, wanted in zip(*gradients, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert_exact(found, wanted)


@pytest.mark.parametrize("steps", HORIZONS)
def test_horizons_of_the_world_model(steps: int) -> None:
    td = long_windows(steps)
    loss, reference = build(horizon=steps), Reference()
    found, _ = loss.world_model_loss(td)
    assert_same_loss(found, loss, world_model(reference, td), reference, "encoder", "model")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_a_learned_weight(kind: str, beta: float) -> None:
    loss, reference = build(consistency=kind, consistency_level=2.0), Reference()
    with torch.no_grad():
        loss.log_multiplier.fill_(np.log(beta))
    consistency, reward, value = reference.along(WINDOWS, kind)
    out = loss(WINDOWS)
    assert_exact(out["multiplier"], torch.tensor(beta, dtype=torch.float64))
    wanted = ((beta * consistency - reward).sum(1) - value).mean()
    assert_same_loss(out["loss_world_model"], loss, wanted, reference, "encoder", "model")
    excess = (consistency - 2.0).sum(1).mean()
    assert_exact(out["loss_multiplier"], -np.log(beta) * excess)
    (gradient,) = torch.autograd.grad(loss.multiplier_loss(WINDOWS)[0], loss.log_multiplier)
    assert_exact(gradient, -excess)


def test_the_weight_counts_the_steps_that_the_world_model_counts() -> None:
    td = WINDOWS.clone()
    td["next", "done"] = td["next", "done"].clone()
    td["next", "done"][0, 0] = td["next", "done"][3, 1] = True
    consistency = Reference().along(td)[0]
    excess = consistency - 2.0
    excess[0, 1:] = excess[3, 2:] = 0.0
    for short_windows, rows in (("mask", [0, 1, 2, 3, 4, 5]), ("drop", [1, 2, 4, 5])):
        loss = build(consistency_level=2.0, short_windows=short_windows)
        (gradient,) = torch.autograd.grad(loss.multiplier_loss(td)[0], loss.log_multiplier)
        assert_exact(gradient, -excess[rows].sum(1).mean())


# ----------------------------------------------------------------------------------- the actor


@pytest.mark.parametrize("steps", HORIZONS)
@pytest.mark.parametrize("coeff", [COEFF, 0.0])
@pytest.mark.parametrize("lmbda", [LMBDA, 1.0])
def test_lambda_returns(steps: int, coeff: float, lmbda: float) -> None:
    loss, reference = build(horizon=steps, consistency_coeff=coeff), Reference()
    loss.value_estimator.lmbda = torch.tensor(lmbda, dtype=torch.float64)
    found, _ = loss.actor_loss(TRANSITIONS)
    wanted = reference.lambda_loss(STATE, steps, coeff, lmbda)
    assert_same_loss(found, loss, wanted, reference, "actor")


@pytest.mark.parametrize("steps", HORIZONS)
@pytest.mark.parametrize("coeff", [COEFF, 0.0])
def test_the_bound_alone(steps: int, coeff: float) -> None:
    loss = build(horizon=steps, consistency_coeff=coeff, actor_objective="bound")
    found, _ = loss.actor_loss(TRANSITIONS)
    reference = Reference()
    wanted = reference.bound_loss(STATE, steps, coeff)
    assert_same_loss(found, loss, wanted, reference, "actor")


def test_at_lambda_one_the_first_return_is_the_bound() -> None:
    loss = build()
    loss.value_estimator.lmbda = torch.tensor(1.0, dtype=torch.float64)
    rollout = loss.imagine(Reference().target(STATE).loc.detach())
    assert_exact(loss.lambda_return(rollout)[:, 0], loss.bound(rollout))


def test_the_value_without_the_model() -> None:
    loss, reference = build(actor_objective="value"), Reference()
    found, metrics = loss.actor_loss(TRANSITIONS)
    assert_same_loss(found, loss, reference.value_loss(STATE), reference, "actor")
    assert_exact(metrics["actor_value"], -found)
    assert not any(name.startswith("imagined") for name in loss(WINDOWS).keys())  # noqa: SIM118


# ------------------------------------------------------------------------------ all that must hold


@pytest.mark.parametrize("options", SWITCHES.values(), ids=SWITCHES)
def test_a_loss_trains_its_own_networks_alone(
    make_loss: Make, make_windows: Make, options: dict[str, Any]
) -> None:
    loss, td = make_loss(deterministic=False, **options), make_windows()
    if "consistency_level" in options:
        with torch.no_grad():
            loss.log_multiplier.fill_(0.5)  # at zero, what leaks is multiplied by nothing
    assert set(loss.out_keys) == set(TERMS) | (
        {"loss_multiplier"} if "consistency_level" in options else set()
    )
    out = loss(td)
    trained = {}
    for term in loss.out_keys:
        loss.zero_grad()
        out[term].backward(retain_graph=True)
        trained[term] = {
            name.split("_params.")[0]
            for name, p in loss.named_parameters()
            if p.grad is not None and p.grad.any()
        }
    assert trained == {term: OWN[term] for term in loss.out_keys}
    assert all(out[key].requires_grad == (key in loss.out_keys) for key in out.keys())  # noqa: SIM118
    groups = loss.parameter_groups()
    ids = [id(p) for group in groups.values() for p in group]
    assert sorted(ids) == sorted(map(id, loss.parameters()))
    assert ("multiplier" in groups) == ("consistency_level" in options)


@pytest.mark.parametrize("options", SWITCHES.values(), ids=SWITCHES)
def test_what_follows_an_episode_counts_for_nothing(
    make_loss: Make, make_windows: Make, options: dict[str, Any]
) -> None:
    loss, td = make_loss(**options), make_windows()
    loss.generated_rows = lambda state: torch.arange(len(state)) % 2 == 0
    td["next", "done"][0, 0] = td["next", "done"][3, 1] = True
    found = []
    for garbage in (0.0, float("nan")):
        for row, last in ((0, 0), (3, 1)):
            for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
                td[key][row, last + 1 :] = garbage
        out = loss(td)
        total = sum(out[term] for term in loss.out_keys)
        found.append([total, *torch.autograd.grad(total, list(loss.parameters()))])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", SWITCHES.values(), ids=SWITCHES)
def test_bfloat16_stays_close(make_loss: Make, make_windows: Make, options: dict[str, Any]) -> None:
    loss = make_loss(dtype=torch.float32, **options)
    td = make_windows(dtype=torch.float32)
    loss.generated_rows = lambda state: torch.arange(len(state)) % 2 == 0
    exact = loss(td)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss(td)
    for term in loss.out_keys:
        assert rounded[term].dtype == torch.float32
        torch.testing.assert_close(rounded[term], exact[term], rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("term", "options"),
    [
        ("world_model", {"consistency": "forward_kl", "latent_target": "online"}),
        ("world_model", {"consistency": "squared_distance", "latent_target": "stop_gradient"}),
        ("world_model", {"consistency": "classifier", "consistency_level": 1.0}),
        ("multiplier", {"consistency_level": 1.0, "reward_term": False, "value_term": False}),
        ("actor", {"actor_objective": "bound"}),
        ("actor", {"actor_objective": "value", "latent_target": "stop_gradient"}),
    ],
)
def test_compiled_terms_equal_eager_ones(
    make_loss: Make, make_windows: Make, term: str, options: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    loss, td = make_loss(horizon=1, **options), make_windows(steps=1)
    method = getattr(loss, f"{term}_loss")
    results = []
    for call in (method, torch.compile(method, fullgraph=True, backend="eager")):
        loss.zero_grad()
        value, _ = call(td)
        value.backward()
        gradients = [p.grad.clone() for p in loss.parameters() if p.grad is not None]
        results.append([value.detach(), *gradients])
    torch._dynamo.reset()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"consistency": "kl"}, "consistency='kl' is not one of reverse_kl, forward_kl"),
        ({"latent_target": "none"}, "latent_target='none' is not one of moving_average"),
        ({"actor_objective": "q"}, "actor_objective='q' is not one of lambda_returns"),
        ({"consistency_level": 0.0}, "consistency_level must be a positive finite number"),
        ({"consistency_level": float("nan")}, "consistency_level must be a positive finite"),
    ],
)
def test_bad_settings_are_refused(
    make_networks: Make, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ALMLoss(**make_networks(), **kwargs)


def test_there_is_no_multiplier_unless_it_is_asked_for(make_loss: Make, make_windows: Make) -> None:
    with pytest.raises(ValueError, match="give ALMLoss a consistency_level"):
        make_loss().multiplier_loss(make_windows())


def test_the_estimator_can_be_the_value_at_the_horizon() -> None:
    by_type, by_lambda = build(), build()
    by_type.make_value_estimator(ValueEstimators.TD1, gamma=GAMMA)
    by_lambda.make_value_estimator(ValueEstimators.TDLambda, gamma=GAMMA, lmbda=1.0)
    assert_exact(by_type.actor_loss(TRANSITIONS)[0], by_lambda.actor_loss(TRANSITIONS)[0])

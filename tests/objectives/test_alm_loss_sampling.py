"""What ALMLoss draws: fresh noise whatever the exploration mode, with the right moments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl.objectives import ALMLoss

COUNT = 20_000
Make = Callable[..., Any]

OUTER = [
    None,
    ExplorationType.RANDOM,
    ExplorationType.DETERMINISTIC,
    ExplorationType.MEAN,
    ExplorationType.MODE,
]


def outer(mode: ExplorationType | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if mode is None else set_exploration_type(mode)


def many(td: TensorDict) -> TensorDict:
    """One window, over and over."""
    return td[:1].expand(COUNT, *td.shape[1:]).clone()


def standardized(draws: Tensor, loc: Tensor, scale: Tensor) -> None:
    """Asserts that the draws are Normal around loc with that scale: moments and independence."""
    noise = ((draws - loc) / scale).flatten(1)
    spread = 5 / COUNT**0.5
    torch.testing.assert_close(noise.mean(0), torch.zeros_like(noise[0]), rtol=0, atol=spread)
    identity = torch.eye(noise.shape[1], dtype=noise.dtype)
    torch.testing.assert_close(noise.T.cov(), identity, rtol=0, atol=2 * spread)
    fourth = noise.pow(4).mean(0)
    torch.testing.assert_close(fourth, torch.full_like(fourth, 3.0), rtol=0, atol=0.4)


# ----------------------------------------------------------------------------- fresh, reproducible


@pytest.mark.parametrize("mode", OUTER)
def test_forward_draws_fresh_noise_under_any_mode(
    make_loss: Make, make_windows: Make, mode: ExplorationType | None
) -> None:
    loss, td = make_loss(deterministic=False), make_windows()
    torch.manual_seed(0)
    reference = loss(td)
    with outer(mode):
        torch.manual_seed(0)
        first, second = loss(td), loss(td)
        torch.manual_seed(0)
        again = loss(td)
    for name in loss.out_keys:
        assert torch.equal(first[name], again[name]), name
        assert torch.equal(first[name], reference[name]), name
        assert not torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("mode", OUTER)
def test_rollouts_draw_fresh_noise_under_any_mode(
    make_loss: Make, make_windows: Make, mode: ExplorationType | None
) -> None:
    loss, td = make_loss(deterministic=False), make_windows()
    latent = torch.randn(6, 4, dtype=torch.float64)
    with outer(mode):
        for draw in (lambda: loss.world_model_rollout(td), lambda: loss.imagine(latent)):
            torch.manual_seed(0)
            first, second = draw(), draw()
            torch.manual_seed(0)
            again = draw()
            for key in first.keys(True, True):
                assert torch.equal(first[key], again[key])
            assert not torch.equal(first["latent"], second["latent"])


@pytest.mark.parametrize(
    "name", ["world_model_loss", "reward_loss", "classifier_loss", "value_loss", "actor_loss"]
)
@pytest.mark.parametrize("mode", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
def test_each_term_draws_for_itself(
    make_loss: Make, make_windows: Make, name: str, mode: ExplorationType
) -> None:
    loss, td = make_loss(deterministic=False), make_windows()
    with set_exploration_type(mode):
        assert not torch.equal(getattr(loss, name)(td)[0], getattr(loss, name)(td)[0])


def test_deterministic_mode_leaves_no_noise(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(deterministic=True), make_windows()
    for name in ("world_model_loss", "reward_loss", "value_loss", "actor_loss"):
        assert torch.equal(getattr(loss, name)(td)[0], getattr(loss, name)(td)[0])


# ---------------------------------------------------------------------------------------- latents


def test_latents_of_the_world_model_rollout(make_loss: Make, make_windows: Make) -> None:
    """z_0 from the encoder, z_1 and z_2 from the dynamics at the latent drawn before."""
    loss, td = make_loss(deterministic=False), many(make_windows())
    torch.manual_seed(0)
    latents = loss.world_model_rollout(td)["latent"].detach()
    first = loss.encoder.get_dist(td[:, 0]).base_dist
    standardized(latents[:, 0], first.loc.detach(), first.scale.detach())
    for t in (0, 1):
        step = TensorDict(latent=latents[:, t], action=td["action"][:, t], batch_size=[COUNT])
        following = loss.dynamics.get_dist(step).base_dist
        standardized(latents[:, t + 1], following.loc.detach(), following.scale.detach())


def test_latents_and_actions_of_an_imagined_rollout(make_loss: Make) -> None:
    loss = make_loss(deterministic=False)
    start = torch.tensor([[0.3, -0.2, 0.5, 0.1]], dtype=torch.float64).expand(COUNT, 4)
    torch.manual_seed(0)
    rollout = loss.imagine(start).detach()
    assert torch.equal(rollout["latent"][:, 0], start)
    assert torch.equal(rollout["latent"][:, 1:], rollout["next", "latent"][:, :-1])
    assert torch.equal(rollout["action"][:, 1:], rollout["next", "action"][:, :-1])
    following = loss.dynamics.get_dist(rollout).base_dist
    standardized(rollout["next", "latent"], following.loc.detach(), following.scale.detach())
    for latent, action in (
        (rollout["latent"], rollout["action"]),
        (rollout["next", "latent"], rollout["next", "action"]),
    ):
        mean = loss.actor.get_dist(TensorDict(latent=latent, batch_size=latent.shape[:-1]))
        noise = action - mean.loc.detach()
        assert action.abs().max() <= 1 - 1e-6 + 1e-12
        assert noise.abs().max() <= 0.3 + 1e-7  # the clip is kept in float32
        # The scale is 0.5, so that 54.9 % of the draws are clipped, evenly to both sides.
        free = noise[mean.loc.abs() < 0.65]
        assert (free.abs() > 0.3 - 1e-9).double().mean().item() == pytest.approx(0.5485, abs=0.01)
        assert free.mean().abs() < 0.01


def test_the_first_action_can_be_given(make_loss: Make) -> None:
    loss = make_loss(deterministic=False)
    latent = torch.randn(6, 4, dtype=torch.float64)
    action = torch.rand(6, 2, dtype=torch.float64)
    rollout = loss.imagine(latent, action=action)
    assert torch.equal(rollout["action"][:, 0], action)
    assert not torch.equal(rollout["action"][:, 1], action)
    assert (rollout["next", "action"] == rollout["action"][:, :1]).sum() == 0


def test_the_scale_follows_the_schedule(make_loss: Make) -> None:
    loss = make_loss(deterministic=False)
    latent = 0.1 * torch.randn(COUNT, 4, dtype=torch.float64)
    loss.actor.noise.advance(100_000)
    rollout = loss.imagine(latent).detach()
    state = TensorDict(latent=latent, batch_size=[COUNT])
    mean = loss.actor.get_dist(state).loc.detach()
    inside = mean.abs() < 0.6
    noise = (rollout["action"][:, 0] - mean)[inside]
    assert noise.std().item() == pytest.approx(0.1, rel=0.03)


def test_terms_use_draws_of_their_own(
    make_loss: Make, make_windows: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reward, classifier, value and actor each see another latent of the same distribution."""
    loss, td = make_loss(deterministic=False), make_windows()
    seen: list[Tensor] = []
    draw = ALMLoss._draw

    def spy(self: ALMLoss, dist: Any) -> Tensor:
        value = draw(self, dist)
        seen.append(value.detach().clone())
        return value

    monkeypatch.setattr(ALMLoss, "_draw", spy)
    loss(td)
    assert len(seen) > 10
    for i, value in enumerate(seen):
        for other in seen[:i]:
            assert value.shape != other.shape or not torch.equal(value, other)


# --------------------------------------------------------------------------------- the classifier


@pytest.mark.parametrize(("batch", "generated"), [(6, 3), (7, 3), (1, 0)])
def test_a_random_half_is_imagined(make_loss: Make, batch: int, generated: int) -> None:
    loss = make_loss()
    state = TensorDict(latent=torch.zeros(batch, 4), batch_size=[batch])
    counts = torch.zeros(batch)
    for _ in range(400):
        rows = loss.generated_rows(state)
        assert rows.dtype == torch.bool
        assert rows.sum() == generated
        counts += rows
    expected = torch.full((batch,), 400 * generated / batch)
    torch.testing.assert_close(counts, expected, rtol=0, atol=5 * 10 + 1e-6)


def test_imagined_rows_are_drawn_from_the_dynamics(
    make_loss: Make, make_windows: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others from the target encoder; the classifier is asked about exactly those."""
    loss, td = make_loss(deterministic=False), many(make_windows(steps=1))
    asked: list[TensorDict] = []
    classifier = loss.classifier.forward

    def spy(tensordict: TensorDict) -> TensorDict:
        asked.append(tensordict.copy())
        return classifier(tensordict)

    monkeypatch.setattr(loss.classifier, "forward", spy)
    rows = torch.arange(COUNT) < COUNT // 2
    loss.generated_rows = lambda _: rows
    loss.classifier_loss(td)
    seen = asked[0].detach()
    following = seen["next", "latent"]
    prior = loss.dynamics.get_dist(seen).base_dist
    noise = (following - prior.loc.detach()) / prior.scale.detach()
    with loss.target_encoder_params.to_module(loss.encoder):
        encoded = loss.encoder.get_dist(td["next"][:, 0]).base_dist
        current = loss.encoder.get_dist(td[:, 0]).base_dist
    spread = 5 / (COUNT / 2) ** 0.5
    assert noise[rows].mean(0).abs().max() < spread
    assert (noise[rows].std(0) - 1).abs().max() < spread
    real = (following[~rows] - encoded.loc[~rows]) / encoded.scale[~rows]
    assert real.mean(0).abs().max() < spread
    assert (real.std(0) - 1).abs().max() < spread
    standardized(seen["latent"], current.loc.detach(), current.scale.detach())
    assert torch.equal(seen["action"], td["action"][:, 0])

"""The latent's bounded parameters and the clamped action noise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule
from torch import distributions as D
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl.distributions import (
    ClampedNormal,
    OneHotGroups,
    full_precision,
)
from alm_torchrl.modules import GaussianHead

DRAWS = 200_000
reproducible = settings(deadline=None, derandomize=True, max_examples=60)
wild = st.floats(-(2.0**100), 2.0**100, width=32)


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def normal_pdf(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def censored_moments(loc: float, scale: float, low: float, high: float) -> tuple[float, float]:
    """Mean and variance of a Normal clamped to a range, in closed form."""
    a, b = (low - loc) / scale, (high - loc) / scale
    below, above = normal_cdf(a), 1 - normal_cdf(b)
    inside = 1 - below - above
    mean = low * below + high * above + loc * inside + scale * (normal_pdf(a) - normal_pdf(b))
    second = (
        low**2 * below
        + high**2 * above
        + (loc**2 + scale**2) * inside
        + 2 * loc * scale * (normal_pdf(a) - normal_pdf(b))
        + scale**2 * (a * normal_pdf(a) - b * normal_pdf(b))
    )
    return mean, second - mean**2


# ------------------------------------------------------------------------ the latent's parameters


def test_bounds_follow_the_formula() -> None:
    raw = torch.linspace(-40, 40, 24, dtype=torch.float64).reshape(3, 8)
    loc, scale = GaussianHead(loc_bound=5.0, scale_min=0.2, scale_max=3.0)(raw)
    for row in range(3):
        for i in range(4):
            x, s = raw[row, i].item(), raw[row, 4 + i].item()
            s = 3.0 - math.log1p(math.exp(3.0 - s))
            s = 0.2 + math.log1p(math.exp(s - 0.2))
            assert loc[row, i].item() == pytest.approx(5 * math.tanh(x / 5), rel=1e-12)
            assert scale[row, i].item() == pytest.approx(s, rel=1e-12)


@reproducible
@given(st.lists(wild, min_size=1, max_size=4), st.lists(wild, min_size=1, max_size=4))
def test_wild_inputs_stay_within_the_bounds(locs: list[float], scales: list[float]) -> None:
    size = min(len(locs), len(scales))
    raw = torch.tensor([*locs[:size], *scales[:size]], requires_grad=True)
    loc, scale = GaussianHead()(raw)
    assert (loc.abs() <= 30).all()
    # The lower softplus leaks by softplus(9.9) - 9.9 = 5e-5 over the upper bound.
    assert ((scale >= 0.1) & (scale <= 10 + 6e-5)).all()
    (loc.sum() + scale.sum()).backward()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()
    assert ((raw.grad >= 0) & (raw.grad <= 1)).all()


def test_gradient_is_alive_inside_the_bounds_and_beyond_them() -> None:
    raw = torch.tensor([0.0, 60.0, 1.0, 14.0], requires_grad=True)
    loc, scale = GaussianHead()(raw)
    (loc.sum() + scale.sum()).backward()
    assert raw.grad is not None
    assert raw.grad[0] == 1
    assert (raw.grad > 1e-3).all()


@pytest.mark.parametrize(
    ("given_dtype", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_alone_is_raised(given_dtype: torch.dtype, wanted: torch.dtype) -> None:
    loc, scale = GaussianHead()(torch.zeros(3, 4, dtype=given_dtype))
    assert loc.dtype == scale.dtype == full_precision(torch.zeros(1, dtype=given_dtype)).dtype
    assert loc.dtype == wanted


def test_bad_bounds_and_odd_sizes_are_refused() -> None:
    for kwargs in ({"loc_bound": 0}, {"scale_min": 0}, {"scale_min": 2, "scale_max": 1}):
        with pytest.raises(ValueError, match="0 < scale_min < scale_max"):
            GaussianHead(**kwargs)
    with pytest.raises(ValueError, match="output has size 5, .* of 2 .* 4 or 6 outputs"):
        GaussianHead()(torch.zeros(2, 5))


# ------------------------------------------------------------------------------- the action noise


@pytest.mark.parametrize(
    ("loc", "scale"), [(0.0, 0.2), (0.9, 0.5), (-0.7, 1.0), (0.0, 3.0), (1.5, 0.1)]
)
def test_moments_without_a_clip(loc: float, scale: float) -> None:
    torch.manual_seed(0)
    dist = ClampedNormal(torch.full((1,), loc, dtype=torch.float64), scale)
    draws = dist.sample((DRAWS,))
    mean, variance = censored_moments(loc, scale, -1, 1)
    spread = math.sqrt(max(variance, 1e-12) / DRAWS)
    assert draws.mean().item() == pytest.approx(mean, abs=5 * spread + 3e-6)
    assert draws.var().item() == pytest.approx(variance, rel=0.03, abs=1e-6)


@pytest.mark.parametrize("scale", [0.05, 0.2, 1.0])
def test_moments_of_clipped_noise(scale: float) -> None:
    torch.manual_seed(0)
    dist = ClampedNormal(torch.full((1,), 0.25, dtype=torch.float64), scale, noise_clip=0.3)
    draws = dist.sample((DRAWS,))
    _, variance = censored_moments(0.0, scale, -0.3, 0.3)
    assert draws.mean().item() == pytest.approx(0.25, abs=5 * math.sqrt(variance / DRAWS))
    assert draws.var().item() == pytest.approx(variance, rel=0.02)
    # As many draws sit on the two ends of the noise as a Normal has beyond them.
    at_ends = ((draws - 0.25).abs() > 0.3 - 1e-9).double().mean().item()
    assert at_ends == pytest.approx(2 * normal_cdf(-0.3 / scale), abs=0.005)


def test_it_is_not_a_truncated_normal() -> None:
    """The mass beyond the border sits on the border; a truncated Normal would mean 0.561."""
    torch.manual_seed(0)
    draws = ClampedNormal(torch.full((1,), 0.9), 0.5).sample((DRAWS,))
    assert draws.mean().item() == pytest.approx(0.747, abs=0.005)
    assert (draws > 1 - 2e-6).float().mean().item() == pytest.approx(normal_cdf(-0.2), abs=0.005)


@reproducible
@given(
    loc=st.floats(-1e6, 1e6, width=32),
    scale=st.floats(0, 1e6, width=32),
    low=st.floats(-1e3, 1e3, width=32),
    width=st.floats(2.0**-6, 1e3, width=32),
    clip=st.none() | st.floats(0, 10, width=32),
)
def test_actions_never_leave_the_range(
    loc: float, scale: float, low: float, width: float, clip: float | None
) -> None:
    torch.manual_seed(0)
    bounds = torch.tensor([low, low + width])
    dist = ClampedNormal(
        torch.tensor([loc]), torch.tensor([scale]), bounds[:1], bounds[1:], noise_clip=clip
    )
    for action in (dist.rsample((100,)), dist.sample((100,)), dist.deterministic_sample):
        assert ((action >= bounds[0]) & (action <= bounds[1])).all()


@reproducible
@given(
    loc=st.floats(-0.5, 0.5, width=32), scale=st.floats(0, 100, width=32), clip=st.floats(0, 0.4)
)
def test_noise_never_exceeds_its_clip(loc: float, scale: float, clip: float) -> None:
    torch.manual_seed(0)
    dist = ClampedNormal(torch.tensor([loc]), torch.tensor([scale]), noise_clip=clip)
    assert ((dist.sample((100,)) - loc).abs() <= clip + 1e-6).all()


def test_margin_is_kept_from_both_ends() -> None:
    loc = torch.tensor([5.0, -5.0], dtype=torch.float64)
    dist = ClampedNormal(loc, 0.1, low=-2.0, high=3.0, margin=0.25)
    torch.testing.assert_close(
        dist.sample((7,)), torch.tensor([2.75, -1.75], dtype=torch.float64).expand(7, 2)
    )
    default = ClampedNormal(loc, 0.1).deterministic_sample
    torch.testing.assert_close(
        default, torch.tensor([1 - 1e-6, -1 + 1e-6], dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_bounds_and_clip_per_dimension() -> None:
    torch.manual_seed(0)
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 10.0])
    clip = torch.tensor([0.1, 1.0])
    dist = ClampedNormal(torch.tensor([[0.0, 5.0]]).expand(4, 2), 50.0, low, high, noise_clip=clip)
    draws = dist.sample((1000,))
    assert draws.shape == (1000, 4, 2)
    torch.testing.assert_close(draws.amax((0, 1)), torch.tensor([0.1, 6.0]))
    torch.testing.assert_close(draws.amin((0, 1)), torch.tensor([-0.1, 4.0]))
    assert dist.support.check(draws).all()
    assert not dist.support.check(torch.tensor([0.0, 10.5]))


def test_gradient_passes_straight_through_the_clamp() -> None:
    torch.manual_seed(0)
    loc = torch.tensor([0.0, 0.999, 7.0, -7.0], dtype=torch.float64, requires_grad=True)
    draws = ClampedNormal(loc, 0.5).rsample((1000,))
    assert (draws[:, 2] == draws[0, 2]).all()
    (gradient,) = torch.autograd.grad(draws.mean(0).sum(), loc)
    torch.testing.assert_close(gradient, torch.ones_like(loc))
    (gradient,) = torch.autograd.grad(ClampedNormal(loc, 0.5).deterministic_sample.sum(), loc)
    torch.testing.assert_close(gradient, torch.ones_like(loc))


def test_gradient_of_the_scale_is_the_noise_that_was_not_clipped() -> None:
    torch.manual_seed(0)
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    loc = torch.full((1,), 0.9, dtype=torch.float64)
    draws = ClampedNormal(loc, scale, noise_clip=0.3, high=1.5).rsample((500,))
    for draw in draws:
        (gradient,) = torch.autograd.grad(draw.sum(), scale, retain_graph=True)
        noise = (draw - loc).item()
        clipped = abs(noise) > 0.3 - 1e-9
        assert gradient.item() == pytest.approx(0.0 if clipped else noise)


def test_sample_has_no_gradient_and_there_is_no_density() -> None:
    dist = ClampedNormal(torch.zeros(3, 2, requires_grad=True), 0.5)
    assert not dist.sample().requires_grad
    assert dist.rsample().requires_grad
    assert (dist.batch_shape, dist.event_shape) == ((3,), (2,))
    with pytest.raises(NotImplementedError, match="no density"):
        dist.log_prob(torch.zeros(3, 2))
    with pytest.raises(NotImplementedError, match="no entropy"):
        dist.entropy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_follow_the_seed_and_keep_the_dtype(dtype: torch.dtype) -> None:
    dist = ClampedNormal(torch.zeros(4, 3, dtype=dtype), 0.5, torch.full((3,), -1.0), 1.0)
    torch.manual_seed(1)
    first, second = dist.rsample((2,)), dist.rsample((2,))
    torch.manual_seed(1)
    again = dist.rsample((2,))
    assert first.dtype == dtype
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "mode",
    [
        ExplorationType.RANDOM,
        ExplorationType.DETERMINISTIC,
        ExplorationType.MEAN,
        ExplorationType.MODE,
    ],
)
def test_inside_a_probabilistic_module(mode: ExplorationType) -> None:
    module = ProbabilisticTensorDictModule(
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=ClampedNormal,
        distribution_kwargs={"low": -0.5, "high": 0.5, "noise_clip": 0.1},
        default_interaction_type="random",
    )
    loc = torch.tensor([0.0, 2.0]).expand(64, 2)
    td = TensorDict(loc=loc, scale=torch.ones(64, 2), batch_size=[64])
    with set_exploration_type(mode):
        action = module(td)["action"]
    center = loc.clamp(-0.5 + 1e-6, 0.5 - 1e-6)
    if mode == ExplorationType.RANDOM:
        assert 0.05 < (action - center)[:, 0].std() < 0.11
        assert ((action - center).abs() <= 0.1 + 1e-6).all()
    else:
        assert torch.equal(action, center)


# ------------------------------------------------------------------ groups of one-hot categoricals


def test_groups_agree_with_torchs_categoricals() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(5, 3, 4, dtype=torch.float64) for _ in range(2))
    ours = [OneHotGroups(logits) for logits in (p, q)]
    theirs = [D.Independent(D.OneHotCategorical(logits=logits), 1) for logits in (p, q)]
    value = ours[0].sample()
    torch.testing.assert_close(ours[0].entropy(), theirs[0].entropy())
    torch.testing.assert_close(D.kl_divergence(*ours), D.kl_divergence(*theirs))
    torch.testing.assert_close(
        ours[0].log_prob(value), theirs[0].log_prob(value.unflatten(-1, (3, 4)))
    )


def test_groups_are_drawn_with_their_probabilities() -> None:
    torch.manual_seed(0)
    dist = OneHotGroups(torch.tensor([[[2.0, 0.0, -1.0], [0.0, 0.0, 3.0]]]), unimix=0.1)
    draws = dist.rsample((20_000,))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert (draws.unflatten(-1, (2, 3)).sum(-1) == 1).all()
    torch.testing.assert_close(draws.mean(0), dist.mean, atol=0.02, rtol=0)
    assert dist.probs.min() >= 0.1 / 3
    assert torch.equal(dist.mode, torch.tensor([[1.0, 0, 0, 0, 0, 1.0]]))


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_gradient_of_groups_is_that_of_the_probabilities(deterministic: bool) -> None:
    logits = torch.randn(4, 2, 3, requires_grad=True)
    weight = torch.randn(4, 6)
    dist = OneHotGroups(logits)
    sample = dist.deterministic_sample if deterministic else dist.rsample()
    (found,) = torch.autograd.grad((sample * weight).sum(), logits)
    (wanted,) = torch.autograd.grad((logits.softmax(-1).flatten(-2) * weight).sum(), logits)
    torch.testing.assert_close(found, wanted)


def test_groups_under_vmap_and_in_half_precision() -> None:
    logits = torch.randn(3, 5, 2, 4)
    draws = torch.vmap(lambda x: OneHotGroups(x).rsample(), randomness="different")(logits)
    assert (draws.unflatten(-1, (2, 4)).sum(-1) == 1).all()
    assert OneHotGroups(logits.bfloat16()).rsample().dtype == torch.float32
    with pytest.raises(ValueError, match=r"unimix must be in \[0, 1\), got 1.5"):
        OneHotGroups(logits, unimix=1.5)

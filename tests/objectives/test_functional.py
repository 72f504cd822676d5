"""The mathematics of the objective against torch, loops and closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions as D

from alm_torchrl.objectives import functional

reproducible = settings(deadline=None, derandomize=True, max_examples=60)
seeds = st.integers(0, 2**31 - 1)
double = torch.float64


def diagonal_normal(loc: torch.Tensor, scale: torch.Tensor) -> D.Independent:
    return D.Independent(D.Normal(loc, scale), 1)


def random_normal(shape: tuple[int, ...], spread: float) -> D.Independent:
    loc = 30 * torch.tanh(spread * torch.randn(shape, dtype=double) / 30)
    return diagonal_normal(loc, (spread * torch.randn(shape, dtype=double)).exp().clamp(0.1, 10))


@reproducible
@given(seed=seeds, spread=st.floats(0, 50), size=st.integers(1, 5))
def test_kl_equals_torch_and_is_never_negative(seed: int, spread: float, size: int) -> None:
    torch.manual_seed(seed)
    p, q = random_normal((3, size), spread), random_normal((3, size), spread)
    kl = functional.kl_divergence(p, q)
    assert (kl >= -1e-12).all()
    torch.testing.assert_close(kl, D.kl_divergence(p, q), rtol=1e-10, atol=1e-12)
    assert functional.kl_divergence(p, p).abs().max() < 1e-12


def test_kl_puts_the_first_distribution_first() -> None:
    """KL(N(0, 1) || N(0, 2^2)) = log 2 + 1/8 - 1/2, and not the other way round."""
    one = torch.ones(1, dtype=double)
    narrow, wide = diagonal_normal(0 * one, one), diagonal_normal(0 * one, 2 * one)
    forward, backward = torch.tensor(2.0).log() + 1 / 8 - 1 / 2, 2 - 1 / 2 - torch.tensor(2.0).log()
    assert functional.kl_divergence(narrow, wide).item() == pytest.approx(forward.item())
    assert functional.kl_divergence(wide, narrow).item() == pytest.approx(backward.item())


def test_kl_sums_over_the_dimensions() -> None:
    one = torch.ones(2, 4, dtype=double)
    loc = torch.tensor([1.0, 2, 3, 4], dtype=double).expand(2, 4)
    kl = functional.kl_divergence(diagonal_normal(one, one), diagonal_normal(loc, one))
    torch.testing.assert_close(kl, torch.full((2,), 0.5 * (0 + 1 + 4 + 9), dtype=double))


def test_gradient_of_the_kl_equals_torch() -> None:
    torch.manual_seed(0)
    parameters = [torch.randn(3, 4, dtype=double) for _ in range(4)]
    parameters[1:4:2] = [p.exp() for p in parameters[1:4:2]]
    leaves = [p.requires_grad_() for p in parameters]
    p, q = diagonal_normal(*leaves[:2]), diagonal_normal(*leaves[2:])
    ours = torch.autograd.grad(functional.kl_divergence(p, q).sum(), leaves)
    theirs = torch.autograd.grad(D.kl_divergence(p, q).sum(), leaves)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (D.Categorical(logits=torch.tensor([[0.0, 1.0]])), D.Categorical(torch.ones(1, 2))),
        # Normals whose two dimensions are not one latent: summing over one of them is wrong.
        (
            D.Independent(D.Normal(torch.zeros(2, 3, 4), 1.0), 2),
            D.Independent(D.Normal(torch.ones(2, 3, 4), 2.0), 2),
        ),
        (
            D.Independent(D.Laplace(torch.zeros(2, 3), 1.0), 1),
            D.Independent(D.Laplace(torch.ones(2, 3), 2.0), 1),
        ),
    ],
)
def test_other_distributions_take_torchs_divergence(p: D.Distribution, q: D.Distribution) -> None:
    kl = functional.kl_divergence(p, q)
    assert kl.shape == p.batch_shape
    torch.testing.assert_close(kl, D.kl_divergence(p, q))


def test_kl_of_an_unknown_pair_is_refused() -> None:
    with pytest.raises(NotImplementedError):
        functional.kl_divergence(D.Bernoulli(0.5), D.Normal(0.0, 1.0))


def test_log_ratio_is_class_one_over_class_zero() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2)
    ratio = functional.log_ratio(logits)
    probability = logits.softmax(-1)
    assert ratio.shape == (2, 3, 1)
    torch.testing.assert_close(ratio[..., 0], (probability[..., 1] / probability[..., 0]).log())


@reproducible
@given(
    reward=st.floats(-10, 10),
    terminated=st.booleans(),
    value=st.floats(-100, 100) | st.just(float("nan")),
    gamma=st.floats(0, 1),
)
def test_td_target(reward: float, terminated: bool, value: float, gamma: float) -> None:
    target = functional.td_target(
        torch.tensor([reward], dtype=double),
        torch.tensor([terminated]),
        torch.tensor([value], dtype=double),
        torch.tensor(gamma, dtype=double),
    )
    expected = reward if terminated else reward + gamma * value
    assert target.item() == pytest.approx(expected, nan_ok=True)


def test_discounts_are_powers_on_the_time_axis() -> None:
    weights = functional.discounts(torch.tensor(0.9, dtype=double), 4)
    assert weights.shape == (4, 1)
    expected = torch.tensor([1.0, 0.9, 0.81, 0.729], dtype=double)
    torch.testing.assert_close(weights[:, 0], expected)


@reproducible
@given(seed=seeds, steps=st.integers(1, 6), gamma=st.floats(0, 1))
def test_bound_equals_a_loop(seed: int, steps: int, gamma: float) -> None:
    torch.manual_seed(seed)
    reward = torch.randn(3, steps, 1, dtype=double)
    value = torch.randn(3, 1, dtype=double)
    bound = functional.k_step_bound(reward, value, torch.tensor(gamma, dtype=double))
    assert bound.shape == (3, 1)
    for row in range(3):
        expected = value[row].item()
        for t in reversed(range(steps)):
            expected = reward[row, t].item() + gamma * expected
        assert bound[row].item() == pytest.approx(expected, abs=1e-12)


@reproducible
@given(
    windows=st.integers(1, 6).flatmap(
        lambda steps: st.lists(
            st.lists(st.tuples(st.booleans(), st.booleans()), min_size=steps, max_size=steps),
            min_size=1,
            max_size=4,
        )
    ),
    with_validity=st.booleans(),
)
def test_episode_mask_equals_a_loop(
    windows: list[list[tuple[bool, bool]]], with_validity: bool
) -> None:
    done = torch.tensor([[step[0] for step in window] for window in windows])
    valid = torch.tensor([[step[1] for step in window] for window in windows])
    mask = functional.episode_mask(done, valid if with_validity else None)
    assert mask.dtype == torch.bool
    for row, window in enumerate(windows):
        inside = True
        for t, (ends, holds_data) in enumerate(window):
            inside = inside and (holds_data or not with_validity)
            assert mask[row, t].item() is inside
            inside = inside and not ends

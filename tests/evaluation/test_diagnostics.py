"""Ranks, errors and calibrations in cases with known results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alm_torchrl.evaluation import (
    classifier_calibration,
    effective_rank,
    model_error,
    split_into_windows,
)
from alm_torchrl.evaluation.diagnostics import calibration, rollout_error
from tests.evaluation.test_bias import REWARDS, Line, exact_loss, rollout_for_bias, true_values

reproducible = settings(deadline=None, derandomize=True, max_examples=30)


def with_spectrum(spectrum: list[float], rows: int = 50, seed: int = 0) -> torch.Tensor:
    """Centered latents with these singular values."""
    torch.manual_seed(seed)
    size = len(spectrum)
    columns = torch.randn(rows, size, dtype=torch.float64)
    left = torch.linalg.qr(columns - columns.mean(0))[0]
    right = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    return left @ torch.tensor(spectrum, dtype=torch.float64).diag() @ right


@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [
        ([2.0, 2.0, 2.0, 2.0], 4.0),
        ([3.0, 0.0, 0.0], 1.0),
        ([1.0, 1.0, 0.0], 2.0),
        ([3.0, 1.0], float(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))),
    ],
)
def test_effective_rank(spectrum: list[float], rank: float) -> None:
    latents = with_spectrum(spectrum)
    for shifted in (latents, 7 * latents, latents + 100.0):
        assert effective_rank(shifted).item() == pytest.approx(rank, rel=1e-6)
    assert effective_rank(torch.ones(9, 3)).item() == 0.0


def test_rollout_error_is_in_units_of_the_variance() -> None:
    torch.manual_seed(0)
    encoded = torch.randn(200, 3, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 5.0])[:, None]
    mask = torch.ones(200, 3, dtype=torch.bool)
    ones = torch.ones(3, dtype=torch.float64)
    mean = encoded.mean(0).expand_as(encoded)
    torch.testing.assert_close(rollout_error(encoded, encoded, mask), 0 * ones)
    torch.testing.assert_close(rollout_error(mean, encoded, mask), ones)
    half = (mean + encoded) / 2
    torch.testing.assert_close(rollout_error(half, encoded, mask), 0.25 * ones)
    # Steps are separate, and masked rows count in neither error nor variance.
    mask[:50, 1] = False
    found = rollout_error(0 * encoded, encoded, mask)
    for t, rows in ((0, slice(None)), (1, slice(50, None)), (2, slice(None))):
        part = encoded[rows, t]
        expected = part.square().sum() / (part - part.mean(0)).square().sum()
        torch.testing.assert_close(found[t], expected)


@reproducible
@given(seed=st.integers(0, 10**6), bins=st.integers(1, 12))
def test_calibration_by_loops(seed: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    probability, label = rng.uniform(0, 1, 60), rng.uniform(0, 1, 60) < 0.3
    probability[:2] = 0.0, 1.0
    found = calibration(torch.from_numpy(probability), torch.from_numpy(label), bins)
    expected = 0.0
    for b in range(bins):
        inside = (probability >= b / bins) & ((probability < (b + 1) / bins) | (b == bins - 1))
        assert found.sizes[b] == inside.sum()
        if inside.any():
            assert found.confidence[b].item() == pytest.approx(probability[inside].mean())
            assert found.frequency[b].item() == pytest.approx(label[inside].mean())
            share = inside.mean()
            expected += share * abs(label[inside].mean() - probability[inside].mean())
        else:
            assert found.confidence[b].isnan()
    assert found.error.item() == pytest.approx(expected)


def test_a_calibrated_probability_has_no_error() -> None:
    probability = torch.tensor([0.25] * 4 + [0.75] * 4, dtype=torch.float64)
    label = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0], dtype=torch.bool)
    assert calibration(probability, label).error == 0
    assert calibration(1 - probability, label).error.item() == pytest.approx(0.5)


def test_windows_do_not_overlap() -> None:
    rollout = torch.arange(20).reshape(2, 10)
    assert split_into_windows(rollout, 4).tolist() == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [10, 11, 12, 13],
        [14, 15, 16, 17],
    ]
    with pytest.raises(ValueError, match="a rollout of 10 steps is shorter than length=11"):
        split_into_windows(rollout, 11)


def test_an_exact_model_has_no_error_and_episodes_are_not_joined() -> None:
    loss = exact_loss(true_values(), REWARDS)
    windows = split_into_windows(rollout_for_bias(loss, Line(), 60), 4)
    assert windows["next", "done"][:, :-1].any()
    errors = model_error(loss, windows)
    assert errors.shape == (4,)
    assert errors.max() < 1e-6
    with torch.no_grad():  # the error of a constant model grows by one at every step
        next(loss.dynamics.parameters()).fill_(0.0)
    errors = model_error(loss, windows)
    inside = windows["next", "done"].squeeze(-1).int().cumsum(1)
    inside = (inside - windows["next", "done"].squeeze(-1).int()) == 0
    for t in range(4):
        states = windows["next", "observation"][inside[:, t], t]
        variance = states.var(correction=0).item()
        assert errors[t].item() == pytest.approx((t + 1) ** 2 / variance, rel=1e-4)


def test_the_classifier_sees_both_labels() -> None:
    """An undecided classifier is calibrated; one that always says 1 is wrong half the time."""
    loss = exact_loss(true_values(), REWARDS)
    transitions = rollout_for_bias(loss, Line(), 30).reshape(-1)
    found = classifier_calibration(loss, transitions)
    assert found.error == 0
    assert found.sizes.sum() == 60
    assert found.frequency[5] == 0.5
    with torch.no_grad():
        next(loss.classifier_params.parameters()).copy_(torch.tensor([-20.0, 20.0]))
    found = classifier_calibration(loss, transitions)
    assert found.error.item() == pytest.approx(0.5)
    assert found.confidence[9].item() == pytest.approx(1.0)


def test_label_one_is_the_encoded_latent() -> None:
    """A classifier that knows the predictions of the model is right about both."""
    loss = exact_loss(true_values(), REWARDS)
    with torch.no_grad():  # the model is constant, while the state changes
        next(loss.dynamics.parameters()).fill_(0.0)

    def moved(latent, action, following):
        away = 20.0 * ((following - latent).round() - 0.5)
        return torch.cat([-away, away], -1)

    loss.classifier.module.forward = moved
    transitions = rollout_for_bias(loss, Line(), 30).reshape(-1)
    found = classifier_calibration(loss, transitions)
    assert found.error.item() < 1e-6
    assert found.frequency[9] == 1.0
    assert found.frequency[0] == 0.0

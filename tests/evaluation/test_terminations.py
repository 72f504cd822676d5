"""Terminations in imagination, and values before them, in cases with known results."""

from __future__ import annotations

import pytest
import torch

from alm_torchrl.evaluation import rollout_for_bias, terminations
from tests.evaluation.test_bias import GAMMA, LENGTH, REWARDS, Line, exact_loss, true_values

SURE = torch.tensor([20.0] * (LENGTH - 1) + [-20.0])


def test_an_exact_model_ends_where_the_task_ends() -> None:
    loss = exact_loss(true_values(), REWARDS, continuation=SURE)
    found = terminations(loss, rollout_for_bias(loss, Line(), 40), steps=20, near=2)
    assert found.precision == found.recall == 1
    assert found.calibration_error.item() < 1e-6
    assert found.real_length == LENGTH
    assert found.imagined_length.item() == pytest.approx(LENGTH)
    first = true_values()[0].item()
    assert found.real_return.item() == pytest.approx(first)
    assert found.imagined_return.item() == pytest.approx(first)
    assert found.starting_value.item() == pytest.approx(first)
    ending = (REWARDS[-1] + REWARDS[-2] + GAMMA * REWARDS[-1]) / 2
    assert found.return_near_end.item() == pytest.approx(ending.item())
    assert found.value_near_end.item() == pytest.approx(ending.item())


def test_a_model_that_ends_too_early_or_too_late() -> None:
    rollout = rollout_for_bias(exact_loss(true_values(), REWARDS), Line(), 40)
    early = SURE.roll(-2)  # two steps early, and never at the end
    found = terminations(exact_loss(true_values(), REWARDS, continuation=early), rollout, steps=20)
    assert found.precision == found.recall == 0
    assert found.imagined_length.item() == pytest.approx(LENGTH - 2)
    # Of each episode, one of six steps is missed and one is wrong.
    assert found.calibration_error.item() == pytest.approx(2 / 6, abs=0.02)
    half = torch.zeros(LENGTH)  # each step ends with probability one half
    found = terminations(exact_loss(true_values(), REWARDS, continuation=half), rollout, steps=4)
    assert found.recall == 1
    assert found.precision.item() == pytest.approx(6 / 40)
    assert found.imagined_length.item() == pytest.approx(1 + 1 / 2 + 1 / 4 + 1 / 8)
    assert found.real_length == 4
    weights = GAMMA ** torch.arange(4)
    assert found.real_return.item() == pytest.approx((weights @ REWARDS[:4]).item())
    expected = (weights * 0.5 ** torch.arange(4)) @ REWARDS[:4]
    assert found.imagined_return.item() == pytest.approx(expected.item())


def test_a_terminal_flag_without_done_ends_nothing() -> None:
    loss = exact_loss(true_values(), REWARDS, continuation=SURE)
    rollout = rollout_for_bias(loss, Line(), 40)
    expected = terminations(loss, rollout, steps=20)
    rollout["next", "terminated"] = torch.ones_like(rollout["next", "terminated"])
    assert terminations(loss, rollout, steps=20)._asdict() == expected._asdict()


def test_a_wrong_model_and_wrong_values_are_told_apart() -> None:
    rollout = rollout_for_bias(exact_loss(true_values(), REWARDS), Line(), 40)
    first = true_values()[0].item()
    values = exact_loss(true_values(), REWARDS, offset=3.0, continuation=SURE)
    found = terminations(values, rollout, steps=20)
    assert found.imagined_return.item() == pytest.approx(found.real_return.item())
    assert found.starting_value.item() == pytest.approx(first + 3)
    model = exact_loss(true_values(), REWARDS, wrong=1.0, continuation=SURE)
    found = terminations(model, rollout, steps=20)
    assert found.real_return.item() == pytest.approx(first)
    too_high = sum(GAMMA**t for t in range(LENGTH))
    assert found.imagined_return.item() == pytest.approx(first + too_high)


def test_values_that_do_not_see_the_end() -> None:
    blind = exact_loss(true_values(), REWARDS, offset=3.0)
    found = terminations(blind, rollout_for_bias(blind, Line(), 40), near=3)
    assert (found.value_near_end - found.return_near_end).item() == pytest.approx(3.0)


def test_without_a_continuation_model_imagined_episodes_are_as_long_as_asked() -> None:
    loss = exact_loss(true_values(), REWARDS)
    found = terminations(loss, rollout_for_bias(loss, Line(), 40), steps=10)
    assert found.imagined_length == 10
    assert found.recall == 0
    assert found.precision.isnan()


def test_without_terminations_nothing_is_known_about_them() -> None:
    loss = exact_loss(true_values(), REWARDS, continuation=torch.full((30,), 20.0))
    found = terminations(loss, rollout_for_bias(loss, Line(endless=True), 20), steps=9)
    assert found.recall.isnan()
    assert found.value_near_end.isnan()
    assert found.real_length == 9
    assert found.imagined_length.item() == pytest.approx(9)


def test_episodes_that_start_too_late_are_not_compared() -> None:
    loss = exact_loss(true_values(), REWARDS, continuation=SURE)
    rollout = rollout_for_bias(loss, Line(), 20)
    assert terminations(loss, rollout, steps=21).real_length.isnan()
    assert terminations(loss, rollout, steps=20).real_length == LENGTH

"""Measurements at every evaluation: files, loggers, checkpoints, and unchanged training."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from alm_torchrl.envs import make_env
from alm_torchrl.evaluation import effective_rank, rollout_for_bias, value_bias
from alm_torchrl.training import (
    ALMModule,
    Diagnostics,
    Measurement,
    ValueBias,
    find_checkpoint,
    make_trainer,
)
from tests.evaluation.test_bias import Line
from tests.training.test_seeds import make_module as make_stacked
from tests.training.tiny import make_module

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def fit(folder: Path, module: ALMModule, *callbacks: Measurement, **options) -> None:
    folder.mkdir(exist_ok=True)
    common = {"seed": 7, "eval_every": 6, "accelerator": "cpu", "tensorboard": False}
    trainer = make_trainer(folder, callbacks=callbacks, **common, **options)
    trainer.fit(module)


def rows(path: Path) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(path.open())]


def test_files_loggers_and_checkpoints_hold_the_numbers(tmp_path: Path) -> None:
    bias = ValueBias(tmp_path, seed=7, steps=20, tail=1.0)
    diagnostics = Diagnostics(tmp_path, seed=7, steps=30, length=5)
    module = make_module(env=Line(), eval_env=Line())
    fit(tmp_path, module, bias, diagnostics, checkpoint_every=6)
    for name in ("bias", "diagnostics"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        found = rows(tmp_path / f"{name}.csv")
        assert [(row["step"], row["seed"]) for row in found] == [(6, 7), (12, 7)]
        logged = list(csv.DictReader((tmp_path / "logs/csv/metrics.csv").open()))
        for key in found[0].keys() - {"step", "seed"}:
            values = [float(row[f"eval/{key}"]) for row in logged if row[f"eval/{key}"]]
            expected = [row[key] for row in found]
            torch.testing.assert_close(
                torch.tensor(values), torch.tensor(expected), equal_nan=True, rtol=0, atol=1e-6
            )
    assert set(rows(tmp_path / "bias.csv")[0]) == {
        *("step", "seed", "bias_value", "bias_value_std", "bias_bound", "bias_bound_std"),
        *("bias_monte_carlo", "bias_states"),
    }
    numbers = rows(tmp_path / "diagnostics.csv")[0]
    assert 1 <= numbers["effective_rank"] <= 4
    assert 0 <= numbers["calibration_error"] <= 1
    assert all(numbers[f"model_error_{t}"] > 0 for t in range(1, 6))
    assert "model_error_6" not in numbers
    assert {f"confidence_{b}" for b in range(10)} < numbers.keys()

    state = torch.load(find_checkpoint(tmp_path / "checkpoints").state, weights_only=True)
    kept = state["callbacks"][bias.state_key]
    again = ValueBias(tmp_path, seed=7)
    again.load_state_dict(kept)
    assert again.rows == bias.rows
    assert len(again.rows) == 2


def test_the_numbers_are_those_of_the_functions(tmp_path: Path) -> None:
    module = make_module(env=Line(), eval_env=Line())
    rollout = rollout_for_bias(module.loss, module.eval_env, 32)  # the last two steps are cut off
    torch.manual_seed(0)
    expected = value_bias(module.loss, rollout, tail=1.0)
    torch.manual_seed(0)
    found = ValueBias(tmp_path, seed=0, tail=1.0).measure(module.loss, rollout)
    assert found["bias_bound"] == expected.bound
    assert found["bias_states"] == 32
    assert found["bias_value_std"] == expected.value_std
    found = Diagnostics(tmp_path, seed=0).measure(module.loss, rollout)
    rank = effective_rank(module.loss.encoding(rollout.reshape(-1)).mean)
    torch.testing.assert_close(found["effective_rank"], rank)
    assert "model_error_20" in found


def test_measurements_do_not_change_a_run(tmp_path: Path) -> None:
    """Neither the trained weights nor the episodes of evaluations change."""
    weights, curves = [], []
    for name in ("with", "without"):
        envs = {
            key: make_env("Pendulum-v1", seed=3, max_episode_steps=20)
            for key in ("env", "eval_env")
        }
        module, folder = make_module(**envs), tmp_path / name
        fit(folder, module, *([Diagnostics(folder, seed=0, steps=10)] if name == "with" else []))
        weights.append(nn.utils.parameters_to_vector(module.loss.parameters()))
        curves.append([row["return"] for row in rows(folder / "curve.csv")])
    assert torch.equal(*weights)
    assert curves[0] == curves[1]
    assert len(curves[0]) == 2


def test_a_measurement_of_the_user(tmp_path: Path) -> None:
    class Reward(Measurement):
        name = "reward"

        def measure(self, loss, rollout):
            return {"reward": rollout["next", "reward"].mean()}

    fit(tmp_path, make_module(6), measurements=[partial(Reward, steps=5)])
    assert rows(tmp_path / "reward.csv")[0].keys() == {"step", "seed", "reward"}
    assert (tmp_path / "reward.png").stat().st_size > 1000


def test_every_seed_has_its_own_measurements(tmp_path: Path) -> None:
    module = make_stacked()
    options = {"measurements": [partial(Diagnostics, steps=10)], "num_seeds": 2}
    fit(tmp_path, module, **options)
    first, second = (rows(tmp_path / f"seed{seed}/diagnostics.csv") for seed in (7, 8))
    assert [row["seed"] for row in first + second] == [7, 7, 8, 8]
    assert first[0]["effective_rank"] != second[0]["effective_rank"]
    logged = (tmp_path / "logs/csv/metrics.csv").read_text()
    assert str(first[1]["effective_rank"]) in logged
    assert str(second[1]["effective_rank"]) not in logged


def test_a_run_continues_if_a_time_limit_hides_every_return(tmp_path: Path) -> None:
    """The environment's episodes end after ten steps."""
    bias = ValueBias(tmp_path, seed=0, steps=30)
    with pytest.warns(
        UserWarning,
        match="bias is not measured .*: .* time limit",
    ):
        fit(tmp_path, make_module(), bias)
    found = rows(tmp_path / "bias.csv")
    assert [row["step"] for row in found] == [6, 12]
    assert all(math.isnan(row["bias_value"]) and row["bias_states"] == 0 for row in found)
    assert (tmp_path / "bias.png").stat().st_size > 1000

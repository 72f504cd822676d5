"""Sweeps that go on, and are kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments import sweep
from tests.experiments.test_reproduce import trained  # noqa: F401 - a fixture

SWEEP = """
preset: quickstart
tasks: {halfcheetah: 20, walker2d: 10}
seeds: [0, 1]
evaluate_every: 10
options: [run.compile=never]
candidates:
  plain: []
  slow: [learning_rates.actor=1e-4]
"""


def main(tmp_path: Path, monkeypatch, *arguments: str) -> int:
    (tmp_path / "tried.yaml").write_text(SWEEP)
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    given = ["sweep.py", str(tmp_path / "tried.yaml"), *folders, *arguments]
    monkeypatch.setattr(sys, "argv", given)
    return sweep.main()


def test_every_candidate_is_run_once_and_kept(tmp_path: Path, monkeypatch, trained) -> None:  # noqa: F811
    assert main(tmp_path, monkeypatch, "--only", "slow") == 0
    assert len(trained) == 4
    assert main(tmp_path, monkeypatch) == 0
    assert len(trained) == 8
    assert "learning_rates.actor=1e-4" in trained[0]
    assert "learning_rates.actor=1e-4" not in trained[4]
    assert all("run.compile=never" in command for command in trained)
    runs = json.loads((tmp_path / "results/runs.json").read_text())
    assert len(runs) == 8
    one = runs["walker2d-quickstart-slow-seed1.csv"]
    assert (one["task"], one["what"]) == ("walker2d", "quickstart-slow")
    assert "training.total_steps=10" in one["command"]


def test_a_mistake_is_named(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(
        SystemExit, match=r"no candidates \['fast'\]; choose from \['plain', 'slow'\]"
    ):
        main(tmp_path, monkeypatch, "--only", "fast")
    monkeypatch.setattr(sys, "argv", ["sweep.py", str(tmp_path / "nowhere.yaml")])
    with pytest.raises(SystemExit, match=r"No such file .*nowhere\.yaml"):
        sweep.main()
    (tmp_path / "short.yaml").write_text("preset: quickstart\ntasks: {}\nseeds: [0]\noptions: []\n")
    with pytest.raises(ValueError, match="lacks evaluate_every, candidates"):
        sweep.plan(tmp_path / "short.yaml")


def test_the_sweep_of_the_fast_preset_can_be_planned() -> None:
    runs = sweep.plan(sweep.ROOT / "experiments/sweeps/fast.yaml")
    assert len({run.name for run in runs}) == len(runs) > 2

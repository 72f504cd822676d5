"""Training runs and keeping their curves."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import reproduce

FIELDS = ["step", "seed", "return", "return_std", "frames", "seconds"]


@pytest.fixture
def trained(monkeypatch) -> list[list[str]]:
    """Writes what a training would leave, and notes its command."""
    commands = []

    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, stdout="abc1234\n")
        commands.append(command[1:])
        words = dict(word.split("=", 1) for word in command if "=" in word)
        if "run.folder" in words:
            folder, seed, last = (words[k] for k in ("run.folder", "seed", "training.total_steps"))
        else:
            folder, seed, last = (
                command[command.index(k) + 1] for k in ("--folder", "--seed", "--steps")
            )
        curve(Path(folder) / "curve.csv", int(seed), range(10, int(last) + 1, 10))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    return commands


def curve(path: Path, seed: int, steps: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        writer.writerows((s, seed, 100.0 * s + seed, 0.0, s + 5, 6.0 * s) for s in steps)


def main(tmp_path: Path, monkeypatch, *arguments: str) -> int:
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["reproduce", *folders, "--eval-every", "10", *arguments])
    return reproduce.main()


def test_what_is_done_is_passed_over_and_what_is_short_goes_on(
    tmp_path: Path, monkeypatch, trained
) -> None:
    asked = ["--what", "paper", "sac", "--seeds", "0", "1"]
    assert main(tmp_path, monkeypatch, *asked, "--steps", "20") == 0
    assert len(trained) == 4
    assert "resume=auto" in trained[0]
    assert trained[2][:3] == ["experiments/sac.py", "--algorithm", "sac"]
    assert main(tmp_path, monkeypatch, *asked, "--steps", "20") == 0
    assert len(trained) == 4
    assert main(tmp_path, monkeypatch, "--what", "paper", "--seeds", "1", "--steps", "30") == 0
    assert len(trained) == 5
    runs = json.loads((tmp_path / "results/runs.json").read_text())
    assert sorted(runs) == [
        f"halfcheetah-{w}-seed{s}.csv" for w in ("paper", "sac") for s in (0, 1)
    ]
    one = runs["halfcheetah-paper-seed1.csv"]
    assert one["commit"] == "abc1234"
    assert "training.total_steps=30" in one["command"]
    assert str(tmp_path) not in one["command"]
    assert (tmp_path / "results/halfcheetah-paper-seed1.csv").read_text().count("\n") == 4


def test_peers_may_have_other_steps_and_are_resumed(tmp_path: Path, monkeypatch, trained) -> None:
    steps = ["--steps", "10", "--peer-steps", "30"]
    assert main(tmp_path, monkeypatch, "--what", "fast", "sac", "--seeds", "0", *steps) == 0
    assert "training.total_steps=10" in trained[0]
    assert trained[1][trained[1].index("--steps") + 1] == "30"
    assert trained[1][-1] == "--resume"
    assert main(tmp_path, monkeypatch, "--what", "sac", "--seeds", "0", *steps) == 0
    assert len(trained) == 2


def test_options_and_their_name_go_with_the_curve(tmp_path: Path, monkeypatch, trained) -> None:
    extra = ["--option", "run.precision=bf16-mixed", "--suffix=-bf16", "--timed"]
    main(tmp_path, monkeypatch, "--what", "paper", "--seeds", "2", "--steps", "10", *extra)
    assert "run.precision=bf16-mixed" in trained[0]
    runs = json.loads((tmp_path / "results/runs.json").read_text())
    one = runs["halfcheetah-paper-bf16-seed2.csv"]
    assert (one["what"], one["timed"]) == ("paper-bf16", True)


def test_options_without_a_name_are_other_runs(tmp_path: Path, monkeypatch, trained) -> None:
    asked = ["--what", "paper", "--seeds", "0", "--steps", "10"]
    for rate in ("1e-3", "1e-4", "1e-4"):
        main(tmp_path, monkeypatch, *asked, "--option", f"learning_rates.actor={rate}")
    assert len(trained) == 2
    names = sorted(json.loads((tmp_path / "results/runs.json").read_text()))
    assert names == [
        f"halfcheetah-paper-learning_rates.actor_{rate}-seed0.csv" for rate in (0.0001, 0.001)
    ]


def test_a_failed_run_is_counted_and_not_kept(tmp_path: Path, monkeypatch) -> None:
    failed = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *_, **__: failed)
    assert main(tmp_path, monkeypatch, "--what", "paper", "--seeds", "0", "1") == 2
    assert not (tmp_path / "results").exists()

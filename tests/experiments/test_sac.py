"""The baselines train and write the same curve as the recipe."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from experiments import sac


@pytest.mark.parametrize("algorithm", ["sac", "redq"])
def test_a_baseline_trains_and_writes_a_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    options = ["--algorithm", algorithm, "--warmup", "20", "--steps", "2", "--eval-every", "1"]
    options += ["--seed", "3", "--device", "cpu", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sac.py", *options])
    sac.main()
    rows = [line.split(",") for line in (tmp_path / "curve.csv").read_text().splitlines()]
    assert rows[0] == ["step", "seed", "return", "return_std", "frames", "seconds"]
    assert [(row[0], row[1], row[4]) for row in rows[1:]] == [("1", "3", "21"), ("2", "3", "22")]

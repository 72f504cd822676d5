"""Curves over seeds: what is grouped, what is averaged, and how wide the interval is."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.plot import interquartile_mean, read, summarize

SCRIPT = Path(__file__).resolve().parents[2] / "experiments/plot.py"


def write(folder: Path, seed: int, returns: dict[int, float]) -> Path:
    folder.mkdir(parents=True)
    lines = [f"{step},{seed},{value},1.0,{step + 10},0.5" for step, value in returns.items()]
    header = "step,seed,return,return_std,frames,seconds"
    (folder / "curve.csv").write_text("\n".join([header, *lines]) + "\n")
    return folder


def test_runs_are_grouped_by_all_but_seed_and_time(tmp_path: Path, capsys) -> None:
    folders = [
        write(tmp_path / "hopper-paper-seed0-20261124-101010", 0, {1: 10.0}),
        write(tmp_path / "hopper-paper-seed1-20261124-111111", 1, {1: 20.0, 2: 30.0}),
        write(tmp_path / "hopper-paper-seed1-20261124-121212", 1, {1: 99.0}),
        write(tmp_path / "hopper-quickstart-seed0", 0, {1: 5.0}),
    ]
    several = tmp_path / "ant-paper-seed3"
    write(several / "seed3", 3, {1: 1.0})
    write(several / "seed4", 4, {1: 2.0})
    assert read([*folders, several]) == {
        "hopper-paper": {0: {1: 10.0}, 1: {1: 20.0, 2: 30.0}},
        "hopper-quickstart": {0: {1: 5.0}},
        "ant-paper": {3: {1: 1.0}, 4: {1: 2.0}},
    }
    assert "several runs of seed 1" in capsys.readouterr().err


def test_the_mean_leaves_out_the_outer_quarters() -> None:
    returns = [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 1e6]
    (row,) = summarize({seed: {7: value} for seed, value in enumerate(returns)})
    assert row[:3] == (7, 8, pytest.approx(35.0))
    assert row[3] < 35.0 < row[4]


def test_quartiles_that_cut_a_value_count_it_in_part() -> None:
    assert interquartile_mean(np.array([4.0])) == 4.0
    assert interquartile_mean(np.array([1.0, 2.0])) == 1.5
    assert interquartile_mean(np.array([9.0, 0.0, 3.0])) == pytest.approx((9 + 0 + 4 * 3) / 6)
    five = np.array([5.0, 1.0, 2.0, 30.0, 4.0])  # of 2.5 values: 0.75, 1 and 0.75
    assert interquartile_mean(five) == pytest.approx((0.75 * 2 + 4 + 0.75 * 5) / 2.5)
    table = np.stack([five, five + 1.0])
    np.testing.assert_allclose(
        interquartile_mean(table, axis=1), interquartile_mean(table.T, axis=0)
    )


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        draws = rng.normal(5.0, 2.0, 20)
        ((_, _, _, low, high),) = summarize({s: {0: float(x)} for s, x in enumerate(draws)}, 300)
        hits += low < 5.0 < high
    assert 84 <= hits <= 100


def test_one_seed_has_no_interval_and_few_seeds_no_row() -> None:
    assert summarize({0: {1: 3.0}}) == [(1, 1, 3.0, 3.0, 3.0)]
    curves = {0: {1: 1.0, 2: 1.0}, 1: {1: 1.0}, 2: {1: 1.0}}
    assert [row[0] for row in summarize(curves)] == [1]


def test_the_script_draws_and_writes(tmp_path: Path, monkeypatch, capsys) -> None:
    folders = [write(tmp_path / f"a-seed{s}", s, {1: s, 2: 2.0 * s}) for s in range(4)]
    out = tmp_path / "figure.png"
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, folders), "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert out.stat().st_size > 1000
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [(row["name"], row["step"], row["seeds"], row["iqm"]) for row in rows] == [
        ("a", "1", "4", "1.5"),
        ("a", "2", "4", "3.0"),
    ]


def test_folders_without_a_curve_are_passed_over_with_a_note(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    good = write(tmp_path / "a-seed0", 0, {1: 3.0})
    early = write(tmp_path / "a-seed1", 1, {})
    (tmp_path / "rejected").mkdir()
    file = tmp_path / "multirun.yaml"  # runs/* includes it
    file.touch()
    assert read([good, early, tmp_path / "rejected", file]) == {"a": {0: {1: 3.0}}}
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        f"{early / 'curve.csv'}: no return yet; passed over",
        f"{tmp_path / 'rejected'}: no curve.csv or seed*/curve.csv; passed over",
        f"{file}: no curve.csv or seed*/curve.csv; passed over",
    ]
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", ["plot.py", str(early), "--out", str(tmp_path / "out.png")])
    with pytest.raises(SystemExit, match="no folder has a curve with a return"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not (tmp_path / "out.png").exists()

"""Reads the kept curves and computes the numbers of the results page."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.plot import interquartile_mean

#: Random frames before the authors' counter starts.
AUTHORS_WARMUP = 5_000
#: Seeds per task in the paper.
AUTHORS_SEEDS = 5
#: Method under which the authors' scores appear among the published results.
AUTHORS = "ALM, authors"
Rows = list[dict[str, float]]
#: By task, by label, by seed.
Curves = dict[str, dict[str, dict[int, Rows]]]


class Point(NamedTuple):
    """Returns of several seeds after a number of frames.

    Attributes:
        frames: environment steps, including the warm-up.
        seeds: number of seeds.
        mean: mean return.
        std: sample standard deviation over seeds; NaN for one seed.
        iqm: interquartile mean; NaN if unknown or for fewer than 3 seeds.
        interpolated: whether the mean was interpolated between two evaluations.
    """

    frames: int
    seeds: int
    mean: float
    std: float
    iqm: float = np.nan
    interpolated: bool = False


class TimedRun(NamedTuple):
    """A run that was alone on its machine, so that ``seconds`` measure speed."""

    label: str
    machine: str
    rows: Rows


def read(results: Path) -> tuple[Curves, dict[str, dict[str, Any]]]:
    """Reads all curves and the index of runs."""
    runs = json.loads((results / "runs.json").read_text(encoding="utf-8"))
    curves: Curves = defaultdict(lambda: defaultdict(dict))
    for name, run in runs.items():
        with (results / name).open(newline="") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        curves[run["task"]][run["what"]][seed_of(name)] = rows
    return curves, runs


def timed_runs(task: str, curves: Curves, runs: dict[str, dict[str, Any]]) -> list[TimedRun]:
    """Returns the timed runs of a task by label."""
    timed = [
        TimedRun(run["what"], run["machine"], curves[task][run["what"]][seed_of(name)])
        for name, run in runs.items()
        if run["task"] == task and run["timed"]
    ]
    return sorted(timed, key=lambda run: run.label)


def seed_of(name: str) -> int:
    """Returns the seed in the name of a curve's file."""
    return int(name.rpartition("seed")[2].removesuffix(".csv"))


def read_published(results: Path) -> dict[str, dict[str, list[Point]]]:
    """Reads published results by task and method: the authors' scores, then other methods."""
    published: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    with (results / "authors.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            std = sample_deviation(float(row["std"]), AUTHORS_SEEDS)
            frames = int(row["step"]) + AUTHORS_WARMUP
            point = Point(frames, AUTHORS_SEEDS, float(row["mean"]), std)
            published[row["task"]][AUTHORS].append(point)
    with (results / "anchors.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            frames, seeds = int(row["frames"]), int(row["seeds"])
            mean, std, between = float(row["mean"]), float(row["std"]), row["interpolated"] == "yes"
            point = Point(frames, seeds, mean, std, interpolated=between)
            published[row["task"]][row["method"]].append(point)
    return published


def sample_deviation(population_std: float, count: int) -> float:
    """Converts a population standard deviation of ``count`` values to the sample deviation."""
    return population_std * float(np.sqrt(count / (count - 1)))


def summarize_seeds(curves: dict[int, Rows]) -> list[Point]:
    """Summarizes returns over seeds, at every number of frames that half of the seeds reach."""
    returns: dict[int, list[float]] = defaultdict(list)
    for rows in curves.values():
        for row in rows:
            returns[int(row["frames"])].append(row["return"])
    points = []
    for frames, values in sorted(returns.items()):
        seeds = len(values)
        if 2 * seeds >= len(curves):
            std = float(np.std(values, ddof=1)) if seeds > 1 else np.nan
            iqm = float(interquartile_mean(np.array(values))) if seeds > 2 else np.nan
            points.append(Point(frames, seeds, float(np.mean(values)), std, iqm))
    return points


def warmup_frames(curves: dict[int, Rows]) -> int:
    """Returns the number of random frames before the first step."""
    first = next(iter(curves.values()))[0]
    return int(first["frames"] - first["step"])


def first_reaching(rows: Rows, wanted: float) -> dict[str, float] | None:
    """Returns the first evaluation with at least the wanted return."""
    return next((row for row in rows if row["return"] >= wanted), None)

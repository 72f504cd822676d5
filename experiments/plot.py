"""Draws learning curves over seeds: ``python experiments/plot.py runs/halfcheetah-paper-* ...``.

Runs that differ only in seed and start time form one curve: the interquartile mean over seeds with
a 95 % bootstrap interval. A CSV file beside the figure holds the numbers.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

#: Suffix that distinguishes the seeds of one curve.
SEED = re.compile(r"-seed\d+(-\d{8}-\d{6})?$")
Curves = dict[str, dict[int, dict[int, float]]]


def read(folders: list[Path]) -> Curves:
    """Reads returns by name, seed and step. The longest run of a seed is used.

    Folders without a curve, or with an empty one, are passed over with a note.

    Raises:
        FileNotFoundError: if no folder holds a curve.
    """
    curves: Curves = defaultdict(dict)
    for folder in folders:
        found = sorted({*folder.glob("curve.csv"), *folder.glob("seed*/curve.csv")})
        if not found:
            print(f"{folder}: no curve.csv or seed*/curve.csv; passed over", file=sys.stderr)
        for path in found:
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["return"]]
            if not rows:
                print(f"{path}: no return yet; passed over", file=sys.stderr)
                continue
            seed, name = int(rows[0]["seed"]), SEED.sub("", folder.resolve().name)
            curve = {int(row["step"]): float(row["return"]) for row in rows}
            known = curves[name].get(seed, {})
            if known:
                print(f"{name}: several runs of seed {seed}; using the longest", file=sys.stderr)
            curves[name][seed] = max(known, curve, key=len)
    if not curves:
        raise FileNotFoundError("no folder has a curve with a return")
    return dict(curves)


def interquartile_mean(returns: np.ndarray, axis: int = -1) -> np.ndarray:
    """Returns the mean of the middle half of the values.

    Values that the quartiles cut count in part, so the result differs from the mean for 3 values.
    """
    count = returns.shape[axis]
    weights = np.diff(np.clip(np.arange(count + 1), count / 4, 3 * count / 4))
    return np.average(np.sort(returns, axis=axis), axis=axis, weights=weights)


def summarize(
    curves: dict[int, dict[int, float]], samples: int = 2000
) -> list[tuple[int, int, float, float, float]]:
    """Computes the interquartile mean and its bootstrap interval at every step.

    Args:
        curves: return by seed and step.
        samples: number of bootstrap samples.

    Returns:
        For every step that at least half of the seeds reach: step, number of seeds, interquartile
        mean, and both ends of the interval (equal to the mean for one seed).
    """
    rows = []
    for step in sorted({step for curve in curves.values() for step in curve}):
        returns = np.array([curve[step] for curve in curves.values() if step in curve])
        if 2 * len(returns) < len(curves):
            continue
        mean = low = high = float(interquartile_mean(returns))
        if len(returns) > 1:
            interval = stats.bootstrap(
                (returns,),
                interquartile_mean,
                n_resamples=samples,
                method="percentile",
                rng=np.random.default_rng(0),
            ).confidence_interval
            low, high = float(interval.low), float(interval.high)
        rows.append((step, len(returns), mean, low, high))
    return rows


def main() -> None:
    """Draws the figure and writes the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folder of a run")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    try:
        groups = read(arguments.folders)
    except FileNotFoundError as error:
        sys.exit(str(error))
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    with arguments.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "step", "seeds", "iqm", "low", "high"])
        for name, curves in groups.items():
            rows = summarize(curves)
            writer.writerows([(name, *row) for row in rows])
            steps, _, mean, low, high = (list(column) for column in zip(*rows, strict=True))
            axes.plot(steps, mean, label=f"{name}, n={len(curves)}")
            axes.fill_between(steps, low, high, alpha=0.2, linewidth=0)
    axes.set(xlabel="environment steps after the warm-up", ylabel="return, interquartile mean")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(arguments.out, dpi=150)
    print(f"{arguments.out} and {arguments.out.with_suffix('.csv')}")


if __name__ == "__main__":
    main()

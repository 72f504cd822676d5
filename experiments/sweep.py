"""Trains every candidate of a sweep: ``python -m experiments.sweep experiments/sweeps/fast.yaml``.

Runs are trained one after the other and kept in ``results/sweeps``. Finished runs are skipped and
interrupted runs are resumed. ``--only`` selects candidates.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from omegaconf import OmegaConf

from experiments.reproduce import ROOT, Run, train


def plan(path: Path, only: list[str] | None = None) -> list[Run]:
    """Returns a run for each candidate, task and seed; the first seed of all candidates first.

    Args:
        path: a file such as sweeps/fast.yaml.
        only: candidates to train; ``None`` trains all.

    Raises:
        ValueError: if a candidate is unknown or the file lacks an entry.
        OSError: if the file does not exist.
    """
    sweep = OmegaConf.load(path)
    entries = ("preset", "tasks", "seeds", "evaluate_every", "options", "candidates")
    if missing := [entry for entry in entries if entry not in sweep]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; see experiments/sweeps/fast.yaml")
    if unknown := sorted(set(only or ()) - set(sweep.candidates)):
        raise ValueError(f"{path} has no candidates {unknown}; choose from {[*sweep.candidates]}")
    return [
        Run(
            *(sweep.preset, task, seed, steps, sweep.evaluate_every),
            options=(*sweep.options, *sweep.candidates[name]),
            suffix=f"-{name}",
        )
        for seed in sweep.seeds
        for task, steps in sweep.tasks.items()
        for name in only or sweep.candidates
    ]


def main() -> int:
    """Trains the unfinished runs and returns the number of failures."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sweep", description=__doc__)
    parser.add_argument("file", type=Path, help="YAML file with tasks, seeds and candidates")
    parser.add_argument("--only", nargs="+", help="candidates to train")
    parser.add_argument("--runs", type=Path, default=Path("runs/sweep"), help="folder of the runs")
    parser.add_argument(
        "--results", type=Path, help="folder of the kept curves (default: results/sweeps/<file>)"
    )
    args = parser.parse_args()
    results = args.results or ROOT / "results/sweeps" / args.file.stem
    try:
        runs = plan(args.file, args.only)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    return sum(not train(run, args.runs, results, timed=False) for run in runs)


if __name__ == "__main__":
    sys.exit(main())

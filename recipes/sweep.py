"""Tries settings of a preset on tasks and seeds, and keeps every curve.

``python recipes/sweep.py recipes/sweeps/fast.yaml`` runs what the file lists, one after the other,
by recipes/reproduce.py's rules: runs that are done are passed over, interrupted ones go on.
``--only`` takes some of the candidates. ``python tools/report.py`` tables what is kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # The project's root rather than this folder, where mujoco.py would pass for the simulator.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from omegaconf import OmegaConf

from recipes.reproduce import ROOT, Run, train


def planned(path: Path, only: list[str] | None = None) -> list[Run]:
    """The runs of a sweep.

    Args:
        path: a file like sweeps/fast.yaml.
        only: candidates; all of them if left out.

    Returns:
        A run for each candidate, task and seed, the first seed of all candidates first.

    Raises:
        ValueError: for a candidate that the file does not have, or a file that lacks an entry.
        OSError: if there is no such file.
    """
    sweep = OmegaConf.load(path)
    wanted = ("preset", "tasks", "seeds", "evaluate_every", "options", "candidates")
    missing = [key for key in wanted if key not in sweep]
    if missing:
        raise ValueError(f"{path} does not say {', '.join(missing)}; see recipes/sweeps/fast.yaml")
    unknown = sorted(set(only or ()) - set(sweep.candidates))
    if unknown:
        raise ValueError(f"{path} has no candidates {unknown}, but {sorted(sweep.candidates)}")
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
    """Trains what is not done yet; returns how many runs have failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="tasks, seeds and candidates")
    parser.add_argument("--only", nargs="+", help="candidates")
    parser.add_argument("--runs", type=Path, default=Path("runs/sweep"), help="of the runs")
    parser.add_argument("--results", type=Path, help="of the curves; results/sweeps/<file>")
    args = parser.parse_args()
    results = args.results or ROOT / "results/sweeps" / args.file.stem
    try:
        runs = planned(args.file, args.only)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    return sum(not train(run, args.runs, results, timed=False) for run in runs)


if __name__ == "__main__":
    sys.exit(main())

"""Trains presets and baselines on tasks and seeds, and keeps each curve with its command.

``python -m experiments.reproduce --what paper sac --tasks halfcheetah --seeds 0 1 --steps 20000``
trains ALM with the preset ``paper`` and TorchRL's SAC in the same environments. Finished runs are
skipped, and interrupted runs are resumed. ``python -m experiments.report`` draws the curves.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from omegaconf import OmegaConf

from experiments.machine import describe_machine
from recipes.run_name import override_name

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("sac", "redq")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        what: a preset of recipes/mujoco.py, or one of TorchRL's algorithms.
        task: name of the task, as in recipes/conf/task.
        seed: random seed.
        steps: environment steps after the warm-up.
        every: steps between two evaluations.
        options: further options of the recipe.
        suffix: appended to the preset in the run's name, to tell options apart.
    """

    what: str
    task: str
    seed: int
    steps: int
    every: int
    options: tuple[str, ...] = ()
    suffix: str = ""

    @property
    def name(self) -> str:
        """Name of the run's folder and curve."""
        return f"{self.task}-{self.what}{self.suffix}-seed{self.seed}"

    def command(self, folder: str) -> list[str]:
        """Returns the training command, without the interpreter."""
        if self.what in PEERS:
            options = OmegaConf.load(ROOT / "recipes/conf/task" / f"{self.task}.yaml")
            if options.kwargs:
                raise ValueError(f"experiments/sac.py does not support task {self.task}")
            return [
                *("experiments/sac.py", "--algorithm", self.what, "--task", options.id),
                *("--seed", str(self.seed), "--steps", str(self.steps)),
                *("--eval-every", str(self.every), "--folder", folder, "--resume"),
            ]
        return [
            *("recipes/mujoco.py", f"preset={self.what}", f"task={self.task}", f"seed={self.seed}"),
            *(f"training.total_steps={self.steps}", f"evaluation.every={self.every}"),
            *(f"run.folder={folder}", "resume=auto", *self.options),
        ]


def is_done(curve: Path, steps: int) -> bool:
    """Returns whether a curve reaches the given number of steps."""
    if not curve.is_file():
        return False
    with curve.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return bool(rows) and int(rows[-1]["step"]) >= steps


def keep(run: Run, command: list[str], curve: Path, results: Path, timed: bool) -> None:
    """Copies a curve to the results and records how it was made in ``runs.json``."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    results.mkdir(parents=True, exist_ok=True)
    shutil.copy(curve, results / f"{run.name}.csv")
    index = results / "runs.json"
    known = json.loads(index.read_text()) if index.is_file() else {}
    machine = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    known[f"{run.name}.csv"] = {
        "task": run.task,
        "what": run.what + run.suffix,
        "command": shlex.join(["python", *command]),
        "commit": commit.strip(),
        "machine": f"{machine['device']}, {machine['threads']} threads",
        "timed": timed,
    }
    index.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def train(run: Run, runs: Path, results: Path, timed: bool) -> bool:
    """Trains an unfinished run and keeps its curve; returns whether the run is finished."""
    folder = runs.resolve() / run.name
    if not is_done(folder / "curve.csv", run.steps):
        print(run.name, flush=True)
        subprocess.run([sys.executable, *run.command(str(folder))], cwd=ROOT, check=False)
    done = is_done(folder / "curve.csv", run.steps)
    if done:
        keep(run, run.command(f"runs/{run.name}"), folder / "curve.csv", results, timed)
    return done


def main() -> int:
    """Trains the unfinished runs and returns the number of failures."""
    parser = argparse.ArgumentParser(prog="python -m experiments.reproduce", description=__doc__)
    parser.add_argument("--what", nargs="+", default=["paper", "sac"], help="presets, sac, redq")
    parser.add_argument("--tasks", nargs="+", default=["halfcheetah"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--peer-steps", type=int, help="steps of sac and redq (default: --steps)")
    parser.add_argument("--eval-every", type=int, default=1_000)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/reproduce"), help="folder of the runs"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "results", help="folder of the kept curves"
    )
    parser.add_argument(
        "--option", action="append", default=[], help="option of recipes/mujoco.py; repeatable"
    )
    parser.add_argument("--suffix", default="", help="appended to the name (default: the options)")
    parser.add_argument(
        "--timed", action="store_true", help="nothing else runs on this machine, so times are valid"
    )
    args = parser.parse_args()
    suffix = args.suffix or override_name(args.option)  # options must not share a name
    settings = args.eval_every, tuple(args.option), suffix
    steps = {what: (what in PEERS and args.peer_steps) or args.steps for what in args.what}
    each = product(args.tasks, args.what, args.seeds)
    runs = [Run(what, task, seed, steps[what], *settings) for task, what, seed in each]
    return sum(not train(run, args.runs, args.results, args.timed) for run in runs)


if __name__ == "__main__":
    sys.exit(main())

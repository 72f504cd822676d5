"""Runs tasks and seeds one after the other, and keeps their raw curves with what made them.

``python recipes/reproduce.py --what paper sac --tasks halfcheetah --seeds 0 1 --steps 20000``
trains ALM in a preset's settings and TorchRL's SAC in the same environments. Runs that are done are
passed over, and one of ALM that was interrupted goes on. Then ``python tools/report.py`` draws what
is kept.
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

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # mujoco.py here is no simulator

import torch
from omegaconf import OmegaConf

from benchmarks import measure
from recipes.run_name import override_name

RECIPES = Path(__file__).resolve().parent
ROOT = RECIPES.parent
PEERS = ("sac", "redq")


@dataclass(frozen=True)
class Run:
    """A run and the curve that it leaves.

    Attributes:
        what: a preset of recipes/mujoco.py, or one of TorchRL's algorithms.
        task: as the recipe's ``task`` names it.
        seed: of the run.
        steps: after the warm-up.
        every: steps between two evaluations.
        options: further ones of the recipe.
        suffix: what its name adds to the preset's, where the options make it another.
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
        """What the run's folder and curve are called."""
        return f"{self.task}-{self.what}{self.suffix}-seed{self.seed}"

    def command(self, folder: str) -> list[str]:
        """What trains, without the interpreter."""
        if self.what in PEERS:
            options = OmegaConf.load(RECIPES / "conf/task" / f"{self.task}.yaml")
            if options.kwargs:
                raise ValueError(f"recipes/sac.py cannot pass {self.task}'s arguments on")
            return [
                *("recipes/sac.py", "--algorithm", self.what, "--task", options.id),
                *("--seed", str(self.seed), "--steps", str(self.steps)),
                *("--eval-every", str(self.every), "--folder", folder),
            ]
        return [
            *("recipes/mujoco.py", f"preset={self.what}", f"task={self.task}", f"seed={self.seed}"),
            *(f"training.total_steps={self.steps}", f"evaluation.every={self.every}"),
            *(f"run.folder={folder}", "resume=auto", *self.options),
        ]


def is_done(curve: Path, steps: int) -> bool:
    """Whether a curve goes as far as was asked for."""
    if not curve.is_file():
        return False
    with curve.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return bool(rows) and int(rows[-1]["step"]) >= steps


def machine() -> str:
    """The kind of machine: what figures of time depend on."""
    here = measure.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return f"{here['device']}, {here['threads']} threads"


def keep(run: Run, command: list[str], curve: Path, results: Path, timed: bool) -> None:
    """Copies a curve to the results, and notes what made it in ``runs.json``."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    results.mkdir(parents=True, exist_ok=True)
    shutil.copy(curve, results / f"{run.name}.csv")
    index = results / "runs.json"
    known = json.loads(index.read_text()) if index.is_file() else {}
    known[f"{run.name}.csv"] = {
        "task": run.task,
        "what": run.what + run.suffix,
        "command": shlex.join(["python", *command]),
        "commit": commit.strip(),
        "machine": machine(),
        "timed": timed,
    }
    index.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def train(run: Run, runs: Path, results: Path, timed: bool) -> bool:
    """Trains a run if it is not done, and keeps its curve; returns whether it is done now."""
    folder = runs.resolve() / run.name
    if not is_done(folder / "curve.csv", run.steps):
        print(run.name, flush=True)
        subprocess.run([sys.executable, *run.command(str(folder))], cwd=ROOT, check=False)
    if done := is_done(folder / "curve.csv", run.steps):
        keep(run, run.command(f"runs/{run.name}"), folder / "curve.csv", results, timed)
    return done


def main() -> int:
    """Trains what is not done yet; returns how many runs have failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", nargs="+", default=["paper", "sac"], help="presets, sac, redq")
    parser.add_argument("--tasks", nargs="+", default=["halfcheetah"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--eval-every", type=int, default=1_000)
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="of the curves")
    parser.add_argument("--option", action="append", default=[], help="of recipes/mujoco.py")
    parser.add_argument("--suffix", default="", help="of the name; else the options")
    parser.add_argument(
        "--timed", action="store_true", help="nothing else runs here: the seconds are a measure"
    )
    args = parser.parse_args()
    suffix = args.suffix or override_name(args.option)  # or other options' curves would pass for it
    settings = args.steps, args.eval_every, tuple(args.option), suffix
    runs = [Run(w, t, s, *settings) for t, w, s in product(args.tasks, args.what, args.seeds)]
    return sum(not train(run, args.runs, args.results, args.timed) for run in runs)


if __name__ == "__main__":
    sys.exit(main())

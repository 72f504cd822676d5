"""Makes a pretrained agent with its model card from a run.

``python -m experiments.pretrained runs/hopper --command "python recipes/mujoco.py task=hopper"``
evaluates the best agent of the run on new episodes, and writes ``pretrained/hopper-seed0``. Run it
at the commit that trained the agent. The extra ``hub`` is required.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from recipes.enjoy import evaluate
from recipes.trained import PRETRAINED, find, main

ROOT = PRETRAINED.parent
CARD = """---
library_name: alm-torchrl
license: {license}
tags: [reinforcement-learning, model-based-rl, torchrl, {task}]
---
# ALM on {task}

| | |
|---|---|
| return | {mean:.1f} +- {std:.1f}: mean and deviation of {episodes} episodes, seed {seed} |
| frames | {frames:,} environment steps until this agent; {total:,} in the whole run |
| training seed | {training_seed} |
| commit | {commit} |
| license | {license} |

This command trained it:

```sh
{command}
```

![Return of the run by steps](curve.png)

## Use

```sh
python recipes/enjoy.py {name} --video {name}.gif
```

```python
from alm_torchrl import ALMAgent

agent = ALMAgent.from_pretrained("pretrained/{name}")
policy = agent.policy()
```
"""


@dataclass(frozen=True)
class Curve:
    """The frames of the best and the last evaluation of a run, and its seed."""

    frames: int
    total: int
    training_seed: int


def read_curve(path: Path) -> Curve:
    """Reads a ``curve.csv``; the first of several best evaluations saved the agent."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no evaluation: train the run first")
    best = max(rows, key=lambda row: float(row["return"]))
    return Curve(int(best["frames"]), int(rows[-1]["frames"]), int(best["seed"]))


def current_commit() -> str:
    """Returns the commit of this working copy."""
    git = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.pretrained", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--command", required=True, help="the command that trained the run")
    parser.add_argument("--name", help="name under pretrained/ (default: the task and the seed)")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=100_000, help="seed of the evaluation")
    parser.add_argument("--commit", help="commit that trained the run (default: this one)")
    parser.add_argument("--license", default="mit", help="SPDX identifier, in lower case")
    parser.add_argument("--out", type=Path, default=PRETRAINED, help="folder of pretrained agents")
    return parser.parse_args()


def make() -> None:
    """Evaluates the agent of a run, and writes its folder."""
    args = parse_arguments()
    if not (args.run / "curve.csv").is_file():
        raise FileNotFoundError(f"{args.run} has no curve.csv: give the folder of a run")
    curve = read_curve(args.run / "curve.csv")
    trained = find(str(args.run))
    environment = dict(trained.environment)
    if environment.pop("transforms", None):
        raise ValueError(f"{args.run} has encoder.transforms, which a pretrained agent cannot have")
    task = environment["task"]
    name = args.name or f"{task.rpartition('/')[2].lower()}-seed{curve.training_seed}"
    evaluation = evaluate(trained, trained.agent.policy(), args.episodes, args.seed)
    facts = {**vars(curve), **evaluation, "task": task, "name": name, "license": args.license}
    card = CARD.format(**facts, command=args.command, commit=args.commit or current_commit())
    folder = args.out / name
    trained.agent.save_pretrained(folder, card=card, environment=environment, evaluation=evaluation)
    for file in ("curve.csv", "curve.png"):
        if (args.run / file).is_file():
            shutil.copy(args.run / file, folder / file)
    print("{folder}: return {mean:.1f} +- {std:.1f}".format(folder=folder, **evaluation))


if __name__ == "__main__":
    main(make)

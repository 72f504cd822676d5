"""Draws the kept curves and writes docs/results.md from them: ``python tools/report.py``.

It reads ``results/*.csv``, ``results/runs.json`` (what made each of them) and
``results/authors.csv`` (the published scores), and nothing else, so that anyone can draw the page
anew.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recipes.plot import summarize

ROOT = Path(__file__).resolve().parents[1]
STEPS = (1_000, 2_000, 3_000, 6_000, 10_000, 20_000, 30_000, 50_000, 100_000, 200_000, 300_000)
RETURNS = (1000, 2000, 3000, 4000, 6000, 8000, 10_000)
TASKS = (
    "halfcheetah", "walker2d", "hopper", "ant", "humanoid", "ant_truncated", "humanoid_truncated"
)  # fmt: skip
#: Seeds that the paper's own curves have.
PAPER_SEEDS = 5
INTRODUCTION = """# Results

This page is generated from the raw curves in `results` by `python tools/report.py`, and these by
`python recipes/reproduce.py`. Returns are means of five episodes with the mean action; steps are
counted after the random warm-up, as the authors count. Over several seeds: the interquartile mean,
and the interval that 95 % of bootstrap samples of the seeds fall into. "Published" are the authors'
scores, mean and standard deviation over five seeds, in an older version of the environments.

`halfcheetah-distractors` has 64 dimensions of noise in its observation, `halfcheetah-masked` no
velocities, `inverted_pendulum` is observed as 32x32 images alone (random actions return 5 +- 3).

`paper`, `quickstart` and `fast` are presets of `recipes/mujoco.py`, `pixels` of
`recipes/pixels.py`; `fast` was chosen by the sweeps `fast` and `fast_refined`, on seeds 0 and 4,
and changed after trials on 14 and 15, which the sweep `fast_warmup` repeats. `-earlier` behind it
stands for the preset before that (until commit 7c68998: no updates on the warm-up, noise from 1.0,
the newest weights evaluated; the other sweeps' too), `-bf16` for `run.precision=bf16-mixed`,
`-window` for `encoder=window`, `-first` for the project's first run, `-1e-3` for these learning
rates and a batch of 64; `sac` and `redq` are TorchRL's, by `recipes/sac.py`.
"""
REACHING = (
    "Steps until a return is first reached, median over seeds, and the median time of those seeds "
    "beside which nothing else ran (minutes of one kind of machine can be compared; the last table "
    "names it):"
)
Rows = list[dict[str, float]]
#: By task, by what was trained, by seed.
Curves = dict[str, dict[str, dict[int, Rows]]]


def read(results: Path) -> tuple[Curves, dict[str, dict[str, Any]], Curves]:
    """All curves, what made them, and those whose seconds are a measure."""
    runs = json.loads((results / "runs.json").read_text())
    curves: Curves = defaultdict(lambda: defaultdict(dict))
    timed: Curves = defaultdict(lambda: defaultdict(dict))
    for name, run in runs.items():
        with (results / name).open(newline="") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        seed = int(rows[0]["seed"])
        curves[run["task"]][run["what"]][seed] = rows
        if run["timed"]:
            timed[run["task"]][run["what"]][seed] = rows
    return curves, runs, timed


def summary(curves: dict[int, Rows]) -> list[tuple[int, int, float, float, float]]:
    """Interquartile means over seeds, with their intervals."""
    return summarize({s: {int(r["step"]): r["return"] for r in rows} for s, rows in curves.items()})


def draw(task: str, curves: dict[str, dict[int, Rows]], authors: Rows, path: Path) -> None:
    """One task's curves beside the published ones."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    reach = max(row[0] for seeds in curves.values() for row in summary(seeds))
    for what, seeds in sorted(curves.items()):
        steps, _, mean, low, high = (list(c) for c in zip(*summary(seeds), strict=True))
        axes.plot(steps, mean, label=f"{what}, n={len(seeds)}")
        axes.fill_between(steps, low, high, alpha=0.2, linewidth=0)
    published = [row for row in authors if row["step"] <= 1.5 * reach]
    if published:
        x, y, error = (np.array([row[key] for row in published]) for key in ("step", "mean", "std"))
        axes.errorbar(x, y, error, fmt="k.", capsize=3, label="published, n=5, +- std")
    axes.set(xlabel="environment steps after the warm-up", ylabel="return", title=task)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def returns_table(curves: dict[str, dict[int, Rows]], authors: Rows) -> Iterator[str]:
    """Returns after given numbers of steps."""
    means = {what: {row[0]: row[1:] for row in summary(s)} for what, s in sorted(curves.items())}
    steps = [s for s in STEPS if any(s in known for known in means.values())]
    published = {int(row["step"]): f"{row['mean']:.0f} +- {row['std']:.0f}" for row in authors}
    rows = [["published", *(published.get(step, "") for step in steps)]] if published else []
    for what, known in means.items():
        cells = []
        for step in steps:
            if step not in known:
                cells.append("")
                continue
            seeds, mean, low, high = known[step]
            spread = f" ({low:.0f} to {high:.0f})" if seeds > 1 else ""
            cells.append(f"{mean:.0f}{spread}, n={seeds}")
        rows.append([f"`{what}`", *cells])
    yield from table(["", *(f"{step:,}" for step in steps)], rows)


def first_reaching(rows: Rows, wanted: float) -> dict[str, float] | None:
    """The first evaluation with a return of at least so much."""
    return next((row for row in rows if row["return"] >= wanted), None)


def reaching_table(
    curves: dict[str, dict[int, Rows]], timed: dict[str, dict[int, Rows]]
) -> Iterator[str]:
    """Median steps of all seeds, and minutes of the timed ones, until a return is first reached."""
    rows = []
    for what, seeds in sorted(curves.items()):
        cells = []
        for wanted in RETURNS:
            found = [first_reaching(curve, wanted) for curve in seeds.values()]
            steps = [row["step"] for row in found if row]
            if len(steps) < len(found) or not steps:
                cells.append(f"{len(steps)} of {len(found)} seeds" if steps else "")
                continue
            own = [first_reaching(curve, wanted) for curve in timed.get(what, {}).values()]
            minutes = [row["seconds"] / 60 for row in own if row]
            took = f", {np.median(minutes):.1f} min" if minutes else ""
            cells.append(f"{np.median(steps):,.0f}{took}")
        rows.append([f"`{what}`", *cells])
    if any(cell for row in rows for cell in row[1:]):
        yield from (REACHING, "")
        yield from table(["return", *(f"{wanted:,}" for wanted in RETURNS)], rows)


def missing(curves: Curves) -> Iterator[str]:
    """What has not been run yet."""
    for task in TASKS:
        seeds = curves.get(task, {}).get("paper", {})
        longest = max((rows[-1]["step"] for rows in seeds.values()), default=0)
        if len(seeds) < PAPER_SEEDS or longest < 200_000:
            done = f"{len(seeds)} of {PAPER_SEEDS} seeds, to {longest:,.0f} steps at most"
            yield f"- `{task}`, preset `paper`: {done if seeds else 'no run'}"


def made(runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What made each of the curves."""
    rows = [
        [f"`{name}`", f"`{run['command']}`", run["commit"], run["machine"]]
        for name, run in runs.items()
    ]
    yield from table(["file", "command", "commit", "machine"], rows)


def sweep_section(folder: Path) -> Iterator[str]:
    """What a sweep has tried, and what it gave."""
    curves, runs, _ = read(folder)
    yield f"## Sweep `{folder.name}`"
    yield ""
    yield f"`python recipes/sweep.py recipes/sweeps/{folder.name}.yaml`; returns on the way:"
    yield ""
    for task in sorted(curves):
        yield f"{task}:"
        yield ""
        yield from returns_table(curves[task], [])
    yield from made(runs)


def page(results: Path, figures: Path) -> str:
    """Draws every task's figure, and returns the page."""
    curves, runs, timed = read(results)
    with (results / "authors.csv").open(newline="") as file:
        authors = [(row.pop("task"), row) for row in csv.DictReader(file)]
    lines = [INTRODUCTION]
    for task in sorted(curves, key=lambda task: (task not in TASKS, task)):
        published = [{k: float(v) for k, v in row.items()} for name, row in authors if name == task]
        draw(task, curves[task], published, figures / f"results-{task}.png")
        lines += [f"## {task}", "", f"![Learning curves](_static/results-{task}.png)", ""]
        lines += ["Return after so many steps:", "", *returns_table(curves[task], published)]
        lines += reaching_table(curves[task], timed[task])
    lines += ["## What has not been run", "", *missing(curves), "", "## What made the curves", ""]
    lines += made(runs)
    for sweep in sorted((results / "sweeps").glob("*")):
        lines += sweep_section(sweep)
    return "\n".join(lines)


def main() -> None:
    """Writes the page."""
    text = page(ROOT / "results", ROOT / "docs/_static")
    (ROOT / "docs/results.md").write_text(text, encoding="utf-8")
    print("docs/results.md")


if __name__ == "__main__":
    main()

"""Draws the kept curves and writes docs/results.md: ``python -m experiments.report``.

The inputs are ``results/*.csv``, ``results/runs.json`` (how each curve was made) and
``results/authors.csv`` (the published scores).
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.plot import summarize

ROOT = Path(__file__).resolve().parents[1]
STEPS = (1_000, 2_000, 3_000, 6_000, 10_000, 20_000, 30_000, 50_000, 100_000, 200_000, 300_000)
RETURNS = (1000, 2000, 3000, 4000, 6000, 8000, 10_000)
TASKS = (
    "halfcheetah", "walker2d", "hopper", "ant", "humanoid", "ant_truncated", "humanoid_truncated"
)  # fmt: skip
#: Curves in the figure of the README and the landing page.
OVERVIEW = {"fast": "ALM, fast", "paper": "ALM, paper", "sac": "TorchRL's SAC"}
#: Seeds per task in the paper.
PAPER_SEEDS = 5
INTRODUCTION = """# Results

`python -m experiments.report` generates this page from the raw curves in `results`;
`python -m experiments.reproduce` trains them. A return is the mean of five episodes with the mean
action. Steps exclude the random warm-up, as in the authors' curves. Several seeds are summarized by
their interquartile mean and a 95 % bootstrap interval. "Published" are the authors' scores: mean
and standard deviation over five seeds, in an older version of the environments.

`halfcheetah-distractors` adds 64 dimensions of noise to the observation, `halfcheetah-masked` hides
the velocities, and `inverted_pendulum` is observed as 32x32 images (random actions return 5 +- 3).

| label | meaning |
|---|---|
| `paper`, `quickstart`, `fast` | presets of `recipes/mujoco.py` |
| `pixels` | preset of `recipes/pixels.py` |
| `sac`, `redq` | TorchRL's algorithms, trained by `experiments/sac.py` |
| `-earlier` | `fast` before 7c68998: noise from 1.0, no warm-up updates, no averaged weights |
| `-bf16` | `run.precision=bf16-mixed` |
| `-window` | `encoder=window` |
| `-first` | the first run of the project |
| `-1e-3` | learning rates of 1e-3 and a batch of 64 |

`fast` was chosen by the sweeps `fast` and `fast_refined` on seeds 0 and 4. It was changed after
trials on seeds 14 and 15, which the sweep `fast_warmup` repeats. All sweeps but `fast_warmup` used
the earlier preset.
"""
REACHING = (
    "Steps until a return is first reached (median over seeds), and minutes (median over the seeds "
    "that ran alone on their machine). Compare minutes only between runs on the same machine."
)
Rows = list[dict[str, float]]
#: By task, by what was trained, by seed.
Curves = dict[str, dict[str, dict[int, Rows]]]


def read(results: Path) -> tuple[Curves, dict[str, dict[str, Any]], Curves]:
    """Reads all curves, the index of runs, and the curves of runs with valid times."""
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
    """Returns interquartile means over seeds, with their intervals."""
    return summarize({s: {int(r["step"]): r["return"] for r in rows} for s, rows in curves.items()})


def draw(task: str, curves: dict[str, dict[int, Rows]], authors: Rows, path: Path) -> None:
    """Draws the curves of a task and the published scores as an SVG file."""
    figure = Figure(figsize=(6, 4.4), layout="constrained")
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
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    axes.grid(alpha=0.3)
    with rc_context({"svg.hashsalt": task, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Yields the lines of a Markdown table."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def returns_table(curves: dict[str, dict[int, Rows]], authors: Rows) -> Iterator[str]:
    """Yields a table of returns after given numbers of steps."""
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
    """Returns the first evaluation with at least the wanted return."""
    return next((row for row in rows if row["return"] >= wanted), None)


def reaching_table(
    curves: dict[str, dict[int, Rows]], timed: dict[str, dict[int, Rows]]
) -> Iterator[str]:
    """Yields a table of median steps, and minutes of the timed runs, to given returns."""
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
    """Yields the published curves that have not been reproduced."""
    for task in TASKS:
        seeds = curves.get(task, {}).get("paper", {})
        longest = max((rows[-1]["step"] for rows in seeds.values()), default=0)
        if len(seeds) < PAPER_SEEDS or longest < 200_000:
            done = f"{len(seeds)} of {PAPER_SEEDS} seeds, to {longest:,.0f} steps at most"
            yield f"- `{task}`, preset `paper`: {done if seeds else 'no run'}"


def runs_table(runs: dict[str, dict[str, Any]], curves: Curves) -> Iterator[str]:
    """Yields a table of the command, commit, machine and time of each run."""
    rows = []
    for name, run in runs.items():
        seed = int(name.rpartition("seed")[2].removesuffix(".csv"))
        last = curves[run["task"]][run["what"]][seed][-1]
        minutes = f"{last['seconds'] / 60:.0f}{'' if run['timed'] else ' *'}"
        made = [f"`{run['command']}`", run["commit"], run["machine"]]
        rows.append([f"`{name}`", f"{last['step']:,.0f}", minutes, *made])
    yield from table(["file", "steps", "minutes", "command", "commit", "machine"], rows)


def sweep_section(folder: Path) -> Iterator[str]:
    """Yields the section of a sweep."""
    curves, runs, _ = read(folder)
    yield f"## Sweep `{folder.name}`"
    yield ""
    yield f"`python -m experiments.sweep experiments/sweeps/{folder.name}.yaml`"
    yield ""
    for task in sorted(curves):
        yield f"{task}:"
        yield ""
        yield from returns_table(curves[task], [])
    yield from runs_table(runs, curves)


def page(results: Path, figures: Path) -> str:
    """Draws the figure of every task and returns the page."""
    curves, runs, timed = read(results)
    with (results / "authors.csv").open(newline="") as file:
        authors = [(row.pop("task"), row) for row in csv.DictReader(file)]
    lines = [INTRODUCTION]
    for task in sorted(curves, key=lambda task: (task not in TASKS, task)):
        published = [{k: float(v) for k, v in row.items()} for name, row in authors if name == task]
        draw(task, curves[task], published, figures / f"results-{task}.svg")
        lines += [f"## {task}", "", f"![Learning curves](_static/results-{task}.svg)", ""]
        lines += ["Return by steps:", "", *returns_table(curves[task], published)]
        lines += reaching_table(curves[task], timed[task])
    published = [{k: float(v) for k, v in row.items()} for name, row in authors if name == TASKS[0]]
    kept = curves[TASKS[0]]
    overview = {label: kept[what] for what, label in OVERVIEW.items() if what in kept}
    if overview:
        draw("HalfCheetah-v5", overview, published, figures / "results-overview.svg")
    lines += ["## Not reproduced yet", "", *missing(curves), "", "## Runs", ""]
    lines += ["Minutes marked * were measured while other programs ran on the machine.", ""]
    lines += runs_table(runs, curves)
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

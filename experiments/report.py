"""Draws the kept curves and writes docs/results.md: ``python -m experiments.report``.

The inputs are ``results/*.csv``, ``results/runs.json`` (how each curve was made),
``results/authors.csv`` and ``results/anchors.csv`` (published scores).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures import draw_overview, draw_task
from experiments.summary import (
    AUTHORS_SEEDS,
    AUTHORS_WARMUP,
    Curves,
    Point,
    Rows,
    TimedRun,
    first_reaching,
    read,
    read_published,
    seed_of,
    summarize_seeds,
    timed_runs,
    warmup_frames,
)

ROOT = Path(__file__).resolve().parents[1]
#: Columns of the tables of returns, in frames. The authors' counter is 5,000 behind.
FRAMES = (
    3_000, 5_000, 7_000, 8_000, 10_000, 15_000, 20_000, 25_000, 30_000, 35_000, 50_000, 55_000,
    100_000, 105_000, 200_000, 205_000, 300_000, 305_000,
)  # fmt: skip
RETURNS = (1000, 2000, 3000, 4000, 6000, 8000, 10_000)
TITLES = {
    "halfcheetah": "HalfCheetah-v5",
    "walker2d": "Walker2d-v5",
    "hopper": "Hopper-v5",
    "ant": "Ant-v5",
    "humanoid": "Humanoid-v5",
    "ant_truncated": "Ant-v5, 27 dimensions",
    "humanoid_truncated": "Humanoid-v5, 45 dimensions",
}
INTRODUCTION = """# Results

`python -m experiments.report` generates this page from the raw curves in `results`;
`python -m experiments.reproduce` trains them.

![Returns by frames on all tasks of the preset fast](_static/results-overview.svg)

## How to read this page

- **Frames** count all environment steps, with the random warm-up, as most publications do. The
  authors of ALM start to count after their warm-up of 5,000 frames; tables show their counter in
  parentheses. The column "warm-up" gives the random frames of each run.
- **Returns** are means of five episodes with the mean action. Cells show the mean over seeds +- the
  *sample* standard deviation (n = number of seeds) and, with at least 3 seeds, the interquartile
  mean (IQM). A cell is empty if fewer than half of the seeds reached its number of frames.
- **Figures** show the mean over seeds with a band of one sample standard deviation on either side.
  Variants of a preset are dashed.
- **Few seeds.** Deviations of 2 or 3 seeds are rough estimates. An IQM of 3 seeds gives the middle
  seed two thirds of the weight.
- **Published results** are drawn in gray. "ALM, authors" are the scores of the ALM paper, whose
  population deviations are converted to sample deviations. The other rows are recomputed from the
  raw data that their authors published (`results/README.md` names the sources); `~` marks values
  interpolated between two evaluations. All ran on older versions of the environments. HalfCheetah
  behaves the same, but Walker2d-v5 has a different friction, and Ant-v5 and Humanoid-v5 have a
  contact cost.
- **MR.Q** is not in the tables, because its data are licensed for noncommercial use. It reaches
  5,422 on HalfCheetah, 686 on Walker2d, 961 on Hopper, 1,474 on Ant and 440 on Humanoid after
  50,000 frames (means of 10 seeds).
- **Minutes** include evaluation and compilation, and are shown for runs that ran alone on their
  machine. Compare them only between runs on the same machine. DHMBPO's logs report 20,000 frames in
  9.4 to 13.5 minutes on an RTX A4000.

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
trials on seeds 14 and 15, which the sweep `fast_warmup` repeats. On tasks whose episodes terminate,
the sweep `fast_terminations` tries a discount of 0.995, alone and with 1,000 updates after every
1,000 steps. With one seed each, neither walks or hops within 23,000 frames. The sweep
`fast_identity` takes the normalized observation as the latent, without the log-ratio and with
deeper networks; its runs were stopped when they had answered the question. It learns HalfCheetah
as fast as `fast`, and Hopper hops. Values and policy that train on imagined episodes of 100 steps
learn HalfCheetah more slowly. The other sweeps used the earlier preset.
"""
REACHING = (
    "Frames until a return is first reached (median over seeds), and minutes (median over the "
    "seeds that ran alone on their machine):"
)


def table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Yields the lines of a Markdown table."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def cell(point: Point | None) -> str:
    """Formats mean, sample standard deviation, interquartile mean and number of seeds."""
    if point is None:
        return ""
    text = f"{'~' if point.interpolated else ''}{point.mean:,.0f}"
    text += "" if np.isnan(point.std) else f" +- {point.std:,.0f}"
    text += "" if np.isnan(point.iqm) else f", IQM {point.iqm:,.0f}"
    return f"{text} (n={point.seeds})"


def returns_table(
    curves: dict[str, dict[int, Rows]], published: dict[str, list[Point]]
) -> Iterator[str]:
    """Yields a table of returns by frames, with the published results below ours."""
    ours = {label: summarize_seeds(seeds) for label, seeds in sorted(curves.items())}
    reached = {point.frames for points in ours.values() for point in points}
    frames = [count for count in FRAMES if count in reached]
    header = [
        f"{count:,} ({count - AUTHORS_WARMUP:,})"
        if published and count > AUTHORS_WARMUP
        else f"{count:,}"
        for count in frames
    ]
    rows = []
    for label, points in (ours | published).items():
        known = {point.frames: point for point in points}
        cells = [cell(known.get(count)) for count in frames]
        if label in ours:
            rows.append([f"`{label}`", f"{warmup_frames(curves[label]):,}", *cells])
        elif any(cells):
            rows.append([label, "", *cells])
    yield from table(["", "warm-up", *header], rows)


def reaching_table(curves: dict[str, dict[int, Rows]], timed: list[TimedRun]) -> Iterator[str]:
    """Yields a table of median frames, and minutes of the timed runs, to given returns."""
    rows = []
    for label, seeds in sorted(curves.items()):
        cells = []
        for wanted in RETURNS:
            found = [first_reaching(curve, wanted) for curve in seeds.values()]
            frames = [row["frames"] for row in found if row]
            if len(frames) < len(found):
                cells.append(f"{len(frames)} of {len(found)} seeds" if frames else "")
                continue
            own = [first_reaching(run.rows, wanted) for run in timed if run.label == label]
            minutes = [row["seconds"] / 60 for row in own if row]
            took = f", {np.median(minutes):.1f} min" if minutes else ""
            cells.append(f"{np.median(frames):,.0f}{took}")
        rows.append([f"`{label}`", *cells])
    if any(text for row in rows for text in row[1:]):
        yield from (REACHING, "")
        yield from table(["return", *(f"{wanted:,}" for wanted in RETURNS)], rows)


def missing(curves: Curves) -> Iterator[str]:
    """Yields the published curves that have not been reproduced."""
    for task in TITLES:
        seeds = curves.get(task, {}).get("paper", {})
        last = max((rows[-1] for rows in seeds.values()), key=lambda row: row["step"], default=None)
        if last is None:
            yield f"- `{task}`, preset `paper`: no run"
        elif len(seeds) < AUTHORS_SEEDS or last["step"] < 200_000:
            done = f"{len(seeds)} of {AUTHORS_SEEDS} seeds, to {last['frames']:,.0f} frames at most"
            yield f"- `{task}`, preset `paper`: {done}"


def runs_table(runs: dict[str, dict[str, Any]], curves: Curves) -> Iterator[str]:
    """Yields a table of the command, commit, machine and time of each run."""
    rows = []
    for name, run in runs.items():
        last = curves[run["task"]][run["what"]][seed_of(name)][-1]
        counts = [f"{last['frames']:,.0f}", f"{last['step']:,.0f}"]
        minutes = f"{last['seconds'] / 60:.0f}{'' if run['timed'] else ' *'}"
        made = [f"`{run['command']}`", run["commit"], run["machine"]]
        rows.append([f"`{name}`", *counts, minutes, *made])
    header = ["file", "frames", "steps after the warm-up", "minutes"]
    yield from table([*header, "command", "commit", "machine"], rows)


def task_section(
    task: str,
    curves: Curves,
    runs: dict[str, dict[str, Any]],
    published: dict[str, list[Point]],
    figures: Path,
) -> Iterator[str]:
    """Draws the figure of a task and yields its section."""
    timed = timed_runs(task, curves, runs)
    path = figures / f"results-{task}.svg"
    draw_task(TITLES.get(task, task), curves[task], timed, published, path)
    yield from (f"## {task}", "", f"![Learning curves](_static/{path.name})", "")
    if not timed:
        yield from ("No run of this task was alone on its machine, so no minutes are shown.", "")
    counter = " (in parentheses the authors' counter)" if published else ""
    yield from (f"Return by frames{counter}:", "")
    yield from returns_table(curves[task], published)
    yield from reaching_table(curves[task], timed)


def sweep_section(folder: Path) -> Iterator[str]:
    """Yields the section of a sweep."""
    curves, runs = read(folder)
    yield from (f"## Sweep `{folder.name}`", "")
    yield from (f"`python -m experiments.sweep experiments/sweeps/{folder.name}.yaml`", "")
    for task in sorted(curves):
        yield from (f"{task}, return by frames:", "")
        yield from returns_table(curves[task], {})
    yield from runs_table(runs, curves)


def page(results: Path, figures: Path) -> str:
    """Draws all figures and returns the page."""
    curves, runs = read(results)
    published = read_published(results)
    draw_overview(TITLES, curves, published, figures / "results-overview.svg")
    lines = [INTRODUCTION]
    for task in sorted(curves, key=lambda task: (task not in TITLES, task)):
        lines += task_section(task, curves, runs, published.get(task, {}), figures)
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

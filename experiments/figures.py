"""Figures of the results page."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.summary import AUTHORS, Curves, Point, Rows, TimedRun, summarize_seeds

#: Labels of the curves in the summary figure, with their names there.
OVERVIEW = {"fast": "ALM, fast", "paper": "ALM, paper", "sac": "TorchRL's SAC"}
#: Published results in the summary figure.
OVERVIEW_PUBLISHED = (AUTHORS, "DHMBPO", "CrossQ", "SAC")
#: Colors of our curves. Gray is for published results.
COLORS = tuple(f"C{number}" for number in (0, 1, 2, 3, 4, 5, 6, 8, 9))
#: Smallest distance between two names beside published curves, as a part of the axis.
NAME_DISTANCE = 0.045


def draw_task(
    title: str,
    curves: dict[str, dict[int, Rows]],
    timed: list[TimedRun],
    published: dict[str, list[Point]],
    path: Path,
) -> None:
    """Draws returns by frames and, for runs that were alone on their machine, by minutes.

    Args:
        title: title of the figure.
        curves: curves by label and seed.
        timed: runs whose ``seconds`` measure speed.
        published: published results by method.
        path: SVG file to write.
    """
    count = 2 if timed else 1
    figure = Figure(figsize=(7, 4.6 * count), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(count, squeeze=False)[:, 0]
    colors = dict(zip(sorted(curves), cycle(COLORS), strict=False))
    draw_returns(panels[0], {label: curves[label] for label in colors}, colors)
    draw_published(panels[0], published)
    panels[0].legend(fontsize="x-small")
    panels[0].set_title(title)
    if timed:
        draw_minutes(panels[1], timed, colors)
    save(figure, path)


def draw_overview(
    titles: dict[str, str],
    curves: Curves,
    published: dict[str, dict[str, list[Point]]],
    path: Path,
) -> None:
    """Draws one panel for each task on which ``fast`` was trained."""
    tasks = [task for task in titles if "fast" in curves.get(task, {})]
    if not tasks:
        return
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    colors = dict(zip(OVERVIEW.values(), COLORS, strict=False))
    for axes, task in zip(panels, tasks, strict=False):
        ours = {
            name: curves[task][label] for label, name in OVERVIEW.items() if label in curves[task]
        }
        draw_returns(axes, ours, colors)
        draw_published(axes, {name: published[task].get(name, []) for name in OVERVIEW_PUBLISHED})
        axes.legend(fontsize="x-small")
        axes.set_title(titles[task])
    for axes in figure.axes[len(tasks) :]:
        axes.remove()
    save(figure, path)


def draw_returns(axes: Axes, curves: dict[str, dict[int, Rows]], colors: dict[str, str]) -> None:
    """Draws means over seeds with sample standard deviations; variants of a preset are dashed."""
    for label, seeds in curves.items():
        points = summarize_seeds(seeds)
        frames, _, mean, std, *_ = np.array(points).T
        style, color = "--" if "-" in label else "-", colors[label]
        axes.plot(frames, mean, style, color=color, label=f"{label}, n={len(seeds)}", zorder=3)
        axes.fill_between(frames, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="frames, with the warm-up", ylabel="return, mean over seeds")
    axes.set_xlim(0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)


def draw_published(axes: Axes, published: dict[str, list[Point]]) -> None:
    """Draws published means in gray behind the curves, with the name beside the last point.

    The frames of the curves set the range.
    """
    reach = axes.dataLim.x1
    ends = []
    for method, points in published.items():
        inside = [point for point in points if point.frames <= 1.2 * reach]
        if not inside:
            continue
        gray = "0.2" if method == AUTHORS else "0.6"
        frames, means = [point.frames for point in inside], [point.mean for point in inside]
        axes.plot(frames, means, ".-", color=gray, linewidth=1, markersize=4, zorder=1)
        ends.append((means[-1], frames[-1], method, gray))
    place_names(axes, sorted(ends))


def place_names(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Writes names right of the axis, from the lowest end up, so that none overlap."""
    low, high = axes.get_ylim()
    height = -np.inf
    for mean, frames, name, color in ends:
        height = max((mean - low) / (high - low), height + NAME_DISTANCE)
        axes.annotate(
            name,
            xy=(frames, mean),
            xytext=(1.02, height),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": "0.85", "linewidth": 0.6},
            color=color,
            fontsize="x-small",
            verticalalignment="center",
        )


def draw_minutes(axes: Axes, timed: list[TimedRun], colors: dict[str, str]) -> None:
    """Draws each timed run by minutes; the legend names the machine."""
    named = set()
    for run in timed:
        minutes = [row["seconds"] / 60 for row in run.rows]
        name = f"{run.label} ({run.machine})"
        label = None if name in named else name
        returns = [row["return"] for row in run.rows]
        axes.plot(minutes, returns, color=colors[run.label], label=label)
        named.add(name)
    axes.set(xlabel="minutes, one curve for each seed", ylabel="return")
    axes.set_xlim(0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def save(figure: Figure, path: Path) -> None:
    """Writes an SVG file that is the same for the same data."""
    with rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})

"""Tables that grow by one row per evaluation: a CSV file, its plot, and a copy in checkpoints."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from alm_torchrl.files import atomic_write, set_aside
from alm_torchrl.training.module import ALMModule

Row = Mapping[str, float]


class CurveFile(L.Callback):
    """Keeps rows of numbers as ``<name>.csv`` and plots them as ``<name>.png``.

    Checkpoints hold the rows as well. When a run resumes, a file that does not start with these
    rows is kept as ``<name>.csv.kept``, with a warning, and written again.

    Args:
        folder: where the files go.
        seed: the seed noted in each row.
        seed_index: position of this seed among the seeds trained together.
    """

    #: Stem of both file names.
    name: str
    #: Width and height of the plot in inches.
    figure_size: tuple[float, float] = (10, 3.5)

    def __init__(self, folder: str | Path, *, seed: int, seed_index: int = 0) -> None:
        self.folder = Path(folder)
        self.seed = int(seed)  # checkpoints hold no NumPy numbers
        self.seed_index = seed_index
        self.rows: list[dict[str, float]] = []
        self._resumed = False

    @property
    def state_key(self) -> str:
        """Key of this seed's rows in a checkpoint."""
        return self._generate_state_key(seed_index=self.seed_index)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the rows."""
        self.rows, self._resumed = list(state_dict["rows"]), True

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Compares the file with the rows and writes it again if they differ."""
        path = self.folder / f"{self.name}.csv"
        if check_table(path, self.rows, self.seed, resumed=self._resumed):
            self.write()

    def add(self, step: int, numbers: Row) -> None:
        """Appends a row and rewrites both files."""
        self.rows.append({"step": step, "seed": self.seed, **numbers})
        self.write()

    def write(self) -> None:
        """Writes both files."""
        from matplotlib.figure import Figure

        write_table(self.folder / f"{self.name}.csv", self.fields(), self.rows)
        figure = Figure(figsize=self.figure_size, layout="constrained")
        self.draw(figure)
        with atomic_write(self.folder / f"{self.name}.png") as file:
            figure.savefig(file, format="png", dpi=150)

    def fields(self) -> Sequence[str]:
        """Column names."""
        return list(self.rows[0])

    def column(self, name: str) -> Tensor:
        """One column of :attr:`rows`."""
        return torch.tensor([row[name] for row in self.rows], dtype=torch.float64)

    def draw(self, figure: Any) -> None:
        """Draws :attr:`rows` on a matplotlib figure: by default, one panel for each column."""
        names = [name for name in self.fields() if name not in ("step", "seed")]
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            plot_column(axes, self.column("step"), self.column(name), title=name)


class LearningCurve(CurveFile):
    """The learning curve, as ``curve.csv`` and ``curve.png``.

    A row holds the environment steps after the warm-up, the seed, the mean return and its standard
    deviation over episodes, all frames, and the seconds of training so far. The arguments are those
    of :class:`CurveFile` and the title of the plot.
    """

    name = "curve"
    figure_size = (6, 4)

    def __init__(
        self, folder: str | Path, *, seed: int, seed_index: int = 0, title: str = ""
    ) -> None:
        super().__init__(folder, seed=seed, seed_index=seed_index)
        self.title = title
        self._before = 0.0
        self._start = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The rows and the seconds so far."""
        return {"rows": self.rows, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the rows and the seconds."""
        super().load_state_dict(state_dict)
        self._before = state_dict["seconds"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Starts the clock."""
        self._start = time.monotonic()

    @rank_zero_only
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: ALMModule, outputs: Tensor, *_: Any
    ) -> None:
        """Adds the returns of an evaluation."""
        experience, returns = pl_module.experience, outputs[self.seed_index]
        numbers = {
            "return": significant(returns.mean().item()),
            "return_std": significant(returns.std(correction=0).item()),
            "frames": experience.frames,
            "seconds": round(self._seconds(), 1),
        }
        self.add(experience.steps, numbers)

    @rank_zero_only
    def on_exception(
        self, trainer: L.Trainer, pl_module: ALMModule, exception: BaseException
    ) -> None:
        """Writes both files even if no evaluation has finished."""
        if pl_module.restored:
            self.write()

    def fields(self) -> Sequence[str]:
        """Column names."""
        return ("step", "seed", "return", "return_std", "frames", "seconds")

    def draw(self, figure: Any) -> None:
        """Draws the mean return and its standard deviation."""
        axes = figure.subplots()
        plot_column(
            axes, self.column("step"), self.column("return"), self.column("return_std"), self.title
        )
        axes.set_ylabel("return")

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._start


def plot_column(
    axes: Any, steps: Tensor, mean: Tensor, std: Tensor | None = None, title: str = ""
) -> None:
    """Plots a column against the environment steps, with a band of one standard deviation."""
    axes.plot(steps, mean, marker="o", markersize=3)
    if std is not None:
        axes.fill_between(steps, mean - std, mean + std, alpha=0.2, linewidth=0)
    axes.set(xlabel="environment steps after the warm-up", title=title)
    axes.grid(alpha=0.3)


def significant(value: float) -> float:
    """Rounds to seven significant digits, as many as float32 has.

    Examples:
        >>> significant(0.0020000000949949026)
        0.002
    """
    return float(f"{value:.7g}")


def write_table(path: Path, fields: Sequence[str], rows: Sequence[Row]) -> None:
    """Replaces a CSV file atomically."""
    with atomic_write(path) as file:
        file.write(_text(fields, rows).encode())


def check_table(path: Path, rows: Sequence[Row], seed: int, *, resumed: bool) -> bool:
    """Compares a CSV file with the rows of a checkpoint and sets aside a file of another run.

    The file may hold further rows: those written after the checkpoint, which will be repeated. For
    a new run, ``rows`` is empty.

    Returns:
        Whether the file must be written again to hold the rows.
    """
    plot = path.with_suffix(".png")
    if plot.is_dir():
        rank_zero_warn(f"{plot} is a folder; it was renamed to {set_aside(plot)}")
    if not path.exists():
        if rows:
            rank_zero_warn(f"{path} is missing; it was restored from the checkpoint")
        return bool(rows)
    try:
        found = None if path.is_dir() else path.read_bytes().decode()
    except UnicodeDecodeError:
        found = None
    if found is not None and _is_of_run(found, rows, seed, resumed=resumed):
        return False
    problem = "does not match the checkpoint" if resumed else "belongs to another run"
    rank_zero_warn(f"{path} {problem}; it was renamed to {set_aside(path)}")
    return bool(rows)


def _is_of_run(text: str, rows: Sequence[Row], seed: int, *, resumed: bool) -> bool:
    """Whether this run wrote the text, up to the checkpoint or beyond it."""
    if rows and not text.startswith(_text(list(rows[0]), rows)):
        return False
    try:
        lines = list(csv.DictReader(io.StringIO(text)))
        numbers = [{name: float(value) for name, value in line.items()} for line in lines]
    except (TypeError, ValueError, csv.Error):  # a line too short or too long, or no number
        return False
    if not resumed:
        return not numbers
    return bool(text) and all(line.get("seed") == seed for line in numbers)


def _text(fields: Sequence[str], rows: Sequence[Row]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

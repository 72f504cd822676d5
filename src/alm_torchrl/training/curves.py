"""Tables with one row per evaluation, as CSV files and plots."""

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
    """Writes rows of numbers to ``<name>.csv`` and plots them as ``<name>.png``.

    Checkpoints also contain the rows. When a run resumes, a file that does not start with these
    rows is renamed to ``<name>.csv.kept``, with a warning, and written again.

    Args:
        folder: folder of the files.
        seed: value of the column ``seed``.
        seed_index: position of this seed among the seeds trained together.
    """

    name: str
    columns: tuple[str, ...] = ()  # of a file without rows
    figure_size: tuple[float, float] = (10, 3.5)  # width and height of the plot in inches

    def __init__(self, folder: str | Path, *, seed: int, seed_index: int = 0) -> None:
        self.folder = Path(folder)
        self.seed = int(seed)  # checkpoints cannot contain NumPy numbers
        self.seed_index = seed_index
        self.rows: list[dict[str, float]] = []
        self._resumed = False

    @property
    def state_key(self) -> str:
        """Key of this seed in a checkpoint."""
        return self._generate_state_key(seed_index=self.seed_index)

    def state_dict(self) -> dict[str, Any]:
        """Returns the rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the rows."""
        self.rows, self._resumed = list(state_dict["rows"]), True

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Compares the file with the rows, and writes it again if it differs."""
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

        fields = list(self.rows[0]) if self.rows else self.columns
        with atomic_write(self.folder / f"{self.name}.csv") as file:
            file.write(table_bytes(fields, self.rows))
        figure = Figure(figsize=self.figure_size, layout="constrained")
        self.draw(figure)
        with atomic_write(self.folder / f"{self.name}.png") as file:
            figure.savefig(file, format="png", dpi=150)

    def column(self, name: str) -> Tensor:
        """Returns a column as float64 ``[rows]``."""
        return torch.tensor([row[name] for row in self.rows], dtype=torch.float64)

    def draw(self, figure: Any) -> None:
        """Draws the rows on a matplotlib figure: by default, one panel for each column."""
        names = [name for name in self.rows[0] if name not in ("step", "seed")]
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            self.plot(axes, name, title=name)

    def plot(self, axes: Any, name: str, std: str | None = None, *, title: str) -> None:
        """Plots a column against the environment steps, with a band of the column ``std``."""
        steps, mean = self.column("step"), self.column(name)
        axes.plot(steps, mean, marker="o", markersize=3)
        if std is not None:
            width = self.column(std)
            axes.fill_between(steps, mean - width, mean + width, alpha=0.2, linewidth=0)
        axes.set(xlabel="environment steps after the warm-up", title=title)
        axes.grid(alpha=0.3)


class LearningCurve(CurveFile):
    """The learning curve, as ``curve.csv`` and ``curve.png``.

    A row contains the environment steps after the warm-up, the seed, mean and standard deviation of
    the return over episodes, all frames, and the seconds of training. The plot has the given
    ``title``; see :class:`CurveFile` for the other arguments.
    """

    name = "curve"
    columns = ("step", "seed", "return", "return_std", "frames", "seconds")
    figure_size = (6, 4)

    def __init__(
        self, folder: str | Path, *, seed: int, seed_index: int = 0, title: str = ""
    ) -> None:
        super().__init__(folder, seed=seed, seed_index=seed_index)
        self.title = title
        self._before = 0.0
        self._start = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Returns the rows and the seconds so far."""
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
    def on_exception(self, trainer: L.Trainer, pl_module: ALMModule, *_: Any) -> None:
        """Writes both files, even if no evaluation has finished."""
        if pl_module.restored:
            self.write()

    def draw(self, figure: Any) -> None:
        """Draws the mean return and its standard deviation."""
        axes = figure.subplots()
        self.plot(axes, "return", "return_std", title=self.title)
        axes.set_ylabel("return")

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._start


def significant(value: float) -> float:
    """Rounds to seven significant digits, the precision of float32."""
    return float(f"{value:.7g}")


def check_table(path: Path, rows: Sequence[Row], seed: int, *, resumed: bool) -> bool:
    """Compares a CSV file with the rows of a checkpoint, and renames the file of another run.

    The file may have further rows, written after the checkpoint; the run will repeat them. A new
    run has no ``rows``. Returns whether the file must be written again.
    """
    plot = path.with_suffix(".png")
    if plot.is_dir():
        rank_zero_warn(f"{plot} is a folder; it was renamed to {set_aside(plot)}")
    if path.exists():
        if path.is_file() and _is_of_run(path, rows, seed, resumed=resumed):
            return False
        problem = "does not match the checkpoint" if resumed else "belongs to another run"
        rank_zero_warn(f"{path} {problem}; it was renamed to {set_aside(path)}")
    elif rows:
        rank_zero_warn(f"{path} is missing; it was restored from the checkpoint")
    return bool(rows)


def _is_of_run(path: Path, rows: Sequence[Row], seed: int, *, resumed: bool) -> bool:
    """Returns whether this run wrote the file: the rows of the checkpoint, and maybe more."""
    try:
        content = path.read_bytes()
        lines = list(csv.DictReader(io.StringIO(content.decode())))
        numbers = [{name: float(value) for name, value in line.items()} for line in lines]
    except (TypeError, ValueError, csv.Error):  # not text, wrong columns, or not numbers
        return False
    if not resumed:
        return not numbers
    same = not rows or content.startswith(table_bytes(list(rows[0]), rows))
    return same and bool(content) and all(line.get("seed") == seed for line in numbers)


def table_bytes(fields: Sequence[str], rows: Sequence[Row]) -> bytes:
    """Returns the content of a CSV file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()

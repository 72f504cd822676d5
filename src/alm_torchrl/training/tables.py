"""Tables of numbers that grow with a run: rows in a checkpoint, and a CSV file beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from alm_torchrl.files import atomic_write, set_aside

__all__ = ["check_table", "significant", "write_table"]

Row = Mapping[str, float]


def significant(value: float) -> float:
    """A number with seven significant digits, as many as float32 has.

    Args:
        value: the number.

    Examples:
        >>> significant(0.0020000000949949026)
        0.002
    """
    return float(f"{value:.7g}")


def write_table(path: Path, fields: Sequence[str], rows: Sequence[Row]) -> None:
    """Replaces a CSV file.

    Args:
        path: the file.
        fields: the columns.
        rows: the numbers of each row by column.
    """
    with atomic_write(path) as file:
        file.write(_text(fields, rows).encode())


def check_table(path: Path, rows: Sequence[Row], seed: int, *, goes_on: bool) -> bool:
    """Compares a CSV file with the rows of a checkpoint, and moves away what is not of this run.

    The file may hold further rows, which were written after the checkpoint and are written again.
    Anything else there is kept under another name, with a warning.

    Args:
        path: the file.
        rows: those of the checkpoint, each with a ``"seed"``; none for a run that begins.
        seed: of the run.
        goes_on: whether the run goes on from a checkpoint.

    Returns:
        Whether the file has to be written again to hold the rows.
    """
    plot = path.with_suffix(".png")
    if plot.is_dir():
        rank_zero_warn(f"{plot} is a folder, which is now {set_aside(plot)}")
    if not path.exists():
        if rows:
            rank_zero_warn(f"{path} was lacking, and is written again from the checkpoint")
        return bool(rows)
    try:
        found = None if path.is_dir() else path.read_bytes().decode()
    except UnicodeDecodeError:
        found = None
    if found is not None and _is_of_run(found, rows, seed, goes_on=goes_on):
        return False
    what = "is not as this run left it" if goes_on else "is of another run"
    rank_zero_warn(f"{path} {what}: it is now {set_aside(path)}, and another is written")
    return bool(rows)


def _is_of_run(text: str, rows: Sequence[Row], seed: int, *, goes_on: bool) -> bool:
    """Whether a file's text is what a run has written, up to the checkpoint or further."""
    if rows and not text.startswith(_text(list(rows[0]), rows)):
        return False
    try:
        lines = list(csv.DictReader(io.StringIO(text)))
        numbers = [{name: float(value) for name, value in line.items()} for line in lines]
    except (TypeError, ValueError, csv.Error):  # a line too short or too long, or no number
        return False
    if not goes_on:
        return not numbers
    return bool(text) and all(line.get("seed") == seed for line in numbers)


def _text(fields: Sequence[str], rows: Sequence[Row]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

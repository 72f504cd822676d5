"""Chooses the folder of a run and the checkpoint to resume from."""

from __future__ import annotations

import re
from pathlib import Path

from alm_torchrl.training import Checkpoint, find_checkpoint
from recipes.config import Config
from recipes.saved_config import REMEDY

#: Start time at the end of a folder's default name.
TIMESTAMP = re.compile(r"\d{8}-\d{6}$")


def choose_folder(config: Config) -> Path:
    """Returns the folder of a new run, or of the run to resume."""
    if config.resume not in ("never", "auto"):
        if not Path(config.resume, "checkpoints").is_dir():
            raise ValueError(f"resume={config.resume}: no complete checkpoint in that folder")
        return Path(config.resume)
    folder = Path(config.run.folder)
    if config.resume == "never" or not TIMESTAMP.search(folder.name) or _has_run(folder):
        return folder
    name = TIMESTAMP.sub("", folder.name)
    alike = folder.parent.iterdir() if folder.parent.is_dir() else ()
    earlier = [run for run in alike if TIMESTAMP.sub("", run.name) == name != run.name]
    return next((run for run in sorted(earlier, reverse=True) if _has_run(run)), folder)


def _has_run(folder: Path) -> bool:
    """Returns whether a run has trained here, even if its checkpoints are damaged."""
    checkpoints = folder / "checkpoints"
    found = checkpoints.iterdir() if checkpoints.is_symlink() or checkpoints.exists() else ()
    return any(re.fullmatch(r"update-\d+", path.name) for path in found) or (
        _last_step(folder) is not None
    )


def find_start(config: Config, folder: Path) -> Checkpoint | None:
    """Returns the checkpoint to resume from; raises if a new run would overwrite another."""
    if config.resume == "never":
        if _has_run(folder):
            raise ValueError(
                f"{folder} already contains a run: continue it with resume=auto, or choose another "
                "run.folder"
            )
        return None
    try:
        start = find_checkpoint(folder / "checkpoints")
    except OSError as error:
        raise OSError(f"{error}: {REMEDY}") from error
    if start is None and config.resume != "auto":
        raise ValueError(f"resume={config.resume}: no complete checkpoint in that folder")
    if start is None and (step := _last_step(folder) or 0) > config.checkpoint.every:
        raise ValueError(f"{folder} has a curve of {step} steps but no checkpoint: {REMEDY}")
    return start


def _last_step(folder: Path) -> int | None:
    """Returns the last step of the curves in a folder (0 if unreadable), or None without rows."""
    steps = []
    for path in [*folder.glob("curve.csv"), *folder.glob("seed*/curve.csv")]:
        _, *rows = path.read_bytes().splitlines() or [b""]
        steps += [row.split(b",")[0] for row in rows]
    return max((int(step) if step.isdigit() else 0 for step in steps), default=None)

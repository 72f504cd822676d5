"""Prepares the folder of a run."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from alm_torchrl.training import Checkpoint
from recipes.config import Config, num_processes
from recipes.option_checks import in_sweep
from recipes.run_config import ConfigRecord, find_changes, write_config
from recipes.run_lock import RunLock
from recipes.run_start import TIMESTAMP, choose_folder, find_start
from recipes.schema import declarations

#: Environment variable with the folder that the first process chose.
_FOLDER = "ALM_TORCHRL_RUN_FOLDER"


@dataclass
class Run:
    """A prepared run; its folder is locked until the ``with`` block ends.

    It has the options that changed since the checkpoint ``start``. The first process has the lock.
    ``new`` tells whether this process made the folder.
    """

    folder: Path
    start: Checkpoint | None
    changes: list[dict[str, Any]]
    lock: RunLock | None
    new: bool

    def record(self, config: Config) -> list[Callback]:
        """Returns the callback that records changes once the run is restored."""
        if self.start is None:
            return []
        return [ConfigRecord(self.folder, config, self.changes, self.start.step)]

    def discard(self) -> None:
        """Removes the folder of a run that cannot start, if this process made it."""
        if self.new:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
            self.lock.release()


def prepare(config: Config) -> Run:
    """Prepares the folder of a run whose options are checked; a new run gets a config.yaml.

    Raises:
        ValueError: if the run cannot be resumed with these options.
        OSError: if the folder cannot be written or is in use, or no checkpoint can be read.
    """
    if num_processes(config) == 1:
        # RANK and SLURM_PROCID of a cluster do not matter to a run of one process.
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
    _share_folder(config)
    folder = choose_folder(config)
    new = _rank() == 0 and not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[_FOLDER] = str(folder)
    lock = RunLock(folder) if _rank() == 0 else None
    run = Run(folder, None, [], lock, new)
    try:
        run.start = find_start(config, folder)
        if run.start is not None:
            run.changes = find_changes(folder, config)
            _check_sweep(folder, run.changes)
        elif lock is not None:
            write_config(folder, config)
    except BaseException:
        run.__exit__()
        raise
    return run


def _check_sweep(folder: Path, changes: list[dict[str, Any]]) -> None:
    """Raises if the folder belongs to another run of the same sweep."""
    named = {name for name, option in declarations(Config) if option.metadata["named"]}
    if in_sweep() and (differ := [c["option"] for c in changes if c["option"] in named]):
        raise ValueError(
            f"{folder} was trained with another {differ[0]}: omit run.folder in a sweep (-m), or "
            f"include ${{{differ[0]}}} in it"
        )


def _share_folder(config: Config) -> None:
    """Makes all processes use the folder of the first, whose name may contain its start time."""
    if num_processes(config) == 1:
        return
    if _rank() > 0 and _FOLDER in os.environ:
        config.run.folder = os.environ[_FOLDER]
    elif os.environ.keys() & {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} and TIMESTAMP.search(
        config.run.folder
    ):
        raise ValueError(
            "processes started by torchrun or srun would choose different folders: give all of "
            "them the same run.folder=..."
        )


def _rank() -> int:
    """Returns the rank of this process."""
    return int(getattr(rank_zero_only, "rank", 0))

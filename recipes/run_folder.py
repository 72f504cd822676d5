"""Makes the folder of a run ready to train in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from alm_torchrl.training import Checkpoint
from recipes.config import Config, declarations, num_processes
from recipes.option_checks import check_options, in_sweep
from recipes.run_config import ConfigRecord, find_changes, write_config
from recipes.run_lock import RunLock
from recipes.run_start import TIMESTAMP, choose_folder, find_start

#: Where the first process tells those that it starts what the run's folder is called.
_FOLDER = "ALM_TORCHRL_RUN_FOLDER"


@dataclass
class Run:
    """A run that is about to train; its folder is locked until the ``with`` block ends.

    Attributes:
        folder: where everything goes.
        start: the checkpoint in it to go on from, if the run is resumed.
        changes: the options that are others than before, then.
        lock: of the folder, in the first process.
    """

    folder: Path
    start: Checkpoint | None
    changes: list[dict[str, Any]]
    lock: RunLock | None

    def record(self, config: Config) -> list[Callback]:
        """What notes the changes once the run has been restored."""
        if self.start is None:
            return []
        return [ConfigRecord(self.folder, config, self.changes, self.start.step)]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
            self.lock.release()


def prepare(config: Config) -> Run:
    """Refuses values that contradict each other, and makes a new run's folder with config.yaml.

    The files of a run that is resumed stay as they are.

    Raises:
        ValueError: naming the option and why its value will not do.
        OSError: if the folder cannot be written or is in use, or no checkpoint in it can be read.
    """
    check_options(config)
    if num_processes(config) == 1:
        # Whatever RANK or SLURM_PROCID say: they are of the cluster, and this is a run of its own.
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
    _share_folder(config)
    folder = choose_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[_FOLDER] = str(folder)
    lock = RunLock(folder) if _rank() == 0 else None
    run = Run(folder, None, [], lock)
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
    """Refuses to go on with another run of the same sweep."""
    named = {name for name, option in declarations() if option.metadata["named"]}
    if in_sweep() and (differ := [c["option"] for c in changes if c["option"] in named]):
        raise ValueError(
            f"{folder} was trained with another {differ[0]}, and a sweep (-m) keeps its runs "
            f"apart: leave run.folder out, or have it hold ${{{differ[0]}}}"
        )


def _share_folder(config: Config) -> None:
    """Has all processes of a run take the folder of the first, whose name may hold its start."""
    if num_processes(config) == 1:
        return
    if _rank() > 0 and _FOLDER in os.environ:
        config.run.folder = os.environ[_FOLDER]
    elif os.environ.keys() & {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} and TIMESTAMP.search(
        config.run.folder
    ):
        raise ValueError(
            "torchrun and srun start every process by itself, each of which would name the run "
            "after its own time: give all of them the same run.folder=..."
        )


def _rank() -> int:
    """This process's number, 0 for the first."""
    return int(getattr(rank_zero_only, "rank", 0))

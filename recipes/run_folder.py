"""The folder of a run: where it lies, and what a run there goes on from."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from alm_torchrl.training import Checkpoint, find_checkpoint
from recipes.config import Config, declarations, num_processes
from recipes.option_checks import check_options, in_sweep
from recipes.run_config import ConfigRecord, find_changes, write_config

#: Where the first process tells those that it starts what the run's folder is called.
_FOLDER = "ALM_TORCHRL_RUN_FOLDER"
_TIMESTAMP = re.compile(r"\d{8}-\d{6}$")


@dataclass(frozen=True)
class Run:
    """A run that is about to train.

    Attributes:
        folder: where everything goes.
        start: the checkpoint in it to go on from, if the run is resumed.
        changes: the options that are others than before, then.
    """

    folder: Path
    start: Checkpoint | None
    changes: list[dict[str, Any]]

    def record(self, config: Config) -> list[Callback]:
        """What notes the changes once the run has been restored."""
        if self.start is None:
            return []
        return [ConfigRecord(self.folder, config, self.changes, self.start.step)]


def prepare(config: Config) -> Run:
    """Refuses values that contradict each other, and makes a new run's folder with config.yaml.

    The files of a run that is resumed stay as they are.

    Raises:
        ValueError: naming the option and why its value will not do.
        OSError: if the folder cannot be written.
    """
    check_options(config)
    _share_folder(config)
    folder, start = _find_run(config)
    changes = find_changes(folder, config) if start is not None else []
    _check_sweep(folder, changes)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[_FOLDER] = str(folder)
    if start is None and _rank() == 0:
        write_config(folder, config)
    return Run(folder, start, changes)


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
    elif os.environ.keys() & {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} and _TIMESTAMP.search(
        config.run.folder
    ):
        raise ValueError(
            "torchrun and srun start every process by itself, each of which would name the run "
            "after its own time: give all of them the same run.folder=..."
        )


def _rank() -> int:
    """This process's number, 0 for the first."""
    return int(getattr(rank_zero_only, "rank", 0))


def _find_run(config: Config) -> tuple[Path, Checkpoint | None]:
    """The folder of a new run, or of the one that ``resume`` asks for."""
    folder = Path(config.run.folder)
    if config.resume == "never":
        if any((folder / "checkpoints").glob("update-*")):
            raise ValueError(
                f"there is a run in {folder} already: go on with it by resume=auto, or choose "
                "another run.folder"
            )
        return folder, None
    if config.resume != "auto":
        start = find_checkpoint(Path(config.resume) / "checkpoints")
        if start is None:
            raise ValueError(f"resume={config.resume}: there is no whole checkpoint in that folder")
        return Path(config.resume), start
    earlier = [folder]
    if _TIMESTAMP.search(folder.name):
        alike = folder.parent.glob(_TIMESTAMP.sub("*", folder.name))
        earlier += sorted((f for f in alike if _TIMESTAMP.search(f.name)), reverse=True)
    for run in earlier:
        if (start := find_checkpoint(run / "checkpoints")) is not None:
            return run, start
    return folder, None

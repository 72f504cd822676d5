"""The folder of a run: where it lies, and what a run there goes on from."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from alm_torchrl.files import replacing
from alm_torchrl.training import Checkpoint, find_checkpoint
from recipes.config import Config, num_processes
from recipes.option_checks import check_options

#: Where the first process tells those that it starts what the run's folder is called.
_FOLDER = "ALM_TORCHRL_RUN_FOLDER"
#: What a run cannot change when it goes on.
_FIXED = (
    *("seed", "num_seeds", "task", "agent", "encoder"),
    *("training.num_envs", "training.replay_capacity"),
    *("training.collector", "training.num_workers", "training.overlap"),
    # Or updates would be owed, or paid already, for steps of before.
    *("training.updates_per_step", "training.warmup_updates"),
    *("objective.latent_target", "objective.consistency_target"),  # these have weights of their own
    "evaluation.ema_decay",  # so have averages
    *("objective.gamma", "objective.lmbda", "objective.consistency_coeff"),  # kept beside weights
)
#: What these were before there was an option.
_ONCE = {"training.warmup_updates": 0, "evaluation.ema_decay": 0.0}
_TIMESTAMP = re.compile(r"\d{8}-\d{6}$")


def prepare(config: Config) -> tuple[Path, Checkpoint | None]:
    """Refuses values that contradict each other, and makes the run's folder with its config.yaml.

    Returns:
        The folder, and the checkpoint in it to go on from, if the run is to be resumed.

    Raises:
        ValueError: naming the option and why its value will not do.
        OSError: if the folder cannot be written.
    """
    check_options(config)
    _share_folder(config)
    folder, start = _find_run(config)
    options = OmegaConf.create(vars(config))
    if start is not None:
        before = OmegaConf.load(folder / "config.yaml")
        for name in _FIXED:
            new = OmegaConf.select(options, name)
            # A run may be older than an option.
            old = OmegaConf.select(before, name, default=_ONCE.get(name, new))
            if old != new:
                raise ValueError(
                    f"{folder} was trained with {name}={old} and cannot go on with {new}"
                )
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[_FOLDER] = str(folder)
    if _rank() == 0:
        with replacing(folder / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(options).encode())
    return folder, start


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


def _suffix(ablation: str) -> str:
    """What an ablation adds to the name of a run's folder, so that its curves stay apart."""
    return "" if ablation == "none" else f"-{ablation}"


OmegaConf.register_new_resolver("suffix", _suffix, replace=True)

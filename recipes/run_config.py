"""The config.yaml of a run, and changes of options when the run is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
from omegaconf import OmegaConf

from alm_torchrl.files import atomic_write
from recipes.config import Config
from recipes.saved_config import REMEDY, flatten, read_config
from recipes.schema import declarations


def write_config(folder: Path, config: Config) -> None:
    """Writes config.yaml into a run's folder."""
    with atomic_write(folder / "config.yaml") as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(vars(config))).encode())


def find_changes(folder: Path, config: Config) -> list[dict[str, Any]]:
    """Returns the options that differ from config.yaml in a folder, with both values.

    Raises:
        ValueError: if a fixed option differs, or config.yaml is damaged.
        OSError: if config.yaml cannot be read.
    """
    old = flatten(read_config(folder / "config.yaml"))
    options: Any = OmegaConf.to_container(OmegaConf.create(vars(config)))
    new = flatten(options)
    changes = []
    for name, option in declarations(Config):
        kind, before = option.metadata["kind"], option.metadata["before"]
        if kind == "free":
            continue
        value = old.get(name, before)
        if value == "???":
            raise ValueError(f"{folder / 'config.yaml'} lacks {name}: {REMEDY}")
        if value == new[name]:
            continue
        if kind == "fixed" or _is_restored(name, (value, new[name]), config):
            raise ValueError(
                f"{folder} was trained with {name}={value} and cannot continue with {new[name]}"
            )
        changes.append({"option": name, "from": value, "to": new[name]})
    return changes


def _is_restored(name: str, values: tuple[Any, Any], config: Config) -> bool:
    """Returns whether a checkpoint restores the option with its schedule or parameter groups."""
    rate = name.startswith("learning_rates.")
    return rate and (bool(config.training.schedule) or None in values)


class ConfigRecord(L.Callback):
    """Records changed options of a resumed run in changes.jsonl and config.yaml.

    The files are written when training starts, so that a run that cannot be restored is unchanged.

    ``step`` is the number of environment steps before the changes.
    """

    def __init__(
        self, folder: Path, config: Config, changes: list[dict[str, Any]], step: int
    ) -> None:
        self.folder = folder
        self.config = config
        self.changes = changes
        self.step = step

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Writes both files in the first process, unless the run is finished."""
        experience = pl_module.experience
        if not trainer.is_global_zero or experience.updates >= len(experience):
            return
        with (self.folder / "changes.jsonl").open("a") as file:
            for change in self.changes:
                file.write(json.dumps({"step": self.step, **change}) + "\n")
                option, before, now = change["option"], change["from"], change["to"]
                print(f"from step {self.step}: {option}={now}, {before} before (changes.jsonl)")
        write_config(self.folder, self.config)

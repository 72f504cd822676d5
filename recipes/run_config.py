"""The config.yaml of a run: what a run that goes on may change of it, and what it has changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alm_torchrl.files import atomic_write
from recipes.config import Config, declarations

#: What helps against files of a run that are not as they were.
REMEDY = "restore it from a copy, or begin anew by resume=never in another run.folder"
#: Bytes; that of a run has about 3,000.
_LARGEST = 50_000
#: Mappings and lists within each other.
_DEEPEST = 20


def write_config(folder: Path, config: Config) -> None:
    """Writes a run's config.yaml.

    Raises:
        OSError: if it cannot be written.
    """
    with atomic_write(folder / "config.yaml") as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(vars(config))).encode())


def find_changes(folder: Path, config: Config) -> list[dict[str, Any]]:
    """Compares the options with those that the run in a folder was trained with.

    Returns:
        The options that have changed, each with its name and both values.

    Raises:
        ValueError: if an option has changed that cannot, or config.yaml is not a run's.
        OSError: if config.yaml cannot be read.
    """
    old = dict(_flatten(_read(folder / "config.yaml")))
    options: Any = OmegaConf.to_container(OmegaConf.create(vars(config)))
    new = dict(_flatten(options))
    changes = []
    for name, option in declarations():
        kind, before = option.metadata["kind"], option.metadata["before"]
        if kind == "free":
            continue
        if isinstance(before, str) and before.startswith("${"):  # as another option was
            before = old.get(before[2:-1])
        value = old.get(name, before)
        if value == "???":
            raise ValueError(f"{folder / 'config.yaml'} lacks {name}: {REMEDY}")
        if value == new[name]:
            continue
        if kind == "fixed":
            raise ValueError(
                f"{folder} was trained with {name}={value} and cannot go on with {new[name]}"
            )
        changes.append({"option": name, "from": value, "to": new[name]})
    return changes


def _read(path: Path) -> dict[str, Any]:
    """Reads a config.yaml, which may be anybody's, in bounded time; nothing in it is called."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {REMEDY}") from None
    try:
        text = content.decode()
        if len(content) > _LARGEST or not _is_plain(text):
            raise ValueError
        config: Any = OmegaConf.to_container(OmegaConf.create(text))
    except (ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError):
        config = None
    if not isinstance(config, dict) or not config:
        raise ValueError(f"{path} is not as a run writes it: {REMEDY}")
    return config


def _is_plain(text: str) -> bool:
    """Whether a YAML file has no aliases and few levels, so that reading it takes no time."""
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST or isinstance(event, yaml.AliasEvent):
            return False
    return True


def _flatten(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options of a configuration, by name."""
    for name, _ in declarations():
        *groups, last = name.split(".")
        group: Any = config
        for key in groups:
            group = group.get(key) if isinstance(group, dict) else None
        if isinstance(group, dict) and last in group:
            yield name, group[last]


class ConfigRecord(L.Callback):
    """Writes what has changed of a run that goes on to its changes.jsonl and config.yaml.

    It does so when training starts, so that a run which cannot be restored stays as it was.

    Args:
        folder: of the run.
        config: its options now.
        changes: what :func:`find_changes` returns.
        step: environment steps before the changes.
    """

    def __init__(
        self, folder: Path, config: Config, changes: list[dict[str, Any]], step: int
    ) -> None:
        self.folder = folder
        self.config = config
        self.changes = changes
        self.step = step

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Writes both files, in the first process, if anything is left to do."""
        experience = pl_module.experience
        if not trainer.is_global_zero or experience.updates >= len(experience):
            return
        with (self.folder / "changes.jsonl").open("a") as file:
            for change in self.changes:
                file.write(json.dumps({"step": self.step, **change}) + "\n")
                option, before, now = change["option"], change["from"], change["to"]
                print(f"from step {self.step}: {option}={now}, {before} before (changes.jsonl)")
        write_config(self.folder, self.config)

"""Reads the config.yaml of a run, before PyTorch is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.command_line import CHOICES
from recipes.config import Config
from recipes.schema import declarations

#: Remedy for damaged files of a run.
REMEDY = "restore it from a copy, or start a new run with resume=never in another run.folder"
#: Limits that bound the time to read a file; config.yaml has about 3,000 bytes.
_MAX_BYTES = 50_000
_MAX_DEPTH = 20


def read_config(path: Path) -> dict[str, Any]:
    """Reads an untrusted config.yaml in bounded time, without resolving or calling anything.

    Raises:
        ValueError: if it is missing or damaged.
        OSError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {REMEDY}") from None
    try:
        text = content.decode()
        if len(content) > _MAX_BYTES or not _is_plain(text):
            raise ValueError
        config: Any = OmegaConf.to_container(OmegaConf.create(text))
    except (ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError):
        config = None
    if not isinstance(config, dict) or not config:
        raise ValueError(f"{path} is damaged or not a run's configuration: {REMEDY}")
    return config


def _is_plain(text: str) -> bool:
    """Returns whether a YAML text has no aliases and few levels, so that parsing it is fast."""
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            return False
    return True


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that a configuration has, with names such as ``training.batch_size``."""
    options = {}
    for name, _ in declarations(Config):
        *groups, last = name.split(".")
        group: Any = config
        for key in groups:
            group = group.get(key) if isinstance(group, dict) else None
        if isinstance(group, dict) and last in group:
            options[name] = group[last]
    return options


def resumed_options(options: DictConfig, arguments: Sequence[str]) -> DictConfig:
    """Returns the options of a run: with ``resume=FOLDER``, those of the run in that folder.

    Arguments change them. Arguments that choose a preset, task, encoder or ablation describe a
    whole run instead, and its options are returned as they are.

    Args:
        options: composed from all arguments.
        arguments: overrides of the command line.

    Raises:
        ValueError: if the folder's config.yaml is damaged or has an invalid value.
        OSError: if it cannot be read.
    """
    file = Path(options.resume, "config.yaml")
    given = [re.sub(r"^\++|=.*$", "", argument, flags=re.DOTALL) for argument in arguments]
    whole = {*CHOICES} & {*given} or any(name.startswith("~") for name in given)
    if options.resume in ("never", "auto") or whole or not file.exists():
        return options
    saved, resumed = flatten(read_config(file)), options.copy()
    for name, option in declarations(Config):
        value = saved.get(name, option.metadata["before"])
        if value == MISSING:
            continue
        try:
            if "${" in str(value):  # write_config resolves interpolations; others are not followed
                raise ValueError
            OmegaConf.update(resumed, name, value, merge=False)
        except ValueError:
            raise ValueError(f"{file} has an invalid {name}={value}: {REMEDY}") from None
    for name in given:
        value = OmegaConf.select(options, name)
        OmegaConf.update(resumed, name, value, merge=False, force_add=True)
    return resumed

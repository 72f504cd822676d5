"""Names of run folders, which contain the options given on the command line."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from recipes.config import Config
from recipes.schema import declarations

#: Options that have their own place in the name.
_OWN_PLACE = {"task", "preset", "ablation"}
#: Maximum characters; file systems allow 255 for the whole name.
_LONGEST = 100


def override_name(overrides: Sequence[str]) -> str:
    """Returns the part of a folder's name for overrides, such as ``-learning_rates.actor_0.001``.

    Options that do not affect learning are omitted. The order of options and the spelling of
    numbers do not matter. A name that is too long or has special characters ends in a checksum.

    Args:
        overrides: command line options, as in ``hydra.overrides.task``.

    Examples:
        >>> override_name(["task=ant", "seed=1", "training.batch_size=64", "resume=auto"])
        '-training.batch_size_64'
    """
    unnamed = {name for name, option in declarations(Config) if not option.metadata["named"]}
    parts = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        value = "none" if override.is_delete() else str(override.value())
        parts[override.key_or_group] = value
    if parts.get("task.name", "").strip("'") == _name_of_id(parts.get("task.id", "")):
        unnamed.add("task.id")
    parts = {key: value for key, value in parts.items() if key not in _OWN_PLACE | unnamed}
    name = "".join(f"-{key}_{value}" for key, value in sorted(parts.items()))
    short = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
    if short == name and len(name) <= _LONGEST:
        return name
    return f"{short[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _name_of_id(task: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", task)


def _ablation_name(ablation: str) -> str:
    return "" if ablation == "none" else f"-{ablation}"


def register_names() -> None:
    """Registers the resolvers of ``run.folder`` in conf/mujoco.yaml, and of ``task.name``."""
    OmegaConf.register_new_resolver("suffix", _ablation_name, replace=True)
    OmegaConf.register_new_resolver("name_of_id", _name_of_id, replace=True)
    OmegaConf.register_new_resolver("override_name", override_name, replace=True)

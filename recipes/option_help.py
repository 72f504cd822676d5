"""Lists all options with their meaning, for ``--help`` and the documentation."""

from __future__ import annotations

import re
import shutil
import textwrap
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recipes.command_line import CHOICES
from recipes.config import Config
from recipes.schema import allowed, declarations, groups

CONF = Path(__file__).resolve().parent / "conf"
#: Column of the meanings in the help.
_COLUMN = 36


def help_text(script: str, overrides: list[str]) -> str:
    """Returns all options with the values that a command line gives them.

    Args:
        script: name of the script, which is also that of its file in conf/.
        overrides: options of the command line.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(script, overrides=overrides)
    values: Any = OmegaConf.to_container(config)
    lines = [f"usage: python recipes/{script}.py [preset=...] [task=...] [OPTION=VALUE ...]", ""]
    for group in CHOICES:
        names = ", ".join(sorted(path.stem for path in CONF.glob(f"{group}/*.yaml")))
        lines += _entry(f"  {group}=", names)
    lines += _entry("  -m, --multirun", "one run for each value in seed=0,1,2")
    titles = {name: f"{name}: {declared.__doc__}" for name, declared in groups(Config)}
    titles[""] = "Run:"
    for name, option in declarations(Config):
        group, _, last = name.rpartition(".")
        if title := titles.pop(group, None):
            lines += ["", title]
        value = (values[group] if group else values)[last]
        lines += _entry(f"  {name}={_shown(value)}", _description(option))
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """Returns a value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return re.sub(r"['\"]", "", str(value))


def _description(option: Field[Any]) -> str:
    """Returns meaning and values of an option."""
    values = allowed(option)
    return option.metadata["meaning"] + (f" ({values})" if values else "")


def _entry(name: str, text: str) -> list[str]:
    """Returns the lines of one entry; a long name has a line of its own."""
    width = max(_COLUMN + 24, min(100, shutil.get_terminal_size().columns))
    indent = " " * _COLUMN
    lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    if len(name) >= _COLUMN:
        return [name, *lines]
    return [name.ljust(_COLUMN) + lines[0].strip(), *lines[1:]]


def markdown_table() -> str:
    """Returns a table of all options, with the defaults of the paper's preset."""
    lines = ["| option | default | meaning | values | declared |", "|---|---|---|---|---|"]
    for name, option in declarations(Config):
        default = option.default
        if option.default_factory is not MISSING:
            default = option.default_factory()
        shown = "" if default == "???" else f"`{_shown(default)}`"
        meaning = re.sub(r"([_*|<\[\]])", r"\\\1", option.metadata["meaning"])
        row = (f"`{name}`", shown, meaning, allowed(option), option.metadata["kind"])
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)

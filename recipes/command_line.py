"""The command line of the recipes: checks the names of options before Hydra reads them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from itertools import pairwise

from recipes.config import Config
from recipes.schema import declarations, groups

_OPTIONS = dict(declarations(Config))
_GROUPS = [name for name, _ in groups(Config)]
#: Folders of conf/ from which one file is chosen.
CHOICES = ("preset", "task", "encoder", "ablation")


def read_arguments(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments for Hydra: whole numbers as in ``1e5`` are written out.

    If ``task.id`` is given without ``task.name``, the run is named after it.

    Args:
        arguments: the command line without the script.

    Raises:
        ValueError: if an option does not exist, or is written as ``--seed 3``.

    Examples:
        >>> read_arguments(["training.total_steps=1e5", "-m", "seed=0,1"])
        ['training.total_steps=100000', '-m', 'seed=0,1']
    """
    read = [_read(*pair) for pair in pairwise([*arguments, ""])]
    given = {argument.partition("=")[0] for argument in read}
    if "task.id" in given and "task.name" not in given:
        read.append("task.name='${name_of_id:${task.id}}'")
    return read


def _read(argument: str, following: str) -> str:
    """Checks one argument and writes out its whole numbers."""
    name, equals, value = argument.partition("=")
    if argument.startswith("-"):
        key = name.lstrip("-").replace("-", "_")
        matches = [option for option in _OPTIONS if key in (option, option.rpartition(".")[2])]
        if matches and len(key) > 1:
            value = value if equals or following.startswith("-") else following
            raise ValueError(f"{name} is not an option: write {matches[0]}={value or '...'}")
        return argument
    key = re.sub(r"^(\+\+|\+|~)|@.*$", "", name)
    if not equals and not name.startswith("~"):
        return argument  # a value of the option before, which Hydra reports
    _check_name(key)
    if key in _OPTIONS and _OPTIONS[key].type in ("int", "int | None"):
        return f"{name}={','.join(map(_whole, value.split(',')))}"
    return argument


def _whole(value: str) -> str:
    """Writes ``1e5`` as ``100000``; another value stays as it is."""
    try:
        return str(int(float(value))) if float(value).is_integer() else value
    except ValueError:
        return value


def _check_name(key: str) -> None:
    """Raises a ValueError with similar names if there is no such option."""
    known = [*_OPTIONS, *_GROUPS, *CHOICES]
    outer = ".".join(key.split(".")[:2])  # task.kwargs.frames is a value within task.kwargs
    if key in known or key.startswith("hydra") or _type(outer).startswith(("dict", "list")):
        return
    leaves = {name: name.rpartition(".")[2] for name in known}
    alike = difflib.get_close_matches(key.rpartition(".")[2], leaves.values(), n=2, cutoff=0.75)
    close = difflib.get_close_matches(key, known, n=2, cutoff=0.8) or [
        name for name, leaf in leaves.items() if leaf in alike[:1]
    ]
    hint = f"did you mean {' or '.join(close)}?" if close else "--help lists the options"
    raise ValueError(f"{key} is not an option: {hint}")


def _type(name: str) -> str:
    return str(_OPTIONS[name].type) if name in _OPTIONS else ""


def one_line_with_cause(error: Exception) -> str:
    """Returns the messages of an error and of its cause in one line."""
    message = " ".join(f"{error} {error.__cause__ or ''}".split())
    return message.partition(" full_key: ")[0]  # OmegaConf repeats the option and names classes

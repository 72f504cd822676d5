"""Declares options: meaning, default, allowed values, and what a resumed run may change."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import Field, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING

#: Limits of a number, with the names that Pydantic and annotated-types use.
_LIMITS = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}


def fixed(meaning: str, default: Any = MISSING, *, named: bool = True, **more: Any) -> Any:
    """Declares an option that cannot change when a run is resumed.

    Args:
        meaning: one line for ``--help`` and the documentation.
        default: value unless a file in conf/ sets another; a function or type is called.
        named: whether an overridden value becomes part of the run's folder name.
        more: limits of a number (``ge``, ``gt``, ``le``, ``lt``), or the ``choices``; ``before``,
            the value in runs that are older than the option, which their config.yaml may lack.
    """
    return _declare("fixed", meaning, default, named, **more)


def noted(meaning: str, default: Any = MISSING, *, named: bool = True, **more: Any) -> Any:
    """Declares an option that may change when a run is resumed; changes.jsonl records the change.

    The arguments are those of :func:`fixed`.
    """
    return _declare("noted", meaning, default, named, **more)


def free(meaning: str, default: Any = MISSING, **more: Any) -> Any:
    """Declares an option that affects neither learning nor the name of the run's folder."""
    return _declare("free", meaning, default, named=False, **more)


def _declare(
    kind: str,
    meaning: str,
    default: Any,
    named: bool,
    before: Any = MISSING,
    choices: tuple[str, ...] = (),
    **limits: float,
) -> Any:
    if unknown := limits.keys() - _LIMITS.keys():
        raise TypeError(f"unknown limits: {unknown}")
    value = {"default_factory": default} if callable(default) else {"default": default}
    metadata = {"kind": kind, "meaning": meaning, "named": named, "before": before}
    return field(**value, metadata={**metadata, "choices": choices, "limits": limits})


def groups(config: type) -> Iterator[tuple[str, type]]:
    """Yields the name and class of every group of options, such as ``training``."""
    for option in fields(config):
        factory: Any = option.default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            yield option.name, factory


def declarations(config: type) -> Iterator[tuple[str, Field[Any]]]:
    """Yields the name of every option, such as ``training.batch_size``, and its field."""
    nested = dict(groups(config))
    for option in fields(config):
        if option.name not in nested:
            yield option.name, option
    for group, declared in nested.items():
        yield from ((f"{group}.{option.name}", option) for option in fields(declared))


def allowed(option: Field[Any]) -> str:
    """Returns the values that an option accepts, such as ``at least 0 and below 1``."""
    if choices := option.metadata["choices"]:
        return " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
    limits = option.metadata["limits"].items()
    return " and ".join(f"{_LIMITS[name][0]} {limit}" for name, limit in limits)


def check_value(name: str, option: Field[Any], value: Any) -> None:
    """Raises a ValueError if an option does not accept a value; every option accepts its null."""
    choices, limits = option.metadata["choices"], option.metadata["limits"]
    if choices and value not in choices:
        raise ValueError(f"{name}={value} is unknown: choose {allowed(option)}")
    inside = (_LIMITS[limit][1](value, bound) for limit, bound in limits.items())
    if value is not None and not all(inside):
        raise ValueError(f"{name}={value} must be {allowed(option)}")

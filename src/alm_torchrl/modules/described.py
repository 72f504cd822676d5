"""Components that say how they were made, so that a saved agent can make them again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["describe", "described", "plain_numbers", "rebuild"]

_CLASSES: dict[str, type] = {}
_NAME = "component"
_T = TypeVar("_T", bound=type)


def described(cls: _T) -> _T:
    """Lets a class remember the arguments that an instance was made with.

    Args:
        cls: the class, whose arguments are plain values or instances of such classes.

    Returns:
        The class itself. Its subclasses are not described unless they are decorated too.
    """
    init = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)

    @functools.wraps(init)
    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = plain_numbers(args), plain_numbers(kwargs)
        init(self, *args, **kwargs)
        if type(self) is cls:
            given = dict(list(signature.bind(self, *args, **kwargs).arguments.items())[1:])
            for parameter in signature.parameters.values():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    given |= given.pop(parameter.name, {})
            object.__setattr__(self, "_given", given)

    cls.__init__ = remember  # type: ignore[misc]
    _CLASSES[cls.__name__] = cls
    return cls


def plain_numbers(value: Any) -> Any:
    """Python's own numbers in place of NumPy's, and tuples in place of arrays and tensors.

    Args:
        value: anything; looked through are dictionaries, lists and tuples.

    Returns:
        The same with such numbers, which a file can hold that is read without running code.

    Examples:
        >>> import numpy as np
        >>> plain_numbers({"size": np.int64(3), "low": np.zeros(2)})
        {'size': 3, 'low': (0.0, 0.0)}
    """
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        numbers = value.tolist()
        return _as_tuples(numbers)
    if type(value) is dict:
        return {plain_numbers(key): plain_numbers(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain_numbers, value))
    return value


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def describe(component: object) -> dict[str, Any] | None:
    """The class and arguments of a component as plain values, which a file can hold.

    Args:
        component: anything.

    Returns:
        What :func:`rebuild` takes, or ``None`` if the component, or something that it was made
        from, is not of this package.

    Examples:
        >>> from alm_torchrl.modules import MLPEncoder
        >>> describe(MLPEncoder(3, latent_dim=4))
        {'component': 'MLPEncoder', 'observation_dim': 3, 'latent_dim': 4}
    """
    try:
        return _plain(component) if hasattr(component, "_given") else None
    except TypeError:
        return None


def rebuild(description: Any) -> Any:
    """Makes a component like the one that was described; the weights are new.

    Args:
        description: what :func:`describe` returned.

    Returns:
        The component.

    Raises:
        ValueError: if this release knows no such component.

    Examples:
        >>> from alm_torchrl.modules import MLPEncoder
        >>> rebuild(describe(MLPEncoder(3, latent_dim=4))).latent_dim
        4
    """
    if isinstance(description, tuple | list):
        return type(description)(map(rebuild, description))
    if not isinstance(description, dict):
        return description
    if _NAME not in description:
        return {key: rebuild(value) for key, value in description.items()}
    name = description[_NAME]
    if name not in _CLASSES:
        raise ValueError(f"this release of alm-torchrl has no component {name!r}; upgrade it")
    return _CLASSES[name](**{k: rebuild(v) for k, v in description.items() if k != _NAME})


def _plain(value: Any) -> Any:
    """Raises a TypeError for what is neither plain nor described."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple | list):  # torch.Size too
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    if isinstance(value, Mapping):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    value = getattr(value, "_orig_mod", value)  # what torch.compile wrapped
    given = getattr(value, "_given", None)
    if given is None or type(value) is not _CLASSES.get(type(value).__name__):
        raise TypeError(f"{type(value).__name__} cannot be described")
    return {_NAME: type(value).__name__, **{k: _plain(v) for k, v in given.items()}}

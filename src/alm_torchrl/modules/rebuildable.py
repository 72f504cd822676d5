"""Components that a saved agent can rebuild from their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

_NAME = "component"


class Rebuildable:
    """Records its arguments for :func:`describe`.

    Only classes of this package can be rebuilt, so that loading a file runs no other code.
    """

    _classes: ClassVar[dict[str, type]] = {}
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("alm_torchrl."):
            Rebuildable._classes[cls.__name__] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Records the arguments of the constructor."""
        instance = super().__new__(cls)
        # Frozen dataclasses, and torch modules before __init__, refuse a plain assignment.
        object.__setattr__(instance, "_arguments", (args, kwargs))
        return instance


def plain_numbers(value: Any) -> Any:
    """Converts NumPy numbers to Python numbers, and arrays and tensors to tuples.

    Examples:
        >>> import numpy as np
        >>> plain_numbers({"size": np.int64(3), "low": np.zeros(2)})
        {'size': 3, 'low': (0.0, 0.0)}
    """
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        return _as_tuples(value.tolist())
    if type(value) is dict:
        return {plain_numbers(key): plain_numbers(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain_numbers, value))
    return value


def describe(value: Any) -> Any:
    """Converts components of this package and their arguments to values that a file can hold.

    Raises:
        TypeError: for other objects.

    Examples:
        >>> from alm_torchrl.modules import MLPEncoder
        >>> describe(MLPEncoder(3, latent_dim=4))
        {'component': 'MLPEncoder', 'observation_dim': 3, 'latent_dim': 4}
    """
    value = plain_numbers(getattr(value, "_orig_mod", value))  # unwraps torch.compile
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple | list):  # torch.Size too
        return (list if isinstance(value, list) else tuple)(map(describe, value))
    if isinstance(value, Mapping):
        return {describe(key): describe(entry) for key, entry in value.items()}
    name = getattr(value, "__name__", type(value).__name__)
    if getattr(nn, name, None) is value:
        return name
    if Rebuildable._classes.get(name) is not type(value):
        raise TypeError(f"{name} cannot be saved: it is not a component of alm_torchrl")
    component: Any = value
    args, kwargs = component._arguments
    signature = inspect.signature(type(component).__init__)
    arguments = dict(signature.bind(component, *args, **kwargs).arguments)
    del arguments["self"]
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    return {_NAME: name, **describe(arguments)}


def rebuild(description: Any) -> Any:
    """Builds the components that :func:`describe` described, with new weights.

    Raises:
        ValueError: if this release has no such component.
    """
    if isinstance(description, tuple | list):
        return type(description)(map(rebuild, description))
    if not isinstance(description, dict):
        return description
    arguments = {key: rebuild(value) for key, value in description.items() if key != _NAME}
    if _NAME not in description:
        return arguments
    name = description[_NAME]
    if name not in Rebuildable._classes:
        raise ValueError(f"this release of alm-torchrl has no component {name!r}; upgrade it")
    return Rebuildable._classes[name](**arguments)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value

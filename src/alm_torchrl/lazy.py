"""Public names of a package that are imported on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_imports(
    namespace: dict[str, Any], modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns ``__getattr__`` and ``__dir__`` of a package that imports names on first use.

    If another package is missing, the first use of a name raises an ``ImportError`` with the
    remedy.

    Args:
        namespace: ``globals()`` of the package, which has ``__all__``.
        modules: the module of each such name.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(modules[name]), name)
        except ModuleNotFoundError as error:
            remedy = "pip install 'alm-torchrl[recipes]'"
            raise ImportError(f"{name} needs {error.name}: {remedy}") from error
        except AttributeError as error:  # Python would report that this package lacks the name
            raise ImportError(f"{modules[name]} cannot be imported: {error}") from error
        namespace[name] = value
        return value

    def names() -> list[str]:
        return sorted({*namespace, *namespace["__all__"]})

    return get, names

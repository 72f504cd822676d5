"""Running networks with other parameters, and sharing and loading their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tensordict import TensorDictBase, TensorDictParams
from torch import nn

__all__ = ["match_compiled", "parametrized", "share_untrained"]


def match_compiled(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Renames entries in place, so that compiled and plain modules load each other's weights.

    ``torch.compile`` puts ``_orig_mod.`` before the names in the module that it wraps.
    """
    names = {name.replace("_orig_mod.", ""): prefix + name for name in module.state_dict()}
    for name in [name for name in state_dict if name.startswith(prefix)]:
        wanted = names.get(name.removeprefix(prefix).replace("_orig_mod.", ""), name)
        if wanted != name:
            state_dict[wanted] = state_dict.pop(name)


def share_untrained(source: TensorDictParams, target: Any) -> None:
    """Shares entries without a gradient, such as running statistics, with a target.

    ``SoftUpdate`` follows only trained parameters and would leave copies of these behind.
    """
    for key, value in source.items(True, True):
        if not value.requires_grad:
            target.get(key).data = value.data


@contextmanager
def parametrized(network: nn.Module, params: TensorDictBase) -> Iterator[None]:
    """Runs a network with other parameters and restores its own, even after an exception.

    ``TensorDict.to_module`` as a context manager does not restore after an exception.
    """
    own = params.to_module(network, preserve_module_state=False)
    try:
        yield
    finally:
        own.to_module(network, preserve_module_state=False, return_swap=False)

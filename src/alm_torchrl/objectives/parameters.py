"""Running networks with other parameters, and checking and loading shared weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["check_shared", "holding", "match_compiled", "parametrized", "places", "summary"]

#: The dictionaries and names under which a module holds its tensors, by their keys.
Places: TypeAlias = dict[NestedKey, tuple[dict[str, Any], str]]


def summary(name: str, network: nn.Module) -> str:
    """Describes a network in one line: class, first and last entries, and size."""
    parameters: Iterable[Any] = network.parameters()
    count = sum(p.numel() for p in parameters if not is_lazy(p))
    entries = ""
    if isinstance(network, TensorDictModuleBase):
        entries = f"({', '.join(map(str, network.in_keys))} -> {network.out_keys[-1]})"
    return f"{name}: {type(network).__name__}{entries}, {count:,} parameters"


def match_compiled(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Renames entries in place, so that compiled and plain modules load each other's weights.

    ``torch.compile`` adds ``_orig_mod.`` to the names in the module that it wraps.
    """
    names = {name.replace("_orig_mod.", ""): prefix + name for name in module.state_dict()}
    for name in [name for name in state_dict if name.startswith(prefix)]:
        wanted = names.get(name.removeprefix(prefix).replace("_orig_mod.", ""), name)
        if wanted != name:
            state_dict[wanted] = state_dict.pop(name)


def check_shared(shared: Iterable[tuple[dict[str, Any], str, Any]]) -> None:
    """Raises if a module's parameter or buffer is no longer the given tensor."""
    for tensors, key, tensor in shared:
        own = tensors.get(key)
        if own is tensor or (own is not None and own.data_ptr() == tensor.data_ptr()):
            continue
        raise RuntimeError(
            "a network no longer shares its tensors with the loss, because it was moved or changed "
            "after the loss was built; move networks with loss.to(device), or build the loss later"
        )


def places(module: nn.Module) -> Places:
    """Returns where a module holds its parameters and buffers, by their keys in a TensorDict."""
    return {
        unravel_key((*filter(None, path.split(".")), name)): (tensors, name)
        for path, owner in module.named_modules(remove_duplicate=False)
        for tensors in (owner._parameters, owner._buffers)
        for name in tensors
    }


@contextmanager
def holding(places: Places, tensors: dict[NestedKey, Tensor]) -> Iterator[None]:
    """Runs a module with other tensors, like :func:`parametrized` in a fraction of the time.

    The losses switch networks so often that ``TensorDict.to_module`` would take a third of the
    time of compilation and of the Python code of an update.
    """
    chosen = [places[key] for key in tensors]
    own = [holder[name] for holder, name in chosen]
    for (holder, name), tensor in zip(chosen, tensors.values(), strict=True):
        holder[name] = tensor
    try:
        yield
    finally:
        for (holder, name), tensor in zip(chosen, own, strict=True):
            holder[name] = tensor


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

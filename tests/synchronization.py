"""Finds where a computation would make the host wait for a GPU, without a GPU."""

from __future__ import annotations

from typing import Any

from torch import bool as torch_bool
from torch.utils._python_dispatch import TorchDispatchMode

#: Operators whose result, or the shape of it, the host has to read.
READS = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


def reads_on_the_host(func: Any, args: Any) -> bool:
    """Returns whether an operator would make the host wait for the device."""
    name = func._schema.name.removeprefix("aten::")
    masked = name in ("index", "index_put", "index_put_") and any(
        index is not None and index.dtype == torch_bool for index in args[1]
    )
    return name in READS or masked


class HostReads(TorchDispatchMode):
    """Notes every operator of a block that would read from the device.

    Attributes:
        found: their names, in order.
        operators: how many operators there were in all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        if reads_on_the_host(func, args):
            self.found.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))

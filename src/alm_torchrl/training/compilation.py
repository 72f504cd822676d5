"""Whether a run compiles its losses."""

from __future__ import annotations

import os
from shutil import which

import torch

__all__ = ["worth_compiling"]

#: Updates from which minutes of compilation are expected to be earned back on a CPU.
WORTHWHILE_UPDATES = 10_000


def worth_compiling(mode: str, updates: int, device: torch.device | str = "cpu") -> bool:
    """Whether ``torch.compile`` should trace the losses of a run.

    Args:
        mode: ``"auto"`` for a run on a GPU, or one of 10,000 updates or more, if there is a C++
            compiler; ``"always"``; or ``"never"``.
        updates: the length of the run.
        device: where the losses are computed.

    Returns:
        Whether to compile.

    Raises:
        ValueError: for any other mode.

    Examples:
        >>> worth_compiling("auto", updates=100)
        False
    """
    if mode not in ("auto", "always", "never"):
        raise ValueError(f"compile={mode!r} is none of auto, always, never")
    if mode != "auto":
        return mode == "always"
    compilers = (os.environ.get("CXX", "g++"), "clang++", "c++", "cl")
    long_enough = torch.device(device).type == "cuda" or updates >= WORTHWHILE_UPDATES
    return long_enough and any(map(which, compilers))

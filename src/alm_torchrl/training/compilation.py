"""Whether a run compiles its losses."""

from __future__ import annotations

import os
from shutil import which

import torch._dynamo
from torch import nn

__all__ = ["compile_loss"]

#: Updates from which minutes of compilation are expected to be earned back on a CPU.
WORTHWHILE_UPDATES = 10_000


def compile_loss(loss: nn.Module, mode: str, updates: int) -> bool:
    """Has ``torch.compile`` trace a loss at its first call, where that pays.

    Args:
        loss: the loss, compiled in place.
        mode: ``"auto"`` compiles for a run of 10,000 updates or more if there is a C++ compiler,
            and falls back to eager execution with a warning if that fails; ``"always"`` compiles,
            and a failure is an error; ``"never"`` does not.
        updates: the length of the run.

    Returns:
        Whether the loss will be compiled.

    Raises:
        ValueError: for any other mode.
    """
    if mode not in ("auto", "always", "never"):
        raise ValueError(f"compile={mode!r} is none of auto, always, never")
    if mode == "never":
        return False
    if mode == "auto":
        compilers = (os.environ.get("CXX", "g++"), "clang++", "c++", "cl")
        if updates < WORTHWHILE_UPDATES or not any(map(which, compilers)):
            return False
        torch._dynamo.config.suppress_errors = True
    loss.compile()
    return True

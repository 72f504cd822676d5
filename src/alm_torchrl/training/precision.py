"""The arithmetic that a run computes its losses in."""

from __future__ import annotations

import time
from typing import Literal, cast

import torch

__all__ = ["choose_precision"]

Precision = Literal["32-true", "bf16-mixed"]

#: How many times faster bfloat16 matrix products must be to be chosen.
WORTHWHILE_SPEEDUP = 1.5
#: Where smaller products tell enough: a processor without bfloat16 takes seconds for a large one.
HOPELESS_SPEEDUP = 0.25


def choose_precision(name: str, device: torch.device | str = "cpu") -> Precision:
    """Resolves the precision of a run to one that Lightning's ``Trainer`` knows.

    Args:
        name: ``"32-true"`` for float32; ``"bf16-mixed"`` for matrix products in bfloat16, with
            weights, optimizer, distributions, targets and the outputs of values, rewards and
            classifier left in float32; ``"auto"`` times a matrix product in both on the device,
            and takes bfloat16 where that is 1.5 times as fast.
        device: where the losses are computed.

    Returns:
        ``"32-true"`` or ``"bf16-mixed"``.

    Raises:
        ValueError: for any other name.

    Examples:
        >>> choose_precision("32-true")
        '32-true'
    """
    if name not in ("32-true", "bf16-mixed", "auto"):
        raise ValueError(f"precision={name!r} is none of 32-true, bf16-mixed, auto")
    if name != "auto":
        return cast("Precision", name)
    return "bf16-mixed" if _speedup(torch.device(device)) >= WORTHWHILE_SPEEDUP else "32-true"


def _speedup(device: torch.device) -> float:
    """How many times faster than float32 a product of two large matrices is in bfloat16."""
    for size in (128, 256, 512, 1024):
        speedup = _matmul_seconds(torch.float32, device, size) / _matmul_seconds(
            torch.bfloat16, device, size
        )
        if speedup < HOPELESS_SPEEDUP:
            break
    return speedup


def _matmul_seconds(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """The shortest of a few products, so that a busy moment of the machine does not count."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return min(seconds)

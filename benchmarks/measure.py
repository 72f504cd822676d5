"""Alternating time measurements in one process, and the peak speed of the machine."""

from __future__ import annotations

import gc
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch

Work = Callable[[], object]


@dataclass
class Case:
    """One function to time.

    Attributes:
        name: name in tables.
        work: function to time; its result is ignored.
        flops: floating point operations of one call; 0 if unknown.
        frames: environment steps of one call; 0 if it has none.
        repeats: calls per sample, for short functions.
        warmup: calls before timing starts, for compilation and capture of a CUDA graph.
        seconds: time of one call, one sample per round.
        first: seconds of the first call, including compilation.
    """

    name: str
    work: Work
    flops: int = 0
    frames: int = 0
    repeats: int = 1
    warmup: int = 2
    seconds: list[float] = field(default_factory=list)
    first: float = 0.0

    @property
    def median(self) -> float:
        """Median seconds of one call."""
        return median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of the seconds of one call."""
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def timed(work: Work, repeats: int = 1) -> float:
    """Returns the seconds of one call, including the work on the device."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    return (time.perf_counter() - start) / repeats


def alternate(cases: list[Case], rounds: int) -> None:
    """Times every case once per round, so that other load affects all cases alike.

    The first calls are excluded.
    """
    for case in cases:
        case.first = timed(case.work)
    for case in cases:
        timed(case.work, case.warmup - 1)
    gc.collect()
    for _ in range(rounds):
        for case in cases:
            case.seconds.append(timed(case.work, case.repeats))


def ratios(case: Case, reference: Case) -> tuple[float, float, float]:
    """Returns lower quartile, median and upper quartile of the speedup over a reference."""
    each = [r / c for r, c in zip(reference.seconds, case.seconds, strict=True)]
    low, _, high = quantiles(each, n=4, method="inclusive")
    return low, median(each), high


def matmul_case(dtype: torch.dtype, device: torch.device, size: int = 2048) -> Case:
    """Returns a case for a matrix product, the machine's peak for network arithmetic."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    name = f"peak: matmul {str(dtype).removeprefix('torch.')}"
    return Case(name, lambda: torch.mm(a, b, out=out), flops=2 * size**3)


def copy_case(device: torch.device, mebibytes: int = 128) -> Case:
    """Returns a case for a copy larger than the caches; it reads and writes the given size."""
    source = torch.randn(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    return Case(f"peak: copy of {mebibytes} MiB", lambda: target.copy_(source))


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory in bytes, of the device or, on a CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize() -> None:
    """Waits for the GPU, if any."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

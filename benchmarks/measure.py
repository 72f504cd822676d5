"""Alternating measurements in one process, beside what the machine itself can do."""

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
    """One thing to time.

    Attributes:
        name: how the tables call it.
        work: what is timed; returns nothing of interest.
        flops: arithmetic of one call by torch's own counter, for the floor; unknown if 0.
        repeats: calls in one sample, for what is too short to time alone.
        warmup: calls that are not counted, the first of which compiles and the last of which may
            capture a CUDA graph.
        seconds: time of one call, a sample a round.
        first: seconds of the first call, compilation included.
    """

    name: str
    work: Work
    flops: int = 0
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
        """The quartiles."""
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def timed(work: Work, repeats: int = 1) -> float:
    """Seconds of one call, once the device has finished it."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    return (time.perf_counter() - start) / repeats


def alternate(cases: list[Case], rounds: int) -> None:
    """Times every case once a round, so that a busy moment of the machine meets all of them.

    The first calls (compilation, caches) are not counted.
    """
    for case in cases:
        case.first = timed(case.work)
        timed(case.work, case.warmup - 1)
    gc.collect()
    for _ in range(rounds):
        for case in cases:
            case.seconds.append(timed(case.work, case.repeats))


def ratios(case: Case, reference: Case) -> tuple[float, float, float]:
    """How many times faster than a reference, by the rounds they shared: quartiles and median."""
    each = [r / c for r, c in zip(reference.seconds, case.seconds, strict=True)]
    low, _, high = quantiles(each, n=4, method="inclusive")
    return low, median(each), high


def matmul_case(dtype: torch.dtype, device: torch.device, size: int = 2048) -> Case:
    """A square matrix product: the machine's own peak for the arithmetic of a network."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    name = f"peak: matmul {str(dtype).removeprefix('torch.')}"
    return Case(name, lambda: torch.mm(a, b, out=out), flops=2 * size**3)


def copy_case(device: torch.device, mebibytes: int = 128) -> Case:
    """A copy that no cache holds; it reads and writes as many bytes as its name says, each."""
    source = torch.randn(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    return Case(f"peak: copy of {mebibytes} MiB", lambda: target.copy_(source))


def peak_memory(device: torch.device) -> int:
    """The most memory held so far, in bytes: the device's, or the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize() -> None:
    """Waits for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

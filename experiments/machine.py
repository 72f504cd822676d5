"""The machine that a measurement was made on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

__all__ = ["describe_machine"]


def describe_machine(device: torch.device) -> dict[str, object]:
    """Returns the device, the number of threads and the versions that timings depend on."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

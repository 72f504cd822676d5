"""Precision, compilation and processes of a run."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from shutil import which

import lightning as L  # noqa: N812 - Lightning's own convention
import torch


def choose_precision(name: str, device: torch.device | str = "cpu") -> str:
    """Returns the precision of losses on a device.

    ``"32-true"`` is float32. ``"bf16-mixed"`` computes matrix products in bfloat16, and keeps
    weights, optimizer, distributions, targets, values, rewards and logits in float32. ``"auto"``
    chooses bfloat16 on hardware with units for it (NVIDIA GPUs since Ampere, CPUs with AMX).
    """
    if name not in ("32-true", "bf16-mixed", "auto"):
        raise ValueError(f"precision={name!r} is unknown: choose 32-true, bf16-mixed or auto")
    if name != "auto":
        return name
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return "bf16-mixed" if native else "32-true"


def worth_compiling(mode: str, updates: int, device: torch.device | str = "cpu") -> bool:
    """Returns whether to compile the losses of a run with ``torch.compile``.

    ``"auto"`` requires a C++ compiler, and a GPU or at least 10,000 updates, because shorter runs
    on a CPU do not earn back the minutes of compilation.
    """
    if mode not in ("auto", "always", "never"):
        raise ValueError(f"compile={mode!r} is unknown: choose auto, always or never")
    if mode != "auto":
        return mode == "always"
    compilers = (os.environ.get("CXX", "g++"), "clang++", "c++", "cl")
    long_enough = torch.device(device).type == "cuda" or updates >= 10_000
    return long_enough and any(map(which, compilers))


def rank_seed(seed: int, rank: int) -> int:
    """Returns the seed of a process; rank 0 has the seed of the run."""
    return seed + 1_000_003 * rank  # far apart, because runs often have consecutive seeds


def is_lost_process(error: RuntimeError) -> bool:
    """Returns whether an error of training means that another process is unreachable."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def exit_with_parent(trainer: L.Trainer) -> None:
    """Makes a process that Lightning started exit when its parent process ends.

    Lightning ends the processes if one of them fails, but not if the parent is killed.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None or environment.creates_processes_externally or trainer.local_rank == 0:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        sys.stderr.write("exiting: the process that started this one has ended\n")
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def silence_library_warnings() -> None:
    """Silences library messages that do not concern the run."""
    for name in ("lightning.pytorch", "lightning.fabric", "torchrl"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # This logger reports why Lightning kills the processes of a run.
    launcher = "lightning.fabric.strategies.launchers.subprocess_script"
    logging.getLogger(launcher).setLevel(logging.INFO)
    for message in (
        ".*treespec.*is deprecated.*",  # Lightning on torch 2.13
        ".*inline_inbuilt_nn_modules is deprecated.*",  # tensordict on torch 2.13
        ".*does not have many workers.*",  # the experience is iterated in this process
        ".*constructed with capturable=True.*",  # the updates before a CUDA graph
        ".*in eval mode at the start of training.*",  # no layer here differs in eval mode
    ):
        warnings.filterwarnings("ignore", message=message)

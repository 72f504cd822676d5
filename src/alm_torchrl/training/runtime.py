"""Precision, compilation and processes of a run."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from shutil import which
from typing import Any, Literal, cast

import lightning as L  # noqa: N812 - Lightning's own convention
import torch

Precision = Literal["32-true", "bf16-mixed"]

#: Shorter runs on a CPU do not earn back the minutes of compilation.
WORTHWHILE_UPDATES = 10_000
#: Distance between the seeds of two processes, since runs often take consecutive seeds.
_STRIDE = 1_000_003


def choose_precision(name: str, device: torch.device | str = "cpu") -> Precision:
    """Resolves the precision of the losses.

    Args:
        name: ``"32-true"`` for float32; ``"bf16-mixed"`` for matrix products in bfloat16, with
            weights, optimizer, distributions, targets and the outputs of values, rewards and
            classifier in float32; ``"auto"`` for bfloat16 on hardware with bfloat16 matrix units
            (NVIDIA GPUs since Ampere, CPUs with AMX).
        device: where the losses are computed.

    Examples:
        >>> choose_precision("32-true")
        '32-true'
    """
    if name not in ("32-true", "bf16-mixed", "auto"):
        raise ValueError(f"precision={name!r} is unknown: choose 32-true, bf16-mixed or auto")
    if name != "auto":
        return cast("Precision", name)
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return "bf16-mixed" if native else "32-true"


def worth_compiling(mode: str, updates: int, device: torch.device | str = "cpu") -> bool:
    """Whether ``torch.compile`` should trace the losses of a run.

    Args:
        mode: ``"auto"`` for a run on a GPU, or one of 10,000 updates or more, if there is a C++
            compiler; ``"always"``; or ``"never"``.
        updates: updates of the run.
        device: where the losses are computed.

    Examples:
        >>> worth_compiling("auto", updates=100)
        False
    """
    if mode not in ("auto", "always", "never"):
        raise ValueError(f"compile={mode!r} is unknown: choose auto, always or never")
    if mode != "auto":
        return mode == "always"
    compilers = (os.environ.get("CXX", "g++"), "clang++", "c++", "cl")
    long_enough = torch.device(device).type == "cuda" or updates >= WORTHWHILE_UPDATES
    return long_enough and any(map(which, compilers))


def rank_seed(seed: int, rank: int) -> int:
    """The seed of one of several processes; rank 0 has the seed of the run.

    Examples:
        >>> rank_seed(7, 0)
        7
    """
    return seed + _STRIDE * rank


def gather(trainer: L.Trainer, value: Any) -> list[Any]:
    """The values of all processes in the order of their ranks; all of them must call."""
    values: list[Any] = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def any_rank(trainer: L.Trainer, decision: bool) -> bool:
    """Whether the decision is true in any process; all of them must call."""
    return trainer.strategy.reduce_boolean_decision(decision, all=False)


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error of training says that another process of the run is unreachable."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def exit_with_parent(trainer: L.Trainer) -> None:
    """Ends a process that Lightning started once the process that started it is gone.

    Lightning ends its processes when one of them fails, but not when it is killed itself.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None or environment.creates_processes_externally or trainer.local_rank == 0:
        return
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    sys.stderr.write("exiting: the process that started this one has ended\n")
    sys.stderr.flush()
    os._exit(1)


def silence_library_warnings() -> None:
    """Silences notices of the libraries about themselves, but no warning about the run."""
    for name in ("lightning.pytorch", "lightning.fabric", "torchrl"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # This logger says why the processes of a run are killed.
    launcher = "lightning.fabric.strategies.launchers.subprocess_script"
    logging.getLogger(launcher).setLevel(logging.INFO)
    for message in (
        ".*treespec.*is deprecated.*",  # Lightning on torch 2.13
        ".*inline_inbuilt_nn_modules is deprecated.*",  # tensordict on torch 2.13
        ".*does not have many workers.*",  # the experience is iterated in this process
        ".*in eval mode at the start of training.*",  # no layer here differs in eval mode
    ):
        warnings.filterwarnings("ignore", message=message)

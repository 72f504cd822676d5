"""Several processes that train one agent together."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import torch

__all__ = ["any_rank", "exit_with_parent", "gather", "is_lost_process", "rank_seed"]

#: Far from one process to the next, since runs take seeds that follow each other.
_STRIDE = 1_000_003


def rank_seed(seed: int, rank: int) -> int:
    """The seed of one of several processes.

    Args:
        seed: of the run.
        rank: the process's number, 0 for the first.

    Returns:
        The run's own seed for the first process, and another for each of the others.

    Examples:
        >>> rank_seed(7, 0)
        7
    """
    return seed + _STRIDE * rank


def gather(trainer: L.Trainer, value: Any) -> list[Any]:
    """What every process of a run has, in the order of their ranks; all of them must call.

    Args:
        trainer: of the run.
        value: what this process has; it is pickled where there are others.
    """
    values: list[Any] = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def any_rank(trainer: L.Trainer, decision: bool) -> bool:
    """Whether any process of a run has decided so; all of them must call.

    Args:
        trainer: of the run.
        decision: what this process has decided.
    """
    return trainer.strategy.reduce_boolean_decision(decision, all=False)


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error says that another process of the run cannot be reached any more.

    Args:
        error: what training has raised.
    """
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def exit_with_parent(trainer: L.Trainer) -> None:
    """Has a process end when the one that started it is gone.

    Lightning's launcher ends the processes that it started when one of them fails. If it is killed
    itself, nothing else would end those that wait for it.

    Args:
        trainer: of the run; nothing happens in processes that Lightning has not started.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None or environment.creates_processes_externally or trainer.local_rank == 0:
        return
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    sys.stderr.write("the process that started this one has ended, and so does this one\n")
    sys.stderr.flush()
    os._exit(1)

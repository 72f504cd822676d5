"""A Lightning trainer with everything a run should leave behind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torchrl.envs import EnvBase

from alm_torchrl.training.callbacks import (
    EvaluationSchedule,
    LearningCurve,
    SaveAgent,
    StopOnSignal,
    Video,
)
from alm_torchrl.training.checkpoints import Checkpoint, Checkpoints, TensorFiles, check_processes
from alm_torchrl.training.measurements import Measurement
from alm_torchrl.training.precision import choose_precision
from alm_torchrl.training.processes import exit_with_parent
from alm_torchrl.training.progress import ProgressBar

__all__ = ["make_trainer"]


def make_trainer(
    folder: str | Path,
    *,
    seed: int,
    num_seeds: int = 1,
    title: str,
    eval_every: int,
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    start: Checkpoint | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    precision: str = "32-true",
    tensorboard: bool = True,
    wandb: bool = False,
    measurements: Sequence[type[Measurement]] = (),
    video_env: EnvBase | None = None,
) -> L.Trainer:
    """Makes a trainer that evaluates, logs, plots and keeps the best and the last state.

    The folder holds ``curve.csv`` and ``curve.png``, ``agent_best.pt`` and ``agent_last.pt``,
    ``checkpoints/`` and ``logs/`` afterwards, also when the run is interrupted. Of several seeds
    trained at once, each has a folder ``seed<n>/`` of its own for curve and agents.

    Args:
        folder: where everything goes; it must exist.
        seed: noted in the curve.
        num_seeds: seeds trained at once: ``seed``, ``seed + 1`` and so on.
        title: of the plot.
        eval_every: updates between two evaluations, not counting the warm-up's.
        checkpoint_every: updates between two checkpoints; none are kept if left out.
        keep_checkpoints: how many of the newest are kept.
        start: the checkpoint to go on from; give its ``state`` to ``fit`` as ``ckpt_path``, with
            ``weights_only=True``.
        accelerator: ``"cpu"``, ``"gpu"``, or ``"auto"`` for a GPU if there is one.
        devices: GPUs to train on in each machine, or processes on a CPU. The gradients are averaged
            over all of them.
        num_nodes: machines, which share ``folder``.
        precision: of the losses, ``"32-true"``, ``"bf16-mixed"`` or ``"auto"``; see
            :func:`choose_precision`. Acting and evaluation stay in float32.
        tensorboard: write TensorBoard logs beside the CSV file.
        wandb: write to Weights & Biases too.
        measurements: what else is measured at every evaluation: :class:`ValueBias`,
            :class:`Diagnostics`.
        video_env: an environment with frames to record an episode in at the end.

    Returns:
        The trainer, for one epoch: the whole of an :class:`~alm_torchrl.training.ExperienceStream`.

    Raises:
        ValueError: for an unknown precision, or one that several processes may not agree on, and
            if the run that is gone on with had another number of processes.
        ImportError: if ``wandb`` is asked for and not installed.
    """
    folder = Path(folder)
    num_processes = devices * num_nodes
    if start is not None:
        check_processes(start, num_processes)
    if num_processes > 1 and precision == "auto":
        raise ValueError(
            "precision='auto' measures, and each process might find another: choose 32-true or "
            "bf16-mixed"
        )
    callbacks = _keep_by_seed(folder, seed, num_seeds, title, measurements)
    checkpoints = None
    if checkpoint_every is not None:
        checkpoints = Checkpoints(
            folder / "checkpoints", every=checkpoint_every, keep=keep_checkpoints, start=start
        )
        callbacks.append(checkpoints)
    callbacks += [EvaluationSchedule(eval_every), ProgressBar(), StopOnSignal(checkpoints)]
    if video_env is not None:
        callbacks.append(Video(folder, video_env))
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    trainer = L.Trainer(
        accelerator=accelerator,
        precision=choose_precision(precision, "cuda" if on_gpu else "cpu"),
        devices=devices,
        num_nodes=num_nodes,
        # The targets and the noise, which are buffers, move alike in all processes.
        strategy=DDPStrategy(forward_sync_buffers=False) if num_processes > 1 else "auto",
        plugins=[TensorFiles(), *_cluster_environment(num_processes)],
        enable_checkpointing=False,
        max_epochs=1,
        val_check_interval=eval_every,
        log_every_n_steps=1,  # the module decides what is logged when
        num_sanity_val_steps=0,
        logger=_make_loggers(folder, tensorboard, wandb),
        callbacks=callbacks,
        enable_model_summary=False,
        inference_mode=False,
    )
    exit_with_parent(trainer)
    return trainer


def _cluster_environment(num_processes: int) -> list[ClusterEnvironment]:
    """Where the numbers of processes come from; nothing where Lightning is to find out.

    Raises:
        ValueError: if a job of SLURM starts other processes than the run has.
    """
    if num_processes == 1:
        # A cluster's RANK or SLURM_PROCID is that of an independent run, not of a process of this.
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        return [LightningEnvironment()]
    if TorchElasticEnvironment.detect() or "SLURM_NTASKS" not in os.environ:
        return []
    if "SLURM_PROCID" not in os.environ or not SLURMEnvironment.detect():
        return [LightningEnvironment()]  # within salloc, but not started by srun
    try:
        # Lightning's own checkpoints know no replay buffer, nor does what it requeues a job with.
        return [SLURMEnvironment(auto_requeue=False)]
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _make_loggers(folder: Path, tensorboard: bool, wandb: bool) -> list[Logger]:
    """What is written beside the curve."""
    loggers: list[Logger] = [
        CSVLogger(folder, name="logs", version=_unused(folder), flush_logs_every_n_steps=1)
    ]
    if tensorboard:
        loggers.append(TensorBoardLogger(folder, name="logs", version="tensorboard"))
    if wandb:
        if find_spec("wandb") is None:
            raise ImportError("logging to Weights & Biases needs it: pip install wandb")
        loggers.append(WandbLogger(name=folder.name, save_dir=folder, project="alm-torchrl"))
    return loggers


def _unused(folder: Path) -> str:
    """A name for the metrics, of which the CSV logger would remove those there already."""
    taken = {path.name for path in (folder / "logs").glob("csv*")}
    names = ("csv", *(f"csv{session}" for session in range(2, len(taken) + 2)))
    return next(name for name in names if name not in taken)


def _keep_by_seed(
    folder: Path, seed: int, num_seeds: int, title: str, measurements: Sequence[type[Measurement]]
) -> list[Callback]:
    """What keeps the curve, the agents and the measurements of every seed."""
    callbacks: list[Callback] = []
    for row in range(num_seeds):
        number, own, title_of_seed = seed + row, folder, title
        if num_seeds > 1:
            own, title_of_seed = folder / f"seed{number}", f"{title}, seed {number}"
            own.mkdir(exist_ok=True)
        callbacks.append(LearningCurve(own, seed=number, title=title_of_seed, seed_index=row))
        callbacks.append(SaveAgent(own, seed_index=row))
        callbacks += [measure(own, seed=number, seed_index=row) for measure in measurements]
    return callbacks

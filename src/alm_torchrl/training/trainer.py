"""A Lightning trainer that writes curves, agents, checkpoints and logs to a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
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
    ProgressBar,
    SaveAgent,
    StopOnSignal,
    Video,
)
from alm_torchrl.training.checkpoints import Checkpoint, Checkpoints, TensorFiles
from alm_torchrl.training.curves import LearningCurve
from alm_torchrl.training.measurements import Measurement
from alm_torchrl.training.module import ALMModule
from alm_torchrl.training.runtime import exit_with_parent


class _Trainer(L.Trainer):
    """A trainer that resumes from the checkpoint ``start``."""

    start: Checkpoint | None = None

    def fit(self, model: ALMModule, *args: Any, **options: Any) -> None:
        if options.get("ckpt_path") is not None:
            raise ValueError(
                "fit(ckpt_path=...) would not restore the replay buffer: give the checkpoint to "
                "make_trainer(start=find_checkpoint(...))"
            )
        if self.start is not None:
            options |= {"ckpt_path": self.start.state, "weights_only": True}
        super().fit(model, *args, **options)


def make_trainer(
    folder: str | Path,
    *,
    seed: int,
    eval_every: int,
    num_seeds: int = 1,
    title: str = "",
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    start: Checkpoint | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    tensorboard: bool = True,
    wandb: bool = False,
    measurements: Sequence[Callable[..., Measurement]] = (),
    video_env: EnvBase | None = None,
    callbacks: Sequence[Callback] = (),
    **trainer_options: Any,
) -> L.Trainer:
    """Makes a trainer that evaluates, logs, plots and saves.

    It writes ``curve.csv`` and ``curve.png``, ``agent_best.pt`` and ``agent_last.pt``,
    ``checkpoints/`` and ``logs/``, even if the run is interrupted. If there are several seeds, each
    has a folder ``seed<n>/`` for curve and agents.

    Args:
        folder: an existing folder.
        seed: seed in the learning curve.
        eval_every: updates between two evaluations; warm-up updates do not count.
        num_seeds: seeds trained together: ``seed``, ``seed + 1`` and so on.
        title: title of the plot.
        checkpoint_every: updates between two checkpoints; no checkpoints by default.
        keep_checkpoints: number of newest checkpoints to keep.
        start: checkpoint to resume from, with the same number of processes; ``fit`` restores it,
            including the replay buffer. It requires ``checkpoint_every``.
        devices: processes per machine; several train one agent with ``ddp``.
        num_nodes: number of machines.
        tensorboard: whether to log to TensorBoard in addition to the CSV file.
        wandb: whether to log to Weights & Biases.
        measurements: classes or factories of measurements, called with ``(folder, seed=...,
            seed_index=...)``, such as :class:`ValueBias` or ``partial(Diagnostics, steps=500)``.
        video_env: environment with ``"pixels"`` in which to record an episode at the end.
        callbacks: further callbacks; checkpoints include their state.
        trainer_options: options of Lightning's ``Trainer``, such as ``accelerator="cpu"``.
    """
    folder = Path(folder)
    num_processes = devices * num_nodes
    if start is not None and len(start.replay) != num_processes:
        raise ValueError(
            f"{start.folder} has the replay buffers of {len(start.replay)} processes; resume with "
            f"as many (run.devices times run.num_nodes), not {num_processes}"
        )
    if start is not None and checkpoint_every is None:
        raise ValueError("start needs checkpoint_every: a resumed run makes checkpoints too")
    own = _callbacks_by_seed(folder, seed, num_seeds, title, measurements)
    own += callbacks
    if checkpoint_every is not None:
        path = folder / "checkpoints"
        own.append(Checkpoints(path, every=checkpoint_every, keep=keep_checkpoints, start=start))
    own += [EvaluationSchedule(eval_every), ProgressBar(), StopOnSignal()]
    if video_env is not None:
        own.append(Video(folder, video_env))
    defaults: dict[str, Any] = {
        # The buffers (targets, noise) change in the same way in all processes.
        "strategy": DDPStrategy(forward_sync_buffers=False) if num_processes > 1 else "auto",
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
    }
    if "logger" not in trainer_options:
        defaults["logger"] = _make_loggers(folder, tensorboard, wandb)
    plugins = trainer_options.pop("plugins", [])
    trainer = _Trainer(
        devices=devices,
        num_nodes=num_nodes,
        plugins=[TensorFiles(), *_cluster_environment(num_processes), *plugins],
        callbacks=own,
        max_epochs=1,
        val_check_interval=eval_every,
        log_every_n_steps=1,  # the module decides when to log
        enable_checkpointing=False,
        inference_mode=False,
        **defaults | trainer_options,
    )
    trainer.start = start
    exit_with_parent(trainer)
    return trainer


def _cluster_environment(num_processes: int) -> list[ClusterEnvironment]:
    """Returns the plugin with which processes find their ranks, unless Lightning detects it."""
    if num_processes == 1:
        # Here, RANK and SLURM_PROCID number independent runs, not processes of this run.
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        return [LightningEnvironment()]
    if TorchElasticEnvironment.detect() or "SLURM_NTASKS" not in os.environ:
        return []
    if "SLURM_PROCID" not in os.environ or not SLURMEnvironment.detect():
        return [LightningEnvironment()]  # within salloc, but not started by srun
    try:
        # Lightning would requeue with its own checkpoint, without the replay buffer.
        return [SLURMEnvironment(auto_requeue=False)]
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _make_loggers(folder: Path, tensorboard: bool, wandb: bool) -> list[Logger]:
    version, session = "csv", 1
    while (folder / "logs" / version).exists():  # the logger would overwrite its metrics
        session += 1
        version = f"csv{session}"
    loggers: list[Logger] = [
        CSVLogger(folder, name="logs", version=version, flush_logs_every_n_steps=1)
    ]
    if tensorboard:
        loggers.append(TensorBoardLogger(folder, name="logs", version="tensorboard"))
    if wandb:
        loggers.append(WandbLogger(name=folder.name, save_dir=folder, project="alm-torchrl"))
    return loggers


def _callbacks_by_seed(
    folder: Path,
    seed: int,
    num_seeds: int,
    title: str,
    measurements: Sequence[Callable[..., Measurement]],
) -> list[Callback]:
    """Returns curve, agents and measurements of each seed."""
    callbacks: list[Callback] = []
    for index in range(num_seeds):
        options: dict[str, Any] = {"seed": seed + index, "seed_index": index}
        own, own_title = folder, title
        if num_seeds > 1:
            own = folder / f"seed{seed + index}"
            own.mkdir(exist_ok=True)
            own_title = ", ".join(filter(None, (title, f"seed {seed + index}")))
        callbacks.append(LearningCurve(own, title=own_title, **options))
        callbacks.append(SaveAgent(own, seed_index=index))
        callbacks += [measure(own, **options) for measure in measurements]
    return callbacks

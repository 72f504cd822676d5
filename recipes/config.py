"""Options of recipes/mujoco.py for training, evaluation and the run."""

# ruff: noqa: RUF009 - fixed(), noted() and free() return fields
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from recipes.options import Agent, Encoder, LearningRates, Objective, Task
from recipes.schema import fixed, free, noted


def _adam() -> dict[str, Any]:
    return {"_target_": "torch.optim.Adam"}


@dataclass
class Training:
    """Amount of data and updates, in total over all processes."""

    total_steps: int = noted(
        "environment steps after the warm-up", "${task.paper_steps}", named=False, ge=1
    )
    warmup_steps: int = fixed("random steps at the start", 5000, ge=0)
    warmup_updates: int = fixed("updates on the random steps, before the policy acts", 0, ge=0)
    num_envs: int = fixed("environments in each process", 1, ge=1)
    collector: str = fixed(
        "sync: this process; multi: worker processes; ray: machines of a Ray cluster",
        "sync",
        choices=("sync", "multi", "ray"),
    )
    num_workers: int = fixed("worker processes or Ray actors, which share num_envs", 1, ge=1)
    overlap: bool = fixed("collect with older weights while training", False)
    frames_per_batch: int = fixed(
        "frames per collection batch, over all environments", "${training.num_envs}", ge=1
    )
    sync_every: int = noted("updates between transfers of weights to workers", 1, ge=1)
    updates_per_step: float = fixed("updates per environment step", 1.0, gt=0)
    batch_size: int = noted("windows per update", 512, ge=1)
    policy_lag: int = noted("updates by which the acting policy lags", 0, ge=0, le=1)
    replay_capacity: int = fixed(
        "transitions in the replay buffer", "${task.replay_capacity}", ge=1
    )
    optimizer: dict[str, Any] = fixed("_target_ of a fused optimizer", _adam)
    schedule: dict[str, Any] = fixed(
        "_target_ of a scheduler, stepped at every update; empty: constant rates", dict
    )
    max_grad_norm: float = noted("maximum gradient norm of each parameter group", 100.0, gt=0)
    imagined_steps: int = fixed("steps of imagined episodes (ImaginedReplay); 0: none", 0, ge=0)
    target_tau: float = noted("rate of the moving average of target networks", 0.005, gt=0, le=1)


@dataclass
class Evaluation:
    """Evaluation in separate environments."""

    every: int = noted("environment steps between evaluations", 5000, ge=1)
    episodes: int = noted("episodes per evaluation, with the mean action", 5, ge=1)
    max_steps: int | None = noted("maximum length of an episode; null: 100,000", None, ge=1)
    seed: int | None = fixed(
        "seed of the environments; null: seed + 1000", None, before=None, ge=0, lt=2**31
    )
    ema_decay: float = fixed("EMA decay of the evaluated weights; 0: none", 0.0, ge=0, lt=1)
    video: bool = free("record an episode after training", False)
    bias: bool = free("compare values and bound with Monte Carlo returns", False)
    diagnostics: bool = free("measure latents, dynamics, classifier and terminations", False)
    measurements: list[Any] = free("further measurements, each a _target_", list)


@dataclass
class Checkpointing:
    """Checkpoints for resuming."""

    every: int = free("environment steps between checkpoints", "${evaluation.every}", ge=1)
    keep: int = free("number of checkpoints kept", 2, ge=1)


@dataclass
class Run:
    """Hardware, folder and loggers."""

    folder: str = free("output folder")
    accelerator: str = noted(
        "auto: a GPU if available", "auto", choices=("auto", "cpu", "gpu", "cuda", "mps")
    )
    devices: int = noted("GPUs (or CPU processes) per machine, which share the data", 1, ge=1)
    num_nodes: int = noted("machines", 1, ge=1)
    precision: str = noted(
        "of the losses; auto: bfloat16 if the hardware has it",
        "32-true",
        choices=("32-true", "bf16-mixed", "auto"),
    )
    compile: str = noted(
        "torch.compile the losses, which takes minutes; auto: in long runs",
        "auto",
        choices=("auto", "always", "never"),
    )
    matmul_precision: str = noted(
        "of float32 products; high and medium allow TF32 and bfloat16 on a GPU",
        "highest",
        choices=("highest", "high", "medium"),
    )
    log_every: int = free("updates between log entries", 100, ge=1)
    tensorboard: bool = free("write TensorBoard logs", True)
    wandb: bool = free("write to Weights & Biases (pip install wandb)", False)


@dataclass
class Config:
    """All options."""

    #: Smaller than the seeds that NumPy accepts, because evaluations use seed + 1000.
    seed: int = fixed("random seed", 0, named=False, ge=0, lt=2**31)
    num_seeds: int = fixed("seeds trained together: seed, seed + 1, ...", 1, ge=1)
    resume: str = free(
        "never; auto: from the newest checkpoint, if any; or a run's folder", "never"
    )
    task: Task = field(default_factory=Task)
    agent: Agent = field(default_factory=Agent)
    encoder: Encoder = field(default_factory=Encoder)
    objective: Objective = field(default_factory=Objective)
    learning_rates: LearningRates = field(default_factory=LearningRates)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    run: Run = field(default_factory=Run)


def pick(options: object, *names: str) -> dict[str, Any]:
    """Returns the named options as keyword arguments."""
    return {name: getattr(options, name) for name in names}


def num_processes(config: Config) -> int:
    """Returns the number of training processes, which share steps, batch and replay."""
    return config.run.devices * config.run.num_nodes


def env_options(task: Task) -> dict[str, Any]:
    """Returns the keyword arguments of make_env."""
    others = {"name", "id", "kwargs", "replay_capacity", "paper_steps"}
    return {k: v for k, v in vars(task).items() if k not in others} | task.kwargs


ConfigStore.instance().store(name="schema", node=Config)

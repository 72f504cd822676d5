"""Options of recipes/mujoco.py for training, evaluation and the run. Presets are in conf/."""

# ruff: noqa: RUF009 - fixed(), noted() and free() return fields
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore

from recipes.options import Agent, Encoder, LearningRates, Objective, Task, fixed, free, noted


@dataclass
class Training:
    """Amount of data and updates, in total over all processes."""

    total_steps: int = noted(named=False)  # environment steps after the warm-up
    warmup_steps: int = fixed()  # random steps at the start
    warmup_updates: int = fixed(0)  # updates on the random steps, before the policy acts
    num_envs: int = fixed()  # environments in each process
    collector: str = fixed(before="sync")  # sync (this process), multi (worker processes) or ray
    num_workers: int = fixed(before=1)  # worker processes or Ray actors
    overlap: bool = fixed(before=False)  # collect while the last batch is learned from
    frames_per_batch: int = fixed(
        before="${training.num_envs}"
    )  # frames per batch, over all environments
    sync_every: int = noted(before=1)  # updates between transfers of weights to workers
    updates_per_step: float = fixed()  # updates per environment step
    batch_size: int = noted()  # windows per update
    policy_lag: int = noted(0)  # updates by which the acting policy lags: 0 or 1
    replay_capacity: int = fixed()  # transitions in the replay buffer
    optimizer: dict[str, Any] = fixed(before={"_target_": "torch.optim.Adam"})  # must be fused
    schedule: dict[str, Any] = fixed(dict)  # scheduler, stepped at every update; empty: constant
    max_grad_norm: float = noted()  # maximum gradient norm of each parameter group
    target_tau: float = noted()  # rate of the moving average of target networks


@dataclass
class Evaluation:
    """Evaluation in separate environments."""

    every: int = noted()  # environment steps between evaluations
    episodes: int = noted()  # episodes per evaluation
    max_steps: int | None = noted(before=None)  # maximum length of an episode; null: 100,000
    ema_decay: float = fixed(0.0)  # EMA decay of the evaluated weights; 0 disables it
    video: bool = free()  # record an episode after training
    bias: bool = free()  # compare values and bound with Monte Carlo returns
    diagnostics: bool = free()  # measure latents, dynamics and classifier
    measurements: list[Any] = free(list)  # further measurements, each a _target_


@dataclass
class Checkpointing:
    """Checkpoints for resuming."""

    every: int = free()  # environment steps between checkpoints
    keep: int = free()  # number of checkpoints kept


@dataclass
class Run:
    """Hardware, folder and loggers."""

    folder: str = free()  # output folder
    accelerator: str = noted()  # cpu, gpu, or auto
    devices: int = noted(before=1)  # GPUs (or CPU processes) per machine
    num_nodes: int = noted(before=1)  # machines
    precision: str = noted()  # of the losses: 32-true, bf16-mixed or auto (bf16 if faster)
    compile: str = noted()  # torch.compile the losses: auto, always or never
    matmul_precision: str = noted()  # torch.set_float32_matmul_precision: highest, high or medium
    log_every: int = free()  # updates between log entries
    tensorboard: bool = free()  # write TensorBoard logs
    wandb: bool = free()  # write to Weights & Biases (pip install wandb)


@dataclass
class Config:
    """All options."""

    seed: int = fixed(named=False)  # random seed
    num_seeds: int = fixed()  # seeds trained together: seed, seed + 1, ...
    resume: str = free()  # never, auto, or the folder of a run
    task: Task = field(default_factory=Task)
    agent: Agent = field(default_factory=Agent)
    encoder: Encoder = field(default_factory=Encoder)
    objective: Objective = field(default_factory=Objective)
    learning_rates: LearningRates = field(default_factory=LearningRates)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    run: Run = field(default_factory=Run)


def declarations(group: type = Config, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Yields the name of every option, such as ``training.batch_size``, and its field."""
    for option in fields(group):
        factory: Any = option.default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            yield from declarations(factory, f"{prefix}{option.name}.")
        else:
            yield prefix + option.name, option


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

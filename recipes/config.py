"""All options of recipes/mujoco.py, and those that say how it is trained. Values: conf/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from recipes.options import Agent, Encoder, LearningRates, Objective, Task


@dataclass
class Training:
    """How much is collected and learnt, over all processes."""

    total_steps: int = MISSING  # environment steps after the warm-up (the authors' counter)
    warmup_steps: int = MISSING  # uniformly random steps before them
    warmup_updates: int = MISSING  # updates on these alone, before the policy acts
    num_envs: int = MISSING  # environments, altogether; of several run.devices, in each process
    collector: str = MISSING  # what steps them: sync (this process), multi (processes) or ray
    num_workers: int = MISSING  # processes or Ray actors, between which environments are divided
    overlap: bool = MISSING  # workers collect on while the last batch is learnt from
    frames_per_batch: int = MISSING  # frames collected before the updates that they pay for
    sync_every: int = MISSING  # updates between two times that workers get the weights
    updates_per_step: float = MISSING  # updates for each environment step
    batch_size: int = MISSING  # windows in an update
    policy_lag: int = MISSING  # updates that acting is behind: 0, or 1 to overlap with a GPU
    replay_capacity: int = MISSING  # transitions kept
    max_grad_norm: float = MISSING  # largest gradient norm of a parameter group
    target_tau: float = MISSING  # weight of the new value in the targets' moving average


@dataclass
class Evaluation:
    """Evaluation in environments of its own."""

    every: int = MISSING  # steps between two evaluations
    episodes: int = MISSING  # episodes of each
    ema_decay: float = MISSING  # of averaged weights, evaluated and saved for the newest; 0: none
    video: bool = MISSING  # record an episode at the end
    bias: bool = MISSING  # measure the bias of values and bound against the returns that follow
    diagnostics: bool = MISSING  # measure latents, dynamics and classifier


@dataclass
class Checkpointing:
    """What a run can go on from."""

    every: int = MISSING  # steps between two checkpoints
    keep: int = MISSING  # how many of the newest are kept


@dataclass
class Run:
    """The machine, the folder and the loggers."""

    folder: str = MISSING  # where everything goes
    accelerator: str = MISSING  # cpu, gpu, or auto
    devices: int = MISSING  # GPUs on each machine, or processes on a CPU
    num_nodes: int = MISSING  # machines
    precision: str = MISSING  # of the losses: 32-true, bf16-mixed, or auto (bf16 where faster)
    compile: str = MISSING  # torch.compile for the losses: auto, always or never
    matmul_precision: str = MISSING  # torch.set_float32_matmul_precision: highest, high or medium
    log_every: int = MISSING  # updates between two log entries
    tensorboard: bool = MISSING  # write TensorBoard logs
    wandb: bool = MISSING  # write to Weights & Biases (pip install wandb)


@dataclass
class Config:
    """All options."""

    seed: int = MISSING  # of everything random
    num_seeds: int = MISSING  # seeds trained at once: seed, seed + 1 and so on
    resume: str = MISSING  # never, auto, or the folder of the run to go on with
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
    """Some of the options, as arguments of the same names."""
    return {name: getattr(options, name) for name in names}


def num_processes(config: Config) -> int:
    """Processes that train together; steps, batch size and replay are divided over them."""
    return config.run.devices * config.run.num_nodes


def env_options(task: Task) -> dict[str, Any]:
    """The arguments of make_env after the task's id."""
    others = {"name", "id", "kwargs", "replay_capacity", "paper_steps"}
    return {k: v for k, v in vars(task).items() if k not in others} | task.kwargs


ConfigStore.instance().store(name="schema", node=Config)

"""All options of recipes/mujoco.py, and those that say how it is trained. Values: conf/."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore

from recipes.options import Agent, Encoder, LearningRates, Objective, Task, fixed, free, noted


@dataclass
class Training:
    """How much is collected and learnt, over all processes."""

    total_steps: int = noted(named=False)  # environment steps after the warm-up
    warmup_steps: int = fixed()  # uniformly random steps before them
    warmup_updates: int = fixed(before=0)  # updates on these alone, before the policy acts
    num_envs: int = fixed()  # environments, altogether; of several run.devices, in each process
    collector: str = fixed(before="sync")  # sync (in this process), multi (processes) or ray
    num_workers: int = fixed(before=1)  # processes or Ray actors that share the environments
    overlap: bool = fixed(before=False)  # workers collect on while the last batch is learnt from
    frames_per_batch: int = fixed(
        before="${training.num_envs}"
    )  # frames per batch, over all environments
    sync_every: int = noted(before=1)  # updates between two times that workers get the weights
    updates_per_step: float = fixed()  # updates for each environment step
    batch_size: int = noted()  # windows in an update
    policy_lag: int = noted(before=0)  # updates that acting is behind: 0 or 1
    replay_capacity: int = fixed()  # transitions kept
    max_grad_norm: float = noted()  # largest gradient norm of a parameter group
    target_tau: float = noted()  # weight of the new value in the targets' moving average


@dataclass
class Evaluation:
    """Evaluation in environments of its own."""

    every: int = noted()  # steps between two evaluations
    episodes: int = noted()  # episodes of each
    max_steps: int | None = noted(before=None)  # longer episodes are cut; null: at 100,000 steps
    ema_decay: float = fixed(before=0.0)  # decay of the averaged weights; 0 keeps none
    video: bool = free()  # record an episode at the end
    bias: bool = free()  # measure the bias of values and bound against the returns that follow
    diagnostics: bool = free()  # measure latents, dynamics and classifier


@dataclass
class Checkpointing:
    """What a run can go on from."""

    every: int = free()  # steps between two checkpoints
    keep: int = free()  # how many of the newest are kept


@dataclass
class Run:
    """The machine, the folder and the loggers."""

    folder: str = free()  # where everything goes
    accelerator: str = noted()  # cpu, gpu, or auto
    devices: int = noted(before=1)  # GPUs on each machine, or processes on a CPU
    num_nodes: int = noted(before=1)  # machines
    precision: str = noted()  # of the losses: 32-true, bf16-mixed, or auto (bf16 where faster)
    compile: str = noted()  # torch.compile for the losses: auto, always or never
    matmul_precision: str = noted()  # torch.set_float32_matmul_precision: highest, high or medium
    log_every: int = free()  # updates between two log entries
    tensorboard: bool = free()  # write TensorBoard logs
    wandb: bool = free()  # write to Weights & Biases (pip install wandb)


@dataclass
class Config:
    """All options."""

    seed: int = fixed(named=False)  # of everything random
    num_seeds: int = fixed()  # seeds trained at once: seed, seed + 1 and so on
    resume: str = free()  # never, auto, or the folder of the run to go on with
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
    """Every option by its name, such as ``training.batch_size``, with its declaration."""
    for option in fields(group):
        factory: Any = option.default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            yield from declarations(factory, f"{prefix}{option.name}.")
        else:
            yield prefix + option.name, option


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

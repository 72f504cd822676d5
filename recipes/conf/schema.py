"""The options of recipes/mujoco.py: their types. The YAML files beside this one give the values."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from alm_torchrl.files import replacing
from alm_torchrl.training import Checkpoint, find_checkpoint


@dataclass
class Task:
    """A Gymnasium task."""

    name: str = MISSING  # how folders and plots call it
    id: str = MISSING  # what gymnasium.make is given
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of gymnasium.make
    replay_capacity: int = MISSING  # transitions that the authors keep for this task
    paper_steps: int = MISSING  # length of the authors' curve, in steps after the warm-up


@dataclass
class Agent:
    """Sizes of the networks and the schedule of the noise (alm_torchrl.agent.AgentConfig)."""

    latent_dim: int = MISSING  # size of the latent
    hidden_dim: int = MISSING  # width of encoder, reward, classifier, values and actor
    dynamics_hidden_dim: int = MISSING  # width of the latent dynamics
    scale_to_range: bool = MISSING  # the actor's mean spans the action range
    noise_clip: float | None = MISSING  # largest action noise inside the losses
    noise_start: float = MISSING  # scale of the noise at the first step
    noise_end: float = MISSING  # scale of the noise after noise_steps
    noise_steps: int = MISSING  # steps to anneal over


@dataclass
class Objective:
    """The losses (alm_torchrl.objectives.ALMLoss)."""

    horizon: int = MISSING  # imagined steps, and the length of the windows
    gamma: float = MISSING  # discount
    lmbda: float = MISSING  # lambda of the imagined returns
    consistency_coeff: float = MISSING  # weight of the log-ratio in the actor's reward
    bootstrap_terminated: bool = MISSING  # keep the value term after a terminal state
    short_windows: str = MISSING  # windows cut short by an episode's end: mask or drop


@dataclass
class LearningRates:
    """Adam's learning rate for each parameter group."""

    world_model: float = MISSING  # encoder and latent dynamics
    reward: float = MISSING  # reward model and classifier
    value: float = MISSING  # action values
    actor: float = MISSING  # actor


@dataclass
class Training:
    """How much is collected and learnt."""

    total_steps: int = MISSING  # environment steps after the warm-up (the authors' counter)
    warmup_steps: int = MISSING  # uniformly random steps before them
    num_envs: int = MISSING  # environments, altogether
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
    video: bool = MISSING  # record an episode at the end


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
    objective: Objective = field(default_factory=Objective)
    learning_rates: LearningRates = field(default_factory=LearningRates)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    run: Run = field(default_factory=Run)


def pick(options: object, *names: str) -> dict[str, Any]:
    """Some of the options, as arguments of the same names."""
    return {name: getattr(options, name) for name in names}


#: What a run cannot change when it goes on.
_FIXED = (
    *("seed", "num_seeds", "task", "agent", "training.num_envs", "training.replay_capacity"),
    *("training.collector", "training.num_workers", "training.overlap"),
)
_TIMESTAMP = re.compile(r"\d{8}-\d{6}$")


def prepare(config: Config) -> tuple[Path, Checkpoint | None]:
    """Refuses values that contradict each other, and makes the run's folder with its config.yaml.

    Returns:
        The folder, and the checkpoint in it to go on from, if the run is to be resumed.

    Raises:
        ValueError: naming the option and why its value will not do.
        OSError: if the folder cannot be written.
    """
    _check(config)
    folder, start = _find_run(config)
    options = OmegaConf.create(vars(config))
    if start is not None:
        before = OmegaConf.load(folder / "config.yaml")
        for name in _FIXED:
            old, new = OmegaConf.select(before, name), OmegaConf.select(options, name)
            if old is not None and old != new:  # None: an option that there was not
                raise ValueError(
                    f"{folder} was trained with {name}={old} and cannot go on with {new}"
                )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "config.yaml") as file:
        file.write(OmegaConf.to_yaml(options).encode())
    return folder, start


def _find_run(config: Config) -> tuple[Path, Checkpoint | None]:
    """The folder of a new run, or of the one that ``resume`` asks for."""
    folder = Path(config.run.folder)
    if config.resume == "never":
        if any((folder / "checkpoints").glob("update-*")):
            raise ValueError(
                f"there is a run in {folder} already: go on with it by resume=auto, or choose "
                "another run.folder"
            )
        return folder, None
    if config.resume != "auto":
        start = find_checkpoint(Path(config.resume) / "checkpoints")
        if start is None:
            raise ValueError(f"resume={config.resume}: there is no whole checkpoint in that folder")
        return Path(config.resume), start
    earlier = [folder]
    if _TIMESTAMP.search(folder.name):
        alike = folder.parent.glob(_TIMESTAMP.sub("*", folder.name))
        earlier += sorted((f for f in alike if _TIMESTAMP.search(f.name)), reverse=True)
    for run in earlier:
        if (start := find_checkpoint(run / "checkpoints")) is not None:
            return run, start
    return folder, None


def _check(config: Config) -> None:
    """Raises a ValueError that names the option if values contradict each other."""
    training, every = config.training, config.evaluation.every
    if training.total_steps < 1 or every < 1 or training.total_steps % every:
        raise ValueError(
            f"training.total_steps={training.total_steps} is no multiple of evaluation.every="
            f"{every}, so the last steps would never be evaluated"
        )
    updates = every * training.updates_per_step
    if updates < 1 or updates % 1:
        raise ValueError(
            f"evaluation.every={every} at training.updates_per_step={training.updates_per_step} "
            "is no whole number of updates"
        )
    if config.num_seeds < 1 or (config.num_seeds > 1 and training.num_envs > 1):
        raise ValueError(
            f"num_seeds={config.num_seeds} at training.num_envs={training.num_envs}: train one "
            "seed in several environments, or several seeds in one environment each"
        )
    for name in ("warmup_steps", "total_steps"):
        if getattr(training, name) % training.num_envs:
            raise ValueError(
                f"training.{name}={getattr(training, name)} is no multiple of training.num_envs="
                f"{training.num_envs}"
            )
    _check_workers(config)
    if config.checkpoint.keep < 1 or config.checkpoint.every * training.updates_per_step < 1:
        raise ValueError(
            f"checkpoint.every={config.checkpoint.every} and checkpoint.keep="
            f"{config.checkpoint.keep} keep no checkpoint"
        )


def _check_workers(config: Config) -> None:
    """Raises a ValueError that names the option if what collects cannot be as asked."""
    training = config.training
    kind, workers, frames = training.collector, training.num_workers, training.frames_per_batch
    if kind not in ("sync", "multi", "ray"):
        raise ValueError(f"training.collector={kind}: choose sync, multi or ray")
    if kind == "sync" and (workers != 1 or training.overlap):
        raise ValueError(
            f"training.num_workers={workers} and training.overlap={training.overlap} need workers: "
            "training.collector=multi or ray"
        )
    if kind != "sync" and (config.num_seeds > 1 or training.policy_lag):
        raise ValueError(
            f"training.collector={kind} trains one seed, at training.policy_lag=0: num_seeds="
            f"{config.num_seeds} and training.policy_lag={training.policy_lag} need "
            "training.collector=sync"
        )
    if workers < 1 or training.num_envs % workers or training.sync_every < 1:
        raise ValueError(
            f"training.num_envs={training.num_envs} environments cannot be divided between "
            f"training.num_workers={workers}, or training.sync_every={training.sync_every} is "
            "less than 1"
        )
    envs = training.num_envs // workers if training.overlap else training.num_envs
    shortest = envs * (config.objective.horizon if training.overlap else 1)
    if frames % envs or frames < shortest:
        raise ValueError(
            f"training.frames_per_batch={frames} is no multiple of the {envs} environments that a "
            f"batch comes from, or less than {shortest}"
        )
    for name in ("warmup_steps", "total_steps"):
        if getattr(training, name) % frames:
            raise ValueError(
                f"training.{name}={getattr(training, name)} is no multiple of "
                f"training.frames_per_batch={frames}"
            )


ConfigStore.instance().store(name="schema", node=Config)

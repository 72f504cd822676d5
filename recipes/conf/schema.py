"""The options of recipes/mujoco.py: their types. The YAML files beside this one give the values."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import MISSING, OmegaConf

from alm_torchrl.files import replacing
from alm_torchrl.training import Checkpoint, find_checkpoint


@dataclass
class Task:
    """A task, and what is observed of it (alm_torchrl.envs.make_env)."""

    name: str = MISSING  # how folders and plots call it
    id: str = MISSING  # a Gymnasium id, dm_control/domain-task, or package.module:attribute
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of what makes it
    pixels: Any = False  # observe frames of this size, 84 or [height, width], not the vector
    frame_stack: int = 3  # frames observed at once
    proprioception: bool = False  # keep the vector beside the pixels
    action_repeat: int = 1  # simulator steps with each action; one environment step
    mask_velocities: bool = False  # leave the velocities out of the vector
    distractors: int = 0  # dimensions of Gaussian noise appended to the vector
    history: int = 0  # vectors in the entry "history", for encoders that read the past
    history_actions: bool = False  # with the action before each of them
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
class Encoder:
    """The representation; a _target_ is an import path, called with the options beside it."""

    transforms: list[Any] = MISSING  # what the environment adds to its observations for it
    build: dict[str, Any] = MISSING  # from observation_spec, latent_dim, hidden_dim to the encoder


@dataclass
class Objective:
    """The losses (alm_torchrl.objectives.ALMLoss)."""

    horizon: int = MISSING  # imagined steps, and the length of the windows
    gamma: float = MISSING  # discount
    lmbda: float = MISSING  # lambda of the imagined returns
    consistency_coeff: float = MISSING  # weight of the log-ratio in the actor's reward
    bootstrap_terminated: bool = MISSING  # keep the value term after a terminal state
    short_windows: str = MISSING  # windows cut short by an episode's end: mask or drop
    reward_term: bool = MISSING  # rewards in the world-model loss
    value_term: bool = MISSING  # the value at the window's end in the world-model loss
    consistency: str = MISSING  # reverse_kl, forward_kl, squared_distance or classifier
    consistency_target: float | None = MISSING  # level that a learnt weight holds it at
    latent_target: str = MISSING  # the encoder's moving_average, stop_gradient or online
    actor_objective: str = MISSING  # lambda_returns, bound, or value (without the model)


@dataclass
class LearningRates:
    """Adam's learning rate for each parameter group."""

    world_model: float = MISSING  # encoder and latent dynamics
    reward: float = MISSING  # reward model and classifier
    value: float = MISSING  # action values
    actor: float = MISSING  # actor
    multiplier: float = MISSING  # weight of the consistency term, where it is learnt


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


#: Where the first process tells those that it starts what the run's folder is called.
_FOLDER = "ALM_TORCHRL_RUN_FOLDER"
#: What a run cannot change when it goes on.
_FIXED = (
    *("seed", "num_seeds", "task", "agent", "encoder"),
    *("training.num_envs", "training.replay_capacity"),
    *("training.collector", "training.num_workers", "training.overlap"),
    # Or updates would be owed, or paid already, for steps of before.
    *("training.updates_per_step", "training.warmup_updates"),
    *("objective.latent_target", "objective.consistency_target"),  # these have weights of their own
    "evaluation.ema_decay",  # so have averages
    *("objective.gamma", "objective.lmbda", "objective.consistency_coeff"),  # kept beside weights
)
#: What these were before there was an option.
_ONCE = {"training.warmup_updates": 0, "evaluation.ema_decay": 0.0}
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
    _share_folder(config)
    folder, start = _find_run(config)
    options = OmegaConf.create(vars(config))
    if start is not None:
        before = OmegaConf.load(folder / "config.yaml")
        for name in _FIXED:
            new = OmegaConf.select(options, name)
            # A run may be older than an option.
            old = OmegaConf.select(before, name, default=_ONCE.get(name, new))
            if old != new:
                raise ValueError(
                    f"{folder} was trained with {name}={old} and cannot go on with {new}"
                )
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[_FOLDER] = str(folder)
    if _rank() == 0:
        with replacing(folder / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(options).encode())
    return folder, start


def _share_folder(config: Config) -> None:
    """Has all processes of a run take the folder of the first, whose name may hold its start."""
    if num_processes(config) == 1:
        return
    if _rank() > 0 and _FOLDER in os.environ:
        config.run.folder = os.environ[_FOLDER]
    elif os.environ.keys() & {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} and _TIMESTAMP.search(
        config.run.folder
    ):
        raise ValueError(
            "torchrun and srun start every process by itself, each of which would name the run "
            "after its own time: give all of them the same run.folder=..."
        )


def _rank() -> int:
    """This process's number, 0 for the first."""
    return int(getattr(rank_zero_only, "rank", 0))


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
    _check_processes(config)
    if config.num_seeds < 1 or (config.num_seeds > 1 and training.num_envs > 1):
        raise ValueError(
            f"num_seeds={config.num_seeds} at training.num_envs={training.num_envs}: train one "
            "seed in several environments, or several seeds in one environment each"
        )
    _check_workers(config)
    if config.checkpoint.keep < 1 or config.checkpoint.every * training.updates_per_step < 1:
        raise ValueError(
            f"checkpoint.every={config.checkpoint.every} and checkpoint.keep="
            f"{config.checkpoint.keep} keep no checkpoint"
        )


def _check_processes(config: Config) -> None:
    """Raises a ValueError that names the option if the run cannot be divided over processes."""
    processes = num_processes(config)
    if config.run.devices < 1 or config.run.num_nodes < 1:
        raise ValueError(
            f"run.devices={config.run.devices} and run.num_nodes={config.run.num_nodes}: at least "
            "one of each is needed"
        )
    if processes == 1:
        return
    for name in ("batch_size", "replay_capacity"):
        if getattr(config.training, name) % processes:
            raise ValueError(
                f"training.{name}={getattr(config.training, name)} cannot be divided over "
                f"{processes} processes"
            )
    if config.training.collector != "sync":
        raise ValueError(
            f"training.collector={config.training.collector} serves one process, and run.devices "
            f"times run.num_nodes is {processes}: take training.collector=sync, where each process "
            "steps environments of its own"
        )
    if config.num_seeds > 1:
        raise ValueError(
            f"num_seeds={config.num_seeds} are trained at once in one process: start a run for "
            "each seed to train it on several devices"
        )
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise ValueError(
            f"a sweep (-m) trains in one process, and run.devices times run.num_nodes is "
            f"{processes}: start its runs one by one"
        )


def _suffix(ablation: str) -> str:
    """What an ablation adds to the name of a run's folder, so that its curves stay apart."""
    return "" if ablation == "none" else f"-{ablation}"


OmegaConf.register_new_resolver("suffix", _suffix, replace=True)


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
    together = frames * num_processes(config)
    for name in ("warmup_steps", "total_steps"):
        if getattr(training, name) % together:
            raise ValueError(
                f"training.{name}={getattr(training, name)} is no multiple of the {together} "
                "frames that are collected before each update (training.frames_per_batch in each "
                "process)"
            )


ConfigStore.instance().store(name="schema", node=Config)

"""Checks values and combinations of options, before PyTorch is loaded and anything is written."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from recipes.config import Config, num_processes
from recipes.schema import check_value, declarations


def in_sweep() -> bool:
    """Returns whether this run is one of several started by ``-m``."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def check_options(config: Config) -> None:
    """Raises a ValueError that names an option out of range, or options that do not fit."""
    for name, option in declarations(Config):
        check_value(name, option, attrgetter(name)(config))
    _check_pixels(config.task.pixels)
    _check_counts(config)
    _check_targets(config)
    _check_processes(config)
    _check_workers(config)


def _check_pixels(pixels: Any) -> None:
    """Checks the size of images, which has several types."""
    sizes = pixels if isinstance(pixels, list) else [pixels, pixels]
    whole = all(type(size) is int and size > 0 for size in sizes)
    if pixels is not False and not (whole and len(sizes) == 2):
        raise ValueError(
            f"task.pixels={pixels} must be false, a size such as 84, or [height,width]"
        )


def _check_counts(config: Config) -> None:
    """Checks that evaluations and seeds fit the steps and environments."""
    training, every = config.training, config.evaluation.every
    if training.total_steps % every:
        raise ValueError(
            f"training.total_steps={training.total_steps} must be a multiple of evaluation.every="
            f"{every}, so that the last steps are evaluated"
        )
    for name, steps in (("evaluation", every), ("checkpoint", config.checkpoint.every)):
        updates = steps * training.updates_per_step
        if updates < 1 or (updates % 1 and name == "evaluation"):
            raise ValueError(
                f"{name}.every={steps} times training.updates_per_step="
                f"{training.updates_per_step} must be a whole number of updates"
            )
    if training.warmup_updates and not training.warmup_steps:
        raise ValueError(
            f"training.warmup_updates={training.warmup_updates} needs training.warmup_steps above 0"
        )
    if config.num_seeds > 1 and training.num_envs > 1:
        raise ValueError(
            f"num_seeds={config.num_seeds} does not fit training.num_envs={training.num_envs}: "
            "train several seeds with one environment each, or one seed with several environments"
        )


def _check_targets(config: Config) -> None:
    """Checks that each object to build has an import path."""
    if "encoder" in config.agent.networks:
        raise ValueError("agent.networks has an encoder: set encoder.build instead")
    training = config.training
    targets: dict[str, Any] = {
        "encoder.build": config.encoder.build,
        "training.optimizer": training.optimizer,
    }
    if training.schedule:
        targets["training.schedule"] = training.schedule
    groups: dict[str, dict[Any, Any]] = {
        "encoder.transforms": dict(enumerate(config.encoder.transforms)),
        "agent.networks": config.agent.networks,
        "objective.auxiliary_losses": {  # a string is an entry of the encoder
            n: v for n, v in config.objective.auxiliary_losses.items() if not isinstance(v, str)
        },
        "evaluation.measurements": dict(enumerate(config.evaluation.measurements)),
    }
    for group, entries in groups.items():
        targets |= {f"{group}.{name}": value for name, value in entries.items()}
    for option, value in targets.items():
        if not isinstance(value, dict) or "_target_" not in value:
            raise ValueError(f"{option} has no _target_: give it the import path of a class")


def _check_processes(config: Config) -> None:
    """Checks that the run can be divided over processes."""
    processes, training = num_processes(config), config.training
    if processes == 1:
        return
    for name in ("batch_size", "replay_capacity"):
        if getattr(training, name) % processes:
            raise ValueError(
                f"training.{name}={getattr(training, name)} must be a multiple of the {processes} "
                "processes"
            )
    reason = f"with {processes} processes (run.devices times run.num_nodes)"
    if training.collector != "sync":
        raise ValueError(f"training.collector must be sync {reason}, not {training.collector}")
    if config.num_seeds > 1:
        raise ValueError(f"num_seeds must be 1 {reason}: start one run for each seed")
    if in_sweep():
        raise ValueError(f"a sweep (-m) is not supported {reason}: start its runs one by one")


def _check_workers(config: Config) -> None:
    """Checks that environments and frames can be divided over workers and processes."""
    training, frames = config.training, config.training.frames_per_batch
    envs, kind = training.num_envs, training.collector
    if kind == "sync" and (training.num_workers > 1 or training.overlap):
        name = "training.overlap=true" if training.overlap else "training.num_workers above 1"
        raise ValueError(f"{name} needs training.collector=multi or ray: sync uses this process")
    if kind != "sync":
        if config.num_seeds > 1 or training.policy_lag:
            raise ValueError(
                f"training.collector={kind} needs num_seeds=1 and "
                f"training.policy_lag=0, not {config.num_seeds} and {training.policy_lag}"
            )
        if training.num_envs % training.num_workers:
            raise ValueError(
                f"training.num_envs={training.num_envs} must be a multiple of "
                f"training.num_workers={training.num_workers}"
            )
        if training.overlap:  # a batch comes from one worker
            envs //= training.num_workers
        if training.overlap and frames < envs * config.objective.horizon:
            raise ValueError(
                f"training.frames_per_batch={frames} must be at least "
                f"{envs * config.objective.horizon}: objective.horizon steps of each environment"
            )
    if frames % envs:
        raise ValueError(
            f"training.frames_per_batch={frames} must be a multiple of {envs}, the number of "
            "environments in a batch"
        )
    together = frames * num_processes(config)
    for name in ("warmup_steps", "total_steps"):
        if getattr(training, name) % together:
            raise ValueError(
                f"training.{name}={getattr(training, name)} must be a multiple of {together}, "
                "training.frames_per_batch times the number of processes"
            )

"""Refuses options of recipes/mujoco.py that contradict each other."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from recipes.config import Config, num_processes


def in_sweep() -> bool:
    """Whether this run is one of several that -m starts."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def check_options(config: Config) -> None:
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
    if in_sweep():
        raise ValueError(
            f"a sweep (-m) trains in one process, and run.devices times run.num_nodes is "
            f"{processes}: start its runs one by one"
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
    together = frames * num_processes(config)
    for name in ("warmup_steps", "total_steps"):
        if getattr(training, name) % together:
            raise ValueError(
                f"training.{name}={getattr(training, name)} is no multiple of the {together} "
                "frames that are collected before each update (training.frames_per_batch in each "
                "process)"
            )

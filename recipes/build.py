"""Builds environment, data and the module to train from the options."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hydra.utils import instantiate
from torchrl.collectors import BaseCollector
from torchrl.envs import EnvBase

from alm_torchrl.agent import ALMAgent
from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.envs import frame_stacks, make_env
from alm_torchrl.training import (
    ALMModule,
    CPUPolicy,
    Diagnostics,
    ExperienceStream,
    Measurement,
    PolicyPublisher,
    StackedAgent,
    ValueBias,
    VersionedPolicy,
    stack_seeds,
)
from alm_torchrl.training.runtime import rank_seed
from recipes.build_agent import learning_rates, make_agent
from recipes.config import Config, env_options, num_processes, pick


def env_factory(config: Config) -> Callable[..., EnvBase]:
    """Returns a function that makes the task's environments with the encoder's transforms."""
    transforms = [instantiate(transform) for transform in config.encoder.transforms]
    return partial(make_env, config.task.id, transforms=transforms, **env_options(config.task))


def make_experience_collector(
    config: Config, env: EnvBase, agent: ALMAgent | StackedAgent
) -> tuple[BaseCollector, CPUPolicy | PolicyPublisher]:
    """Builds the collector, and the policy or publisher that receives new weights."""
    training, num_seeds = config.training, config.num_seeds
    options: dict[str, Any] = {
        "kind": training.collector,
        "frames_per_batch": training.frames_per_batch * num_seeds,
        "init_random_frames": training.warmup_steps * num_seeds // num_processes(config),
        **pick(training, "num_workers", "overlap"),
    }
    if training.collector == "sync":
        policy = CPUPolicy(agent.policy(), lag=training.policy_lag)
        return make_collector(env, policy, **options), policy
    env.close(raise_if_closed=False)  # each worker makes its own
    stamped = VersionedPolicy(agent.policy())
    own_envs = training.num_envs // training.num_workers
    collector = make_collector(
        partial(env_factory(config), num_envs=own_envs),
        copy.deepcopy(stamped).to("cpu"),
        seed=config.seed,
        **options,
    )
    return collector, PolicyPublisher(stamped, collector, training.sync_every)


def make_module(config: Config, device: torch.device, rank: int = 0) -> ALMModule:
    """Builds environment, agent, loss and data for one process of a run."""
    training, num_seeds = config.training, config.num_seeds
    processes, num_envs = num_processes(config), training.num_envs * num_seeds
    first = rank_seed(config.seed, rank)
    env = env_factory(config)(seed=range(first, first + num_envs), num_envs=num_envs)
    agents = [make_agent(config, env, device, config.seed + i) for i in range(num_seeds)]
    agent, loss = stack_seeds(*zip(*agents, strict=True))
    collector, policy = make_experience_collector(config, env, agent)
    stored_envs = num_envs // training.num_workers if training.overlap else num_envs
    replay = make_replay_buffer(
        training.replay_capacity * num_seeds // processes,
        batch_size=training.batch_size // processes,
        window_length=config.objective.horizon,
        num_envs=stored_envs,
        device=device,
        per_env=num_seeds > 1,
        frame_stacks=frame_stacks(env),
    )
    experience = ExperienceStream(
        collector,
        replay,
        **pick(training, "total_steps", "warmup_steps", "warmup_updates", "updates_per_step"),
        noise=agent.noise,
        policy=policy,
        on_batch=agent.update_statistics,
        num_seeds=num_seeds,
        num_processes=processes,
    )
    eval_seed, eval_envs = config.evaluation.seed, config.evaluation.episodes * num_seeds
    eval_seed = config.seed + 1000 if eval_seed is None else eval_seed
    return ALMModule(
        agent,
        loss,
        experience,
        env_factory(config)(seed=eval_seed, num_envs=eval_envs),
        learning_rates=learning_rates(config, loss),
        optimizer=instantiate(training.optimizer, _partial_=True),
        schedule=instantiate(training.schedule, _partial_=True) if training.schedule else None,
        max_grad_norm=training.max_grad_norm,
        target_tau=training.target_tau,
        imagined_steps=training.imagined_steps,
        eval_episodes=config.evaluation.episodes,
        eval_max_steps=config.evaluation.max_steps,
        ema_decay=config.evaluation.ema_decay,
        log_every=config.run.log_every,
        precision=config.run.precision,
        compile=config.run.compile,
    )


def make_measurements(config: Config) -> list[Callable[..., Measurement]]:
    """Returns the measurements of every evaluation."""
    chosen: dict[type[Measurement], bool] = {
        ValueBias: config.evaluation.bias,
        Diagnostics: config.evaluation.diagnostics,
    }
    own = [instantiate(target, _partial_=True) for target in config.evaluation.measurements]
    return [*(measurement for measurement, wanted in chosen.items() if wanted), *own]

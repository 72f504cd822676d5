"""What a recipe's configuration builds: environment, agent, loss and data, in this order."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torchrl.collectors import BaseCollector
from torchrl.envs import EnvBase
from torchrl.objectives.utils import ValueEstimators

from alm_torchrl.agent import ALMAgent
from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.envs import make_env
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import (
    ALMModule,
    Experience,
    PolicyCopy,
    SentPolicy,
    StackedAgent,
    StampedPolicy,
    stack_seeds,
)
from recipes.conf.schema import Config, pick


def make_agent(
    config: Config, env: EnvBase, device: torch.device, seed: int
) -> tuple[ALMAgent, ALMLoss]:
    """The networks of a seed and their objective."""
    torch.manual_seed(seed)
    agent = ALMAgent.from_env(env, **vars(config.agent)).to(device)
    objective = dict(vars(config.objective))
    estimator = {name: objective.pop(name) for name in ("gamma", "lmbda")}
    loss = ALMLoss(**agent.networks(), **objective)
    loss.make_value_estimator(ValueEstimators.TDLambda, **estimator)
    return agent, loss


def make_experience_collector(
    config: Config, env: EnvBase, agent: ALMAgent | StackedAgent
) -> tuple[BaseCollector, PolicyCopy | SentPolicy]:
    """What collects, in this process or in workers, and what is told of new weights."""
    task, training, num_seeds = config.task, config.training, config.num_seeds
    frames: dict[str, Any] = {
        "frames_per_batch": training.frames_per_batch * num_seeds,
        "init_random_frames": training.warmup_steps * num_seeds,
    }
    if training.collector == "sync":
        policy = PolicyCopy(agent.policy(), lag=training.policy_lag)
        return make_collector(env, policy, **frames), policy
    env.close(raise_if_closed=False)  # each worker makes its own
    stamped = StampedPolicy(agent.policy())
    own_envs = training.num_envs // training.num_workers
    collector = make_collector(
        partial(make_env, task.id, num_envs=own_envs, **task.kwargs),
        copy.deepcopy(stamped).to("cpu"),
        kind=training.collector,  # type: ignore[arg-type]
        num_workers=training.num_workers,
        overlap=training.overlap,
        seed=config.seed,
        **frames,
    )
    return collector, SentPolicy(stamped, collector, training.sync_every)


def make_module(config: Config, device: torch.device) -> ALMModule:
    """Environment, agent, loss and data, in this order."""
    task, training, num_seeds = config.task, config.training, config.num_seeds
    num_envs = training.num_envs * num_seeds
    seeds = range(config.seed, config.seed + num_envs)
    env = make_env(task.id, seed=seeds, num_envs=num_envs, **task.kwargs)
    agents = [make_agent(config, env, device, seed) for seed in seeds[:num_seeds]]
    agent, loss = stack_seeds(*zip(*agents, strict=True))
    collector, policy = make_experience_collector(config, env, agent)
    lanes = num_envs // training.num_workers if training.overlap else num_envs
    replay = make_replay_buffer(
        training.replay_capacity * num_seeds,
        batch_size=training.batch_size,
        window_length=config.objective.horizon,
        num_envs=lanes,
        device=device,
        per_env=num_seeds > 1,
    )
    experience = Experience(
        collector,
        replay,
        **pick(training, "total_steps", "warmup_steps", "updates_per_step"),
        noise=agent.noise,
        policy=policy,
        num_seeds=num_seeds,
    )
    eval_seed, eval_envs = config.seed + 1000, config.evaluation.episodes * num_seeds
    return ALMModule(
        agent,
        loss,
        experience,
        make_env(task.id, seed=eval_seed, num_envs=eval_envs, **task.kwargs),
        learning_rates=vars(config.learning_rates),
        max_grad_norm=training.max_grad_norm,
        target_tau=training.target_tau,
        eval_episodes=config.evaluation.episodes,
        log_every=config.run.log_every,
        compile=config.run.compile,
    )

"""What a recipe's configuration builds: environment, agent, loss and data, in this order."""

from __future__ import annotations

from typing import Any

import torch
from hydra.utils import instantiate
from torchrl.envs import EnvBase
from torchrl.objectives.utils import ValueEstimators

from alm_torchrl.agent import ALMAgent
from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.envs import make_env
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import ALMModule, Experience, PolicyCopy, stack_seeds
from recipes.conf.schema import Config, pick


def make_agent(
    config: Config, env: EnvBase, device: torch.device, seed: int
) -> tuple[ALMAgent, ALMLoss]:
    """The networks of a seed and their objective."""
    torch.manual_seed(seed)
    options = dict(vars(config.agent))
    sizes = {"latent_dim": options.pop("latent_dim"), "hidden_dim": options["hidden_dim"]}
    build = instantiate(config.encoder.build, _partial_=True)
    encoder = build(env.observation_spec_unbatched, **sizes)
    agent = ALMAgent.from_env(env, encoder=encoder, **options).to(device)
    objective = dict(vars(config.objective))
    estimator = {name: objective.pop(name) for name in ("gamma", "lmbda")}
    loss = ALMLoss(**agent.networks(), **objective)
    loss.make_value_estimator(ValueEstimators.TDLambda, **estimator)
    return agent, loss


def make_task(config: Config, *, from_pixels: bool = False, **options: Any) -> EnvBase:
    """The task's environments, with what the encoder needs of them."""
    task = config.task
    env = make_env(task.id, from_pixels=from_pixels, **options, **task.kwargs)
    for transform in config.encoder.transforms:
        env.append_transform(instantiate(transform))
    return env


def make_module(config: Config, device: torch.device) -> ALMModule:
    """Environment, agent, loss and data, in this order."""
    training, num_seeds = config.training, config.num_seeds
    num_envs = training.num_envs * num_seeds
    seeds = range(config.seed, config.seed + num_envs)
    env = make_task(config, seed=seeds, num_envs=num_envs)
    agents = [make_agent(config, env, device, seed) for seed in seeds[:num_seeds]]
    agent, loss = stack_seeds(*zip(*agents, strict=True))
    policy = PolicyCopy(agent.policy(), lag=training.policy_lag)
    random_frames = training.warmup_steps * num_seeds
    collector = make_collector(
        env, policy, frames_per_batch=num_envs, init_random_frames=random_frames
    )
    replay = make_replay_buffer(
        training.replay_capacity * num_seeds,
        batch_size=training.batch_size,
        window_length=config.objective.horizon,
        num_envs=num_envs,
        device=device,
        per_env=num_seeds > 1,
    )
    experience = Experience(
        collector,
        replay,
        **pick(training, "total_steps", "warmup_steps", "updates_per_step"),
        noise=agent.noise,
        policy=policy,
        observe=agent.update_statistics if isinstance(agent, ALMAgent) else None,
        num_seeds=num_seeds,
    )
    eval_seed, eval_envs = config.seed + 1000, config.evaluation.episodes * num_seeds
    return ALMModule(
        agent,
        loss,
        experience,
        make_task(config, seed=eval_seed, num_envs=eval_envs),
        learning_rates=vars(config.learning_rates),
        max_grad_norm=training.max_grad_norm,
        target_tau=training.target_tau,
        eval_episodes=config.evaluation.episodes,
        log_every=config.run.log_every,
        compile=config.run.compile,
    )

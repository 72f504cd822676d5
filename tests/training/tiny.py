"""A tiny agent in a tiny environment."""

from __future__ import annotations

from typing import Any

import torch
from torchrl.envs import EnvBase, StepCounter, TransformedEnv
from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv

from alm_torchrl.agent import ALMAgent
from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import ALMModule, CPUPolicy, ExperienceStream


def make_env() -> TransformedEnv:
    return TransformedEnv(ContinuousActionVecMockEnv(), StepCounter(max_steps=10))


def make_module(
    total_steps: int = 12,
    *,
    warmup_updates: int = 0,
    updates_per_step: float = 1.0,
    policy_lag: int = 0,
    num_processes: int = 1,
    env: EnvBase | None = None,
    eval_env: EnvBase | None = None,
    objective: dict[str, Any] | None = None,
    **options: Any,
) -> ALMModule:
    torch.manual_seed(0)
    env = make_env() if env is None else env
    agent = ALMAgent.from_env(env, latent_dim=4, hidden_dim=8, dynamics_hidden_dim=8)
    loss = ALMLoss(**agent.networks(), **(objective or {}))
    num_envs = env.batch_size.numel()
    policy = CPUPolicy(agent.policy(), lag=policy_lag)
    experience = ExperienceStream(
        make_collector(env, policy, init_random_frames=8 // num_processes),
        make_replay_buffer(100 - 100 % num_envs, batch_size=6 // num_processes, num_envs=num_envs),
        total_steps=total_steps,
        warmup_steps=8,
        warmup_updates=warmup_updates,
        updates_per_step=updates_per_step,
        noise=agent.noise,
        policy=policy,
        num_processes=num_processes,
    )
    return ALMModule(agent, loss, experience, eval_env or make_env(), eval_episodes=2, **options)

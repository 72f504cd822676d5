"""A tiny agent in a tiny environment."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torchrl.envs import StepCounter, TransformedEnv
from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv

from alm_torchrl.agent import ALMAgent
from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import ALMModule, Experience, PolicyCopy


def make_env() -> TransformedEnv:
    return TransformedEnv(ContinuousActionVecMockEnv(), StepCounter(max_steps=10))


@pytest.fixture
def make_module() -> Callable[..., ALMModule]:
    def make(
        total_steps: int = 12, *, updates_per_step: float = 1.0, policy_lag: int = 0, **options
    ) -> ALMModule:
        torch.manual_seed(0)
        env = make_env()
        agent = ALMAgent.from_env(env, latent_dim=4, hidden_dim=8, dynamics_hidden_dim=8)
        loss = ALMLoss(**agent.networks())
        policy = PolicyCopy(agent.policy(), lag=policy_lag)
        collector = make_collector(env, policy, init_random_frames=8)
        replay = make_replay_buffer(100, batch_size=6)
        experience = Experience(
            collector,
            replay,
            total_steps=total_steps,
            warmup_steps=8,
            updates_per_step=updates_per_step,
            noise=agent.noise,
            policy=policy,
        )
        return ALMModule(agent, loss, experience, make_env(), eval_episodes=2, **options)

    return make

"""Collection, writing and drawing with batched environments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, StepCounter, TransformedEnv

from alm_torchrl.agent import ALMAgent
from alm_torchrl.data import make_collector, make_replay_buffer
from benchmarks.workloads import Sizes


class Pendulums(EnvBase):
    """Gymnasium's ``Pendulum-v1`` for many pendulums in torch; docs/simulators.md explains it."""

    def __init__(self, num_envs: int, device: torch.device) -> None:
        super().__init__(device=device, batch_size=[num_envs])
        high = torch.tensor([1.0, 1.0, 8.0], device=device).expand(num_envs, 3)
        self.observation_spec = Composite(observation=Bounded(-high, high), shape=[num_envs])
        self.action_spec = Bounded(-2.0, 2.0, (num_envs, 1), device=device)
        self.reward_spec = Unbounded((num_envs, 1), device=device)
        self.generator = torch.Generator(device)
        self.angle = self.speed = torch.zeros(num_envs, 1, device=device)

    def _reset(self, tensordict: TensorDictBase | None, **_: Any) -> TensorDictBase:
        reset = torch.ones_like(self.angle, dtype=torch.bool)
        if tensordict is not None:
            reset = tensordict.get("_reset", reset)
        size = (2, *self.angle.shape)
        start = 2 * torch.rand(size, generator=self.generator, device=self.device) - 1
        self.angle = torch.where(reset, math.pi * start[0], self.angle)
        self.speed = torch.where(reset, start[1], self.speed)
        return TensorDict({"observation": self._observe()}, self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        torque = tensordict["action"].clamp(-2, 2)
        angle = (self.angle + math.pi) % (2 * math.pi) - math.pi
        reward = -(angle**2 + 0.1 * self.speed**2 + 0.001 * torque**2)
        acceleration = 15 * self.angle.sin() + 3 * torque
        self.speed = (self.speed + 0.05 * acceleration).clamp(-8, 8)
        self.angle = self.angle + 0.05 * self.speed
        never = torch.zeros_like(self.angle, dtype=torch.bool)
        entries = {"observation": self._observe(), "reward": reward}
        return TensorDict({**entries, "done": never, "terminated": never.clone()}, self.batch_size)

    def _observe(self) -> Tensor:
        return torch.cat([self.angle.cos(), self.angle.sin(), self.speed], -1)

    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(seed or 0)


def collection(
    num_envs: int, frames: int, device: torch.device, sizes: Sizes
) -> dict[str, Callable[[], object]]:
    """Returns functions that collect frames, write as many, and draw a batch of windows."""
    env = TransformedEnv(Pendulums(num_envs, device), StepCounter(200))
    agent = ALMAgent.from_env(env, hidden_dim=sizes.hidden, dynamics_hidden_dim=sizes.dynamics)
    collector = make_collector(env, agent.policy(), frames_per_batch=frames)
    replay = make_replay_buffer(
        100 * frames,
        batch_size=sizes.batch,
        window_length=sizes.horizon,
        num_envs=num_envs,
        device=device,
    )
    batches = iter(collector)
    written = next(batches)
    written["next", "done"][..., -1, :] = True  # so that the same batch can follow
    replay.extend(written)
    return {
        "collect": lambda: next(batches),
        "write": lambda: replay.extend(written),
        "draw": replay.sample,
    }

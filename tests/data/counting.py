"""An environment whose observations count episodes and steps."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase


class CountingEnv(EnvBase):
    """Observation ``[seed, episode, step]``; an episode ends after ``length`` steps.

    Even episodes end by termination, odd ones by the time limit.
    """

    def __init__(self, length: int = 7, low: float = -0.4, high: float = 0.6) -> None:
        super().__init__()
        self.length, self.name, self.episode, self.step_index = length, 0, -1, 0
        flag = Binary(1, shape=(1,), dtype=torch.bool)
        self.observation_spec = Composite(observation=Unbounded(shape=(3,)))
        self.action_spec = Bounded(low, high, shape=(2,))
        self.reward_spec = Unbounded(shape=(1,))
        self.full_done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone())

    def _observation(self) -> torch.Tensor:
        return torch.tensor([float(self.name), float(self.episode), float(self.step_index)])

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDictBase:
        self.episode, self.step_index = self.episode + 1, 0
        off = torch.zeros(1, dtype=torch.bool)
        return TensorDict(
            observation=self._observation(), done=off, terminated=off.clone(), truncated=off.clone()
        )

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.step_index += 1
        over = self.step_index >= self.length
        terminated = over and self.episode % 2 == 0
        return TensorDict(
            observation=self._observation(),
            reward=tensordict["action"].sum(-1, keepdim=True),
            done=torch.tensor([over]),
            terminated=torch.tensor([terminated]),
            truncated=torch.tensor([over and not terminated]),
        )

    def _set_seed(self, seed: int | None) -> None:
        self.name = 0 if seed is None else seed % 2**20  # exact in float32

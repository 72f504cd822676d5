"""Batched environments, in which each episode has its own length, from collector to windows."""

from __future__ import annotations

import gymnasium
import pytest
import torch
from gymnasium.vector import AutoresetMode
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    EnvBase,
    GymWrapper,
    Transform,
    TransformedEnv,
    VecGymEnvTransform,
)
from torchrl.envs.utils import check_env_specs

from alm_torchrl.agent import ALMAgent
from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.envs import make_env
from alm_torchrl.objectives import ALMLoss

NUM_ENVS, WINDOW = 1024, 4


class BatchedCounting(EnvBase):
    """Observation ``[environment, episode, step]``.

    Environment ``i`` has episodes of ``2 + i % 7`` steps. Even ones end by termination, odd ones by
    the time limit.
    """

    def __init__(self, num_envs: int = NUM_ENVS) -> None:
        super().__init__(batch_size=[num_envs])
        self.observation_spec = Composite(observation=Unbounded((num_envs, 3)), shape=[num_envs])
        self.action_spec = Bounded(-1.0, 1.0, (num_envs, 2))
        self.reward_spec = Unbounded((num_envs, 1))
        flags = {
            name: Binary(1, shape=(num_envs, 1), dtype=torch.bool)
            for name in ("done", "terminated", "truncated")
        }
        self.full_done_spec = Composite(**flags, shape=[num_envs])
        self.index = torch.arange(num_envs)
        self.episode = torch.full((num_envs,), -1)
        self.count = torch.zeros(num_envs, dtype=torch.int64)

    def _observe(self) -> torch.Tensor:
        return torch.stack([self.index, self.episode, self.count], -1).float()

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDictBase:
        reset = torch.ones_like(self.index, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict:
            reset = tensordict["_reset"].squeeze(-1)
        self.episode = self.episode + reset
        self.count = torch.where(reset, 0, self.count)
        return TensorDict({"observation": self._observe()}, self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.count = self.count + 1
        over = (self.count >= 2 + self.index % 7).unsqueeze(-1)
        terminated = over & (self.episode % 2 == 0).unsqueeze(-1)
        entries = {"done": over, "terminated": terminated, "truncated": over & ~terminated}
        entries |= {"observation": self._observe(), "reward": tensordict["action"].sum(-1, True)}
        return TensorDict(entries, self.batch_size)

    def _set_seed(self, seed: int | None) -> None: ...


@pytest.fixture(scope="module")
def windows() -> TensorDictBase:
    """Windows from four batches of ten steps, more than the buffer holds."""
    env = BatchedCounting()
    check_env_specs(env)
    env = BatchedCounting()
    replay = make_replay_buffer(
        NUM_ENVS * 25, batch_size=4096, window_length=WINDOW, num_envs=NUM_ENVS, seed=0
    )
    frames = 10 * NUM_ENVS
    for data in make_collector(env, None, frames_per_batch=frames, total_frames=4 * frames):
        assert data.shape == (NUM_ENVS, 10)
        replay.extend(data)
    return replay.sample()


def test_windows_stay_in_the_episode_of_their_environment(windows: TensorDictBase) -> None:
    valid = windows["validity_mask"]
    env, episode, count = windows["observation"].unbind(-1)
    steps = torch.arange(WINDOW)
    for value, wanted in (
        (env, env[:, :1].expand_as(env)),
        (episode, episode[:, :1].expand_as(env)),
        (count, count[:, :1] + steps),
    ):
        assert torch.equal(value[valid], wanted[valid])
    following = windows["next", "observation"]
    assert torch.equal(following[valid], (windows["observation"] + torch.tensor([0, 0, 1]))[valid])
    # All steps of the episode are valid, up to the end of the episode or of the stored steps.
    left = 2 + env[:, 0] % 7 - count[:, 0]
    assert (valid.sum(1) <= left.clamp(max=WINDOW)).all()
    assert (valid.sum(1) == left.clamp(max=WINDOW)).float().mean() > 0.9
    assert len(env.unique()) > 0.9 * NUM_ENVS


def test_ends_are_those_of_the_environment(windows: TensorDictBase) -> None:
    valid = windows["validity_mask"]
    env, episode, count = windows["observation"].unbind(-1)
    over = count + 1 == 2 + env % 7
    for name, wanted in (("terminated", episode % 2 == 0), ("truncated", episode % 2 == 1)):
        found = windows["next", name].squeeze(-1)
        assert torch.equal(found[valid], (over & wanted)[valid])
        assert found[valid].any()


def test_the_loss_reads_them(windows: TensorDictBase) -> None:
    agent = ALMAgent.from_env(BatchedCounting(4), latent_dim=4, hidden_dim=8, dynamics_hidden_dim=8)
    loss = ALMLoss(**agent.networks(), horizon=WINDOW)
    assert loss(windows).isfinite().all()


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
def test_vector_environments_of_gymnasium_keep_last_observations(mode: AutoresetMode) -> None:
    vector = gymnasium.make_vec(
        "InvertedPendulum-v5", num_envs=3, vector_kwargs={"autoreset_mode": mode}
    )
    env = TransformedEnv(GymWrapper(vector), DoubleToFloat(in_keys=["observation"]))
    replay = make_replay_buffer(3 * 200, batch_size=600, num_envs=3, seed=0)
    for data in make_collector(env, None, frames_per_batch=3 * 20, total_frames=3 * 80, seed=0):
        assert data.shape == (3, 20)
        replay.extend(data)
    windows = replay.sample()
    valid, terminated = windows["validity_mask"], windows["next", "terminated"].squeeze(-1)
    assert 0.05 < terminated[:, 0].float().mean() < 0.5
    # The task terminates where the angle exceeds 0.2; first observations are near 0.
    angle = windows["next", "observation"][..., 1].abs()
    assert torch.equal(angle[valid] > 0.2, terminated[valid])
    continues = windows["observation"][:, 1:] == windows["next", "observation"][:, :-1]
    assert continues.all(-1)[valid[:, 1:]].all()
    assert not terminated[:, :-1][valid[:, 1:]].any()


class AutoReset(BatchedCounting):
    """A simulator that resets environments within a step and loses their last observation."""

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDictBase:
        if tensordict is not None and not tensordict.get("_reset", torch.ones(1).bool()).all():
            return TensorDict({"observation": self._observe()}, self.batch_size)
        return super()._reset()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = super()._step(tensordict)
        reset = super()._reset(TensorDict({"_reset": out["done"]}, self.batch_size))
        return out.update(reset)


class KeepObservation(Transform):
    """As in docs/simulators.md."""

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        for key in self.in_keys:
            value = next_tensordict[key]
            next_tensordict[key] = torch.where(value.isnan(), tensordict[key], value)
        return next_tensordict


def test_last_observations_that_a_simulator_loses_are_replaced() -> None:
    """TorchRL wraps Isaac Lab with ``VecGymEnvTransform``, which marks them with NaN."""
    env = TransformedEnv(
        AutoReset(8), Compose(VecGymEnvTransform(), KeepObservation(in_keys=["observation"]))
    )
    replay = make_replay_buffer(8 * 100, batch_size=500, num_envs=8, window_length=WINDOW, seed=0)
    for data in make_collector(env, None, frames_per_batch=8 * 20, total_frames=8 * 80):
        replay.extend(data)
    windows = replay.sample()
    valid = windows["validity_mask"]
    env_index, episode, count = windows["observation"].unbind(-1)
    over = count + 1 == 2 + env_index % 7
    assert torch.equal(windows["next", "done"].squeeze(-1)[valid], over[valid])
    moved = windows["next", "observation"] - windows["observation"]
    wanted = torch.tensor([0.0, 0.0, 1.0]) * (~over).unsqueeze(-1)
    assert torch.equal(moved[valid], wanted[valid])
    assert torch.equal(episode[valid], episode[:, :1].expand_as(episode)[valid])
    assert (count == 0)[valid].any()


def test_make_env_says_where_a_batched_environment_goes() -> None:
    with pytest.raises(ValueError, match=r"batch of environments \[4\]: .* to make_collector"):
        make_env(lambda: BatchedCounting(4))

"""Collectors: warm-up, exploration, shared weights, and the batches that reach the replay buffer.

Workers import this module, so everything that they use is at its top level.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import nn
from torchrl.envs import SerialEnv
from torchrl.envs.utils import ExplorationType, exploration_type

from alm_torchrl.data import WindowReplayBuffer, make_collector, make_replay_buffer
from tests.data.counting import CountingEnv

LOW, HIGH, MARK, LENGTH = -0.4, 0.6, 0.25, 7


def constant_policy(value: float = MARK) -> TensorDictModule:
    """Always acts ``value``, which distinguishes its actions from random ones."""
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, value)
    return TensorDictModule(layer, in_keys=["observation"], out_keys=["action"])


def is_random(batch: TensorDictBase) -> torch.Tensor:
    return (batch["action"] != MARK).all(-1)


def take(collector, batches: int) -> list[TensorDictBase]:
    return [batch.clone() for batch, _ in zip(collector, range(batches), strict=False)]


# ---------------------------------------------------------------------------- in this process


@pytest.mark.parametrize(("num_envs", "frames_per_batch"), [(1, 1), (1, 20), (4, 4), (4, 20)])
def test_the_number_of_random_frames(num_envs, frames_per_batch):
    env = CountingEnv() if num_envs == 1 else SerialEnv(num_envs, CountingEnv)
    collector = make_collector(
        env, constant_policy(), frames_per_batch=frames_per_batch,
        init_random_frames=60, total_frames=100,
    )  # fmt: skip
    batches = list(collector)
    collector.shutdown()
    frames = torch.cat([is_random(batch).reshape(-1) for batch in batches])
    assert frames.tolist() == [True] * 60 + [False] * 40
    shape = [frames_per_batch] if num_envs == 1 else [num_envs, frames_per_batch // num_envs]
    assert {tuple(batch.shape) for batch in batches} == {tuple(shape)}


def test_warm_up_actions_are_uniform_in_the_action_space():
    torch.manual_seed(0)
    collector = make_collector(
        CountingEnv(low=LOW, high=HIGH), constant_policy(), frames_per_batch=2000,
        init_random_frames=2000,
    )  # fmt: skip
    actions = next(iter(collector))["action"].double()
    collector.shutdown()
    assert actions.min() >= LOW
    assert actions.max() <= HIGH
    for column in actions.T:
        counts = torch.histc(column, bins=10, min=LOW, max=HIGH)
        assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-square, 9 degrees, p = 0.001
    lag = torch.corrcoef(torch.stack([actions[1:, 0], actions[:-1, 0], actions[1:, 1]]))
    assert lag[0, 1:].abs().max() < 0.09  # 4 / sqrt(2000): neither in time nor across actions


def test_without_a_policy_every_action_is_random():
    collector = make_collector(CountingEnv(), None, frames_per_batch=10)
    batches = take(collector, 5)
    collector.shutdown()
    assert torch.cat([batch["action"] for batch in batches]).unique(dim=0).shape[0] == 50


@pytest.mark.parametrize("device", [None, "cpu"])
def test_an_updated_policy_acts_in_the_next_batch(device):
    policy = constant_policy()
    collector = make_collector(CountingEnv(), policy, frames_per_batch=3, device=device)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    iterator = iter(collector)
    assert next(iterator)["action"].eq(MARK).all()
    (policy.module.bias.sum()).backward()  # a gradient of one on each bias
    optimizer.step()
    assert next(iterator)["action"].eq(MARK - 1).all()
    collector.shutdown()


class Explorer(TensorDictModuleBase):
    """Acts 1 when asked to explore, 0 otherwise."""

    in_keys, out_keys = ("observation",), ("action",)

    def forward(self, data: TensorDictBase) -> TensorDictBase:
        explores = exploration_type() == ExplorationType.RANDOM
        return data.set("action", torch.full((*data.shape, 2), float(explores)))


def test_the_policy_explores():
    collector = make_collector(CountingEnv(high=2.0), Explorer(), frames_per_batch=3)
    assert next(iter(collector))["action"].eq(1).all()
    collector.shutdown()


def test_no_trajectory_ids_unless_asked():
    for options, expected in (({}, False), ({"track_traj_ids": True}, True)):
        collector = make_collector(CountingEnv(), constant_policy(), frames_per_batch=3, **options)
        assert (next(iter(collector)).get("collector") is not None) is expected
        collector.shutdown()


def test_the_seed_applies_to_the_first_episode():
    collector = make_collector(CountingEnv, constant_policy(), frames_per_batch=3, seed=5)
    assert next(iter(collector))["observation"][:, 0].eq(5).all()
    collector.shutdown()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "fast"}, "'sync', 'multi' or 'ray', not 'fast'"),
        ({"frames_per_batch": 0}, "must be a positive multiple of 1, .*, not 0"),
        ({"num_workers": 0}, "num_workers must be at least 1"),
        ({"num_workers": 2}, "kind='sync' collects in this process"),
        ({"init_random_frames": -10}, "multiple of frames_per_batch, such as 0 or 10, not -10"),
        (
            {"init_random_frames": 25},
            "multiple of frames_per_batch, such as 20 or 30, not 25",
        ),
        ({"overlap": True}, "overlap=True require kind='multi' or 'ray'"),
        (
            {"kind": "multi", "num_workers": 3},
            "must be a positive multiple of 3, .*, not 10",
        ),
        ({"kind": "multi", "create_env": CountingEnv()}, "pass a function that creates it"),
    ],
)
def test_invalid_arguments(arguments, message):
    arguments = {"create_env": CountingEnv, "frames_per_batch": 10, **arguments}
    with pytest.raises(ValueError, match=message):
        make_collector(policy=constant_policy(), **arguments)


def test_ray_is_not_installed(monkeypatch) -> None:
    monkeypatch.setattr("alm_torchrl.data.collectors.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'alm-torchrl\[ray\]'"):
        make_collector(CountingEnv, None, kind="ray", num_workers=2, frames_per_batch=2)


# --------------------------------------------------------------------- into the replay buffer


def fill(buffer: WindowReplayBuffer, batches: list[TensorDictBase]) -> TensorDict:
    """Stores the batches, and checks samples.

    A window ends with an episode or with the newest step, and its valid steps are consecutive steps
    of one episode of one environment.
    """
    for batch in batches:
        buffer.extend(batch)
    windows = torch.cat([buffer.sample() for _ in range(20)])
    mask, observation = windows["validity_mask"], windows["observation"]
    newest = batches[-1]["observation"][..., -1, :].reshape(-1, 1, 1, 3)
    stops = windows["next", "done"].squeeze(-1) | (observation == newest).all(-1).any(0)
    assert mask[:, 0].all()
    assert torch.equal(mask[:, 1:], mask[:, :-1] & ~stops[:, :-1])
    step = torch.tensor([0.0, 0.0, 1.0])  # the same seed, the same episode, the next step
    joined = mask[:, 1:]
    assert (observation[:, 1:] == observation[:, :-1] + step)[joined].all()
    assert set(mask.sum(-1).tolist()) == {1, 2, 3}
    terminal = windows["next", "terminated"].squeeze(-1)
    expected = (observation[..., 2] == LENGTH - 1) & (observation[..., 1] % 2 == 0)
    assert torch.equal(terminal, expected)  # a time limit or a batch's end is no termination
    assert terminal.any()
    return windows


@pytest.mark.parametrize("num_envs", [1, 3])
def test_sync_windows(num_envs):
    create = partial(CountingEnv, length=LENGTH)
    env = create() if num_envs == 1 else SerialEnv(num_envs, create)
    collector = make_collector(env, constant_policy(), frames_per_batch=6, seed=1)
    buffer = make_replay_buffer(90, batch_size=50, num_envs=num_envs, seed=0)
    windows = fill(buffer, take(collector, 40))
    collector.shutdown()
    assert windows["observation"][..., 0].unique().numel() == num_envs


@pytest.fixture(scope="module")
def multi_sync():
    """Batches of two workers with two environments each, and a policy that changes half-way."""
    policy = constant_policy()
    collector = make_collector(
        partial(SerialEnv, 2, partial(CountingEnv, length=LENGTH)), policy, kind="multi",
        num_workers=2, frames_per_batch=20, init_random_frames=40, total_frames=160, seed=3,
    )  # fmt: skip
    batches = []
    for index, batch in enumerate(collector):
        batches.append(batch.clone())
        if index == 4:
            with torch.no_grad():
                policy.module.bias.fill_(0.5)
            collector.update_policy_weights_(policy)
    collector.shutdown()
    return batches


def test_multi_sync_batches_and_warm_up(multi_sync):
    assert [list(batch.shape) for batch in multi_sync] == [[2, 2, 5]] * 8
    assert all(is_random(batch).all() for batch in multi_sync[:2])
    assert all(batch["action"].eq(MARK).all() for batch in multi_sync[2:5])
    assert all(batch["action"].eq(0.5).all() for batch in multi_sync[5:])
    first = multi_sync[0]["action"]
    assert first.reshape(-1, 2).unique(dim=0).shape[0] == 20  # different random numbers


@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_multi_sync_windows(multi_sync, storage):
    buffer = make_replay_buffer(60, batch_size=50, num_envs=4, storage=storage, seed=0)
    windows = fill(buffer, multi_sync)
    assert windows["observation"][..., 0].unique().numel() == 4  # each environment has its seed


@pytest.fixture(scope="module")
def multi_async():
    collector = make_collector(
        partial(CountingEnv, length=LENGTH), constant_policy(), kind="multi", num_workers=2,
        overlap=True, frames_per_batch=10, init_random_frames=40, total_frames=200, seed=3,
    )  # fmt: skip
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    return batches


def test_multi_async_batches_and_warm_up(multi_async):
    assert [list(batch.shape) for batch in multi_async] == [[10]] * 20
    random = torch.stack([is_random(batch) for batch in multi_async])
    assert torch.equal(random.all(-1), random.any(-1))  # a batch is either random or not
    assert random.all(-1).sum() == 4


def test_multi_async_continues_where_a_batch_ended(multi_async):
    last: dict[float, torch.Tensor] = {}
    for batch in multi_async:
        seed = float(batch["observation"][0, 0])
        assert batch["observation"][:, 0].eq(seed).all()  # one worker
        assert batch["next", "truncated"][-1] | batch["next", "terminated"][-1]
        if seed in last:
            episode, step = last[seed][1:].tolist()
            expected = [episode, step] if step < LENGTH else [episode + 1, 0]
            assert batch["observation"][0, 1:].tolist() == expected
        last[seed] = batch["next", "observation"][-1]
    assert len(last) == 2


@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_multi_async_windows(multi_async, storage):
    buffer = make_replay_buffer(105, batch_size=50, storage=storage, seed=0)
    fill(buffer, multi_async)

"""Windows of the replay buffer, compared with a list of the stored transitions."""

from __future__ import annotations

import gc
import tempfile
from collections import deque
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.envs import SerialEnv
from torchrl.trainers import ReplayBufferTrainer

from alm_torchrl.data import (
    WindowReplayBuffer,
    bytes_per_transition,
    make_collector,
    make_replay_buffer,
)
from tests.data.counting import CountingEnv
from tests.synchronization import HostReads

STORAGES = ("memory", "memmap")


def steps(ids: torch.Tensor, done: torch.Tensor, terminated: torch.Tensor | None = None):
    """Transitions of batch shape ``ids.shape``; transition ``i`` leads from ``i`` to ``i + 1``."""
    terminated = done if terminated is None else terminated
    return TensorDict(
        {
            "observation": ids.unsqueeze(-1),
            "action": ids.unsqueeze(-1).float(),
            "next": {
                "observation": ids.unsqueeze(-1) + 1,
                "reward": -ids.unsqueeze(-1).float(),
                "done": done.unsqueeze(-1),
                "terminated": terminated.unsqueeze(-1),
                "truncated": (done & ~terminated).unsqueeze(-1),
            },
        },
        ids.shape,
    )


def episodes(lengths: list[int]) -> TensorDict:
    """Complete episodes in sequence; every second one ends by a time limit."""
    ends = torch.tensor(lengths).cumsum(0) - 1
    done = torch.zeros(sum(lengths), dtype=torch.bool)
    done[ends] = True
    terminated = done.clone()
    terminated[ends[1::2]] = False
    return steps(torch.arange(len(done)), done, terminated)


def draw(buffer: WindowReplayBuffer, batches: int) -> TensorDict:
    return torch.cat([buffer.sample() for _ in range(batches)])


def expected_ids(first: int, ends: set[int], newest: int, length: int) -> tuple[list, list]:
    """Ids and mask of the window at ``first``, given the ids that end an episode."""
    ids, mask = [first], [True]
    while len(ids) < length:
        inside = mask[-1] and ids[-1] not in ends and ids[-1] != newest
        ids.append(ids[-1] + inside)
        mask.append(inside)
    return ids, mask


def check_windows(windows: TensorDict, envs: list[deque], ends: set[int]) -> None:
    """Checks ids, mask and all other entries of each window against its first id."""
    newest = {id_: env[-1] for env in envs for id_ in env}
    ids = windows["observation"].squeeze(-1)
    for window, mask in zip(ids.tolist(), windows["validity_mask"].tolist(), strict=True):
        assert window[0] in newest, f"{window[0]} was overwritten or never stored"
        assert (window, mask) == expected_ids(window[0], ends, newest[window[0]], len(window))
    assert torch.equal(windows["next", "observation"].squeeze(-1), ids + 1)
    assert torch.equal(windows["action"].squeeze(-1), ids.float())
    assert torch.equal(windows["next", "reward"].squeeze(-1), -ids.float())


def chi_square_z(counts: torch.Tensor) -> float:
    """Deviation of counts from the uniform distribution, in standard deviations."""
    expected = counts.sum() / counts.numel()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.numel() - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


# ------------------------------------------------------------------------------- uniformity


@pytest.mark.parametrize("storage", STORAGES)
def test_index_zero_is_uniform_over_short_and_long_episodes(storage, tmp_path):
    lengths = [20] * 500 + [1000] * 10
    buffer = make_replay_buffer(
        sum(lengths), batch_size=2000, storage=storage, seed=0,
        scratch_dir=tmp_path if storage == "memmap" else None,
    )  # fmt: skip
    data = episodes(lengths)
    buffer.extend(data)
    first = draw(buffer, 100)["observation"][:, 0, 0]
    counts = torch.bincount(first, minlength=len(data)).double()
    # 200,000 draws: 10 for each transition; 100,000 +- 224 from short episodes; 5,100 +- 70 final
    assert abs(chi_square_z(counts)) < 4
    assert abs(int((first < 10_000).sum()) - 100_000) < 4 * 224
    final = data["next", "done"].squeeze(-1)
    assert abs(int(counts[final].sum()) - 5_100) < 4 * 71
    assert counts[final].min() > 0


def test_index_zero_is_uniform_after_the_ring_wraps_around():
    buffer = make_replay_buffer(60, batch_size=60, seed=0)
    for chunk in episodes([7, 4, 9] * 10).split(11):
        buffer.extend(chunk)
    counts = torch.bincount(draw(buffer, 1000)["observation"][:, 0, 0] - 140, minlength=60)
    assert counts.numel() == 60
    assert abs(chi_square_z(counts.double())) < 4


def test_index_zero_is_uniform_over_several_environments():
    buffer = make_replay_buffer(120, batch_size=100, num_envs=4, seed=0)
    ids = torch.arange(4 * 25).reshape(4, 25)
    done = ids % 5 == torch.arange(4).unsqueeze(-1)  # each environment ends elsewhere
    buffer.extend(steps(ids, done))
    counts = torch.bincount(draw(buffer, 600)["observation"][:, 0, 0], minlength=100)
    assert counts.numel() == 100
    assert abs(chi_square_z(counts.double())) < 4


def test_one_transition_is_sampled():
    buffer = make_replay_buffer(10, batch_size=4, seed=0)
    buffer.extend(steps(torch.tensor([5]), torch.tensor([False])))
    windows = buffer.sample()
    assert windows["observation"].eq(5).all()
    assert windows["validity_mask"].tolist() == [[True, False, False]] * 4


# ------------------------------------------------------------------------------- boundaries


@pytest.mark.parametrize("window_length", [1, 2, 3, 5])
def test_windows_of_mixed_episodes(window_length):
    lengths = [20, 1, 2, 100, 3, 4] * 5
    buffer = make_replay_buffer(1000, batch_size=500, window_length=window_length, seed=0)
    data = episodes(lengths)
    buffer.extend(data)
    ends = set((torch.tensor(lengths).cumsum(0) - 1).tolist())
    windows = draw(buffer, 4)
    assert windows.shape == (2000, window_length)
    check_windows(windows, [deque(range(len(data)))], ends)


@pytest.mark.parametrize("written", range(4, 17))
def test_an_end_at_every_position_of_the_ring(written):
    capacity, every = 8, torch.arange(8)
    for end in range(max(0, written - capacity), written):
        buffer = make_replay_buffer(capacity, batch_size=8, seed=end)
        ids = torch.arange(written)
        for chunk in steps(ids, ids == end).split(3):
            buffer.extend(chunk)
        windows = draw(buffer, 25)
        stored = deque(ids.tolist(), maxlen=capacity)
        check_windows(windows, [stored], {end})
        seen = windows["observation"][:, 0, 0].unique()
        assert torch.equal(seen, stored[0] + every[: len(stored)])  # each of them has been drawn


def test_a_time_limit_ends_a_window_but_is_not_a_termination():
    buffer = make_replay_buffer(100, batch_size=100, seed=0)
    ids = torch.arange(20)
    buffer.extend(steps(ids, ids % 5 == 4, torch.zeros(20, dtype=torch.bool)))
    windows = draw(buffer, 3)
    check_windows(windows, [deque(range(20))], {4, 9, 14, 19})
    assert not windows["next", "terminated"].any()
    ended = windows["observation"].squeeze(-1) % 5 == 4
    assert torch.equal(windows["next", "truncated"].squeeze(-1), ended)
    assert not windows["validity_mask"][:, 1:][ended[:, :-1]].any()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_windows_after_random_writes(data):
    num_envs = data.draw(st.integers(1, 3), label="num_envs")
    window_length = data.draw(st.integers(1, 4), label="window_length")
    rows = data.draw(st.integers(window_length, 9), label="rows")
    chunks = data.draw(st.lists(st.integers(1, rows), min_size=1, max_size=6), label="chunks")
    total = sum(chunks)
    flags = st.lists(st.booleans(), min_size=num_envs * total, max_size=num_envs * total)
    done = torch.tensor(data.draw(flags, label="done")).reshape(num_envs, total)
    ids = torch.arange(num_envs).unsqueeze(-1) * 1000 + torch.arange(total)
    buffer = make_replay_buffer(
        rows * num_envs, batch_size=num_envs, window_length=window_length, num_envs=num_envs, seed=0
    )
    envs: list[deque] = [deque(maxlen=rows) for _ in range(num_envs)]
    for start, stop in pairwise([0, *torch.tensor(chunks).cumsum(0).tolist()]):
        buffer.extend(steps(ids[:, start:stop], done[:, start:stop]))
        for env, new in zip(envs, ids[:, start:stop].tolist(), strict=True):
            env.extend(new)
        check_windows(draw(buffer, 20), envs, set(ids[done].tolist()))
    assert len(buffer) == sum(map(len, envs))


# ----------------------------------------------------------------------------- offline data


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("column", [True, False])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_flags_and_rewards_of_other_types(num_envs, column, dtype):
    ids = torch.arange(40).reshape(num_envs, -1)
    data = steps(ids, ids % 5 == 4, ids % 10 == 4)
    plain, other = (
        make_replay_buffer(60, batch_size=50, num_envs=num_envs, seed=0) for _ in range(2)
    )
    plain.extend(data)
    for name in ("done", "terminated", "truncated"):
        data["next", name] = data["next", name].to(dtype)
    if not column:
        data["action"] = data["action"].squeeze(-1)
        for name in ("done", "terminated", "truncated", "reward"):
            data["next", name] = data["next", name].squeeze(-1)
    before = data.clone()
    other.extend(data)
    assert data["next", "done"].dtype == before["next", "done"].dtype
    assert data["next", "done"].shape == before["next", "done"].shape
    found, wanted = other.sample(), plain.sample()
    assert (found == wanted).all()
    assert found["next", "done"].dtype == torch.bool


@pytest.mark.parametrize("name", ["done", "terminated", "truncated"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda flag: flag + 0.5, "has values other than 0 and 1; use torch.bool"),
        (lambda flag: flag.expand(20, 2), r"has shape \(20, 2\); expected \[20, 1\]"),
        (lambda flag: flag[:, None], r"has shape \(20, 1, 1\); expected \[20, 1\]"),
    ],
)
def test_invalid_flags_are_refused(name, change, message):
    buffer = make_replay_buffer(60, batch_size=5)
    data = episodes([20])
    data["next", name] = change(data["next", name])
    with pytest.raises(ValueError, match=message) as caught:
        buffer.extend(data)
    assert repr(("next", name)) in str(caught.value)
    assert len(buffer) == 0


@pytest.mark.parametrize("storage", STORAGES)
def test_sizes_and_seed_may_be_numpy_integers(storage):
    sizes = {"capacity": 60, "batch_size": 5, "window_length": 3, "num_envs": 2, "seed": 1}
    samples = []
    for kind in (int, np.int64):
        options = {name: kind(value) for name, value in sizes.items()}
        buffer = make_replay_buffer(**options, storage=storage)
        buffer.extend(steps(torch.arange(20).reshape(2, 10), torch.zeros(2, 10).bool()))
        samples.append(buffer.sample())
    assert (samples[0] == samples[1]).all()
    assert buffer.num_envs == 2
    assert type(buffer.num_envs) is int


# -------------------------------------------------------------------- discontinuities

JOINED = "do not continue the transition before them"


def windows_that_join(buffer: WindowReplayBuffer) -> int:
    """Counts sampled windows with a valid transition that does not follow the one before."""
    windows = draw(buffer, 20)
    joined = windows["next", "observation"][:, :-1] != windows["observation"][:, 1:]
    return int((joined.flatten(2).any(-1) & windows["validity_mask"][:, 1:]).any(1).sum())


def test_separate_rollouts_are_not_joined(recwarn):
    buffer = make_replay_buffer(100, batch_size=100, seed=0)
    env = CountingEnv()
    rollouts = [env.rollout(5) for _ in range(12)]
    buffer.extend(rollouts[0])
    with pytest.warns(UserWarning, match=f"1 of 5 transitions of a batch {JOINED}"):
        buffer.extend(rollouts[1])
    for rollout in rollouts[2:]:
        buffer.extend(rollout)
    assert not [
        warning for warning in recwarn if JOINED in str(warning.message)
    ]  # only one warning
    assert windows_that_join(buffer) == 0
    stored = buffer[:]["next"]
    last = (torch.arange(60) % 5 == 4)[:-1]  # the newest episode is open
    assert torch.equal(stored["done"].squeeze(-1)[:-1], last)
    assert torch.equal(stored["truncated"].squeeze(-1)[:-1], last)
    assert not stored["terminated"].any()


def test_truncate_open_episodes_allows_a_new_rollout(recwarn):
    buffer = make_replay_buffer(100, batch_size=100, seed=0)
    for first in (0, 100, 200):
        buffer.truncate_open_episodes()
        buffer.extend(steps(torch.arange(first, first + 5), torch.zeros(5, dtype=torch.bool)))
    buffer.empty()
    buffer.extend(steps(torch.arange(5), torch.zeros(5, dtype=torch.bool)))
    assert not [warning for warning in recwarn if JOINED in str(warning.message)]


@pytest.mark.parametrize("flag", ["truncated", "terminated"])
def test_any_flag_ends_an_episode(flag):
    """TorchRL's trainer marks the seams of flattened environments in this way."""
    buffer = make_replay_buffer(100, batch_size=100, seed=0)
    ids = torch.tensor([[0, 1, 2, 3], [10, 11, 12, 13]])
    data = steps(ids, ids < 0, ids < 0)
    data["next", flag][:, -1] = True
    buffer.extend(data.reshape(-1))
    assert windows_that_join(buffer) == 0
    assert buffer[:]["next", "done"].squeeze(-1).tolist() == [False, False, False, True] * 2
    assert not data["next", "done"].any()


def test_torchrls_trainer_does_not_join_environments():
    env = SerialEnv(2, CountingEnv)
    buffer = make_replay_buffer(100, batch_size=100, seed=0)
    trainer_hook = ReplayBufferTrainer(buffer, batch_size=100, flatten_tensordicts=True)
    collector = make_collector(env, None, frames_per_batch=10, total_frames=50)
    for data in collector:
        trainer_hook.extend(data)
    collector.shutdown()
    assert windows_that_join(buffer) == 0


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_discontinuity_truncates_only_its_environment(chunk):
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [20, 21, 22, 30, 31, 40, 41, 42]])
    done = ids == 31  # the second jump is the end of an episode
    buffer = make_replay_buffer(100, batch_size=100, num_envs=2, seed=0)
    with pytest.warns(UserWarning, match=JOINED):
        deque(map(buffer.extend, steps(ids, done).split(chunk, dim=1)))
    check_windows(draw(buffer, 5), [deque(env) for env in ids.tolist()], {22, 31})
    stored = buffer[:]["next"]
    assert stored["truncated"].squeeze(-1).tolist() == [
        [False] * 8,
        [False] * 2 + [True] + [False] * 5,
    ]
    assert stored["terminated"].squeeze(-1).tolist() == done.tolist()


def test_shuffled_transitions_are_windows_of_one_step():
    buffer = make_replay_buffer(100, batch_size=100, seed=0)
    order = torch.arange(49, -1, -1)
    with pytest.warns(UserWarning, match=f"49 of 50 transitions of a batch {JOINED}"):
        buffer.extend(steps(order, order < 0))
    assert not draw(buffer, 2)["validity_mask"][:, 1:].any()


def test_nan_and_other_dtypes_are_not_discontinuities(recwarn):
    buffer = make_replay_buffer(100, batch_size=100, seed=0)
    data = steps(torch.arange(12), torch.arange(12) == 5)
    for root in (data, data["next"]):
        root["observation"] = torch.cat(
            [root["observation"] / 3, torch.full((12, 1), torch.nan)], 1
        )
        root["pixels"] = root["observation"][:, :1].mul(30).byte().repeat(1, 16)
        root["memory"] = torch.randn(12, 2)
    data["memory"][1:] = data["next", "memory"][:-1]
    data["observation"] = data["observation"].double()
    for part in data.split(4):
        buffer.extend(part)
    assert not [warning for warning in recwarn if JOINED in str(warning.message)]
    assert buffer[:]["next", "done"].sum() == 1


def test_an_observation_of_another_shape_is_refused():
    buffer = make_replay_buffer(100, batch_size=10)
    data = steps(torch.arange(4), torch.zeros(4).bool())
    buffer.extend(data)
    data = data.clone()
    for root in (data, data["next"]):
        root["observation"] = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"\('observation',\) has shape \[3\]; expected \[1\]"):
        buffer.extend(data)


# ----------------------------------------------------------------------------- batch shapes


def test_batches_of_workers_and_single_steps_fill_the_same_columns():
    ids = torch.arange(6).unsqueeze(-1) * 100 + torch.arange(8)
    done = ids % 100 == 4
    whole, workers, single = (
        make_replay_buffer(60, batch_size=50, num_envs=6, seed=0) for _ in range(3)
    )
    whole.extend(steps(ids, done))
    workers.extend(steps(ids.reshape(2, 3, 8), done.reshape(2, 3, 8)))
    for step in range(8):
        single.add(steps(ids[:, step], done[:, step]))
    expected = whole.sample()
    assert (expected == workers.sample()).all()
    assert (expected == single.sample()).all()


def test_single_steps_of_one_environment():
    buffer = make_replay_buffer(60, batch_size=50, seed=0)
    for step in range(0, 16, 2):
        buffer.extend(steps(torch.tensor(step), torch.tensor(step == 4)))
        buffer.extend(steps(torch.tensor([[step + 1]]), torch.tensor([[step == 10]])))
    assert len(buffer) == 16
    check_windows(draw(buffer, 3), [deque(range(16))], {4, 11})


@pytest.mark.parametrize(
    ("num_envs", "shape", "message"),
    [
        (1, (2, 5), r"shape \[2, 5\] has 2 environments of 5 steps.*num_envs=1"),
        (3, (2, 5), r"shape \[2, 5\] has 2 environments of 5 steps.*num_envs=3"),
        (3, (5,), r"shape \[5\] has 5 environments of 1 steps.*num_envs=3"),
        (1, (31,), "31 steps per environment does not fit.*capacity is 30"),
        (3, (3, 11), "11 steps per environment does not fit.*capacity is 10"),
    ],
)
def test_batches_that_do_not_fit_are_refused(num_envs, shape, message):
    buffer = make_replay_buffer(30, batch_size=5, num_envs=num_envs)
    ids = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        buffer.extend(steps(ids, ids > 0))
    assert len(buffer) == 0


# ------------------------------------------------------------------------------ stored keys


def collected() -> TensorDict:
    """A batch with every entry that an environment and a policy may write."""
    data = steps(torch.arange(10), torch.arange(10) == 9)
    for root in (data, data["next"]):
        root["agents", "pixels"] = torch.randint(256, (10, 3, 4, 4), dtype=torch.uint8)
        root["episode_reward"] = torch.zeros(10, 1)
        root["step_count"] = torch.zeros(10, 1, dtype=torch.long)
    for name in ("done", "terminated", "truncated", "is_init"):
        data[name] = torch.zeros(10, 1, dtype=torch.bool)
    for name in ("latent", "latent_loc", "action_loc", "anything"):
        data[name] = torch.zeros(10, 5)
    data["collector", "traj_ids"] = torch.zeros(10, dtype=torch.long)
    data["next", "x_velocity"] = torch.zeros(10, 1)
    return data


def leaves(data: TensorDict) -> set:
    return set(data.keys(include_nested=True, leaves_only=True))


OUTCOME = {("next", name) for name in ("reward", "done", "terminated", "truncated")}


def test_only_transitions_are_stored():
    buffer = make_replay_buffer(20, batch_size=4, seed=0)
    buffer.extend(collected())
    observations = {"observation", ("agents", "pixels")}
    expected = {*observations, "action", *OUTCOME, ("next", "observation")}
    expected |= {("next", "agents", "pixels")}
    assert leaves(buffer[:]) == expected
    sample = buffer.sample()
    assert leaves(sample) == expected | {"validity_mask"}
    assert sample["agents", "pixels"].dtype == torch.uint8
    assert sample["agents", "pixels"].shape == (4, 3, 3, 4, 4)


def test_custom_keys():
    keys = ["observation", ["agents", "pixels"], "action", ("next", "x_velocity"), *OUTCOME]
    buffer = make_replay_buffer(20, batch_size=4, keys=keys)
    buffer.extend(collected())
    expected = {"observation", ("agents", "pixels"), "action", ("next", "x_velocity"), *OUTCOME}
    assert leaves(buffer[:]) == expected


def test_nested_action_key():
    data = collected()
    data["agents", "action"] = data.pop("action")
    buffer = make_replay_buffer(20, batch_size=4, action_key=("agents", "action"))
    buffer.extend(data)
    assert ("agents", "action") in leaves(buffer.sample())


@pytest.mark.parametrize("missing", ["action", ("next", "done")])
def test_a_missing_key_is_named(missing):
    buffer = make_replay_buffer(20, batch_size=4)
    with pytest.raises(KeyError, match=str(missing[-1] if isinstance(missing, tuple) else missing)):
        buffer.extend(collected().exclude(missing))


def test_a_later_batch_without_an_entry_is_refused():
    buffer = make_replay_buffer(20, batch_size=4)
    buffer.extend(collected())
    with pytest.raises(KeyError, match="observation"):
        buffer.extend(collected().exclude("observation"))
    assert len(buffer) == 10


def test_extend_does_not_change_the_batch():
    data = collected()
    before = data.clone()
    make_replay_buffer(20, batch_size=4).extend(data)
    assert leaves(data) == leaves(before)
    assert (data == before).all()


def test_a_sample_is_a_copy():
    buffer = make_replay_buffer(20, batch_size=4, seed=0)
    buffer.extend(collected())
    before = buffer[:].clone()
    buffer.sample().zero_()
    assert (buffer[:] == before).all()


@pytest.mark.parametrize("num_envs", [1, 5])
def test_bytes_per_transition_equals_the_storage(num_envs):
    buffer = make_replay_buffer(1000, batch_size=4, num_envs=num_envs)
    data = collected().reshape(-1) if num_envs == 1 else collected().reshape(5, 2)
    buffer.extend(data)
    stored = buffer.storage._storage
    taken = sum(leaf.element_size() * leaf.numel() for leaf in stored.values(True, True))
    assert bytes_per_transition(data) * 1000 == taken


# ------------------------------------------------------------------------ seeds and storage


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("written", [10, 25])
def test_a_batch_from_each_environment(num_envs: int, written: int) -> None:
    """Each row has windows of one environment, and its transitions are equally likely."""
    buffer = make_replay_buffer(
        20 * num_envs, batch_size=20, num_envs=num_envs, per_env=True, seed=0
    )
    ids = torch.arange(num_envs * written).reshape(num_envs, written)
    done = ids % 7 == 6
    for step in range(written):
        buffer.extend(steps(ids, done)[:, step : step + 1])
    ends = set(ids[done].tolist())
    envs = [deque(env.tolist(), maxlen=20) for env in ids]
    samples = [buffer.sample(400) for _ in range(10)]
    assert samples[0].shape == (num_envs, 400, 3)
    for env, stored in enumerate(envs):
        windows = torch.cat([sample[env] for sample in samples])
        check_windows(windows, [stored], ends)
        counts = torch.bincount(windows["observation"][:, 0, 0] - stored[0], minlength=len(stored))
        assert counts.numel() == len(stored)
        assert abs(chi_square_z(counts)) < 4
    assert buffer.sample(5).shape == (num_envs, 5, 3)


@pytest.mark.parametrize(("num_envs", "per_env"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("written", [10, 25])
def test_sampling_does_not_synchronize_with_the_device(
    num_envs: int, per_env: bool, written: int
) -> None:
    buffer = make_replay_buffer(
        20 * num_envs, batch_size=4, num_envs=num_envs, per_env=per_env, seed=0
    )
    ids = torch.arange(num_envs * written).reshape(num_envs, written)
    for step in range(written):
        buffer.extend(steps(ids, ids % 7 == 6)[:, step : step + 1])
    with HostReads() as reads:
        buffer.sample()
    assert not reads.found
    assert reads.operators > 10


@pytest.mark.parametrize("num_envs", [1, 2])
def test_samples_depend_only_on_the_seed(num_envs):
    def sample(seed: int) -> torch.Tensor:
        buffer = make_replay_buffer(100, batch_size=50, num_envs=num_envs, seed=seed)
        ids = torch.arange(100).reshape(num_envs, -1)
        buffer.extend(steps(ids, ids < 0))
        torch.manual_seed(torch.randint(1000, ()))
        return draw(buffer, 3)["observation"]

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_a_seeded_buffer_does_not_use_the_global_generator():
    buffer = make_replay_buffer(100, batch_size=50, seed=0)
    buffer.extend(episodes([20]))
    state = torch.get_rng_state()
    buffer.sample()
    assert torch.equal(torch.get_rng_state(), state)


def test_memmap_writes_to_scratch_dir(tmp_path):
    buffer = make_replay_buffer(100, batch_size=5, storage="memmap", scratch_dir=tmp_path / "ring")
    buffer.extend(episodes([20]))
    assert (tmp_path / "ring" / "observation.memmap").stat().st_size == 100 * 8


def test_memmap_without_a_folder_writes_to_the_disk(tmp_path, monkeypatch):
    """Not to shared memory, which would take the memory that memmap is to save."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    buffer = make_replay_buffer(100, batch_size=5, storage="memmap", seed=0)
    buffer.extend(episodes([20]))
    (folder,) = tmp_path.glob("alm-replay-*")
    assert (folder / "observation.memmap").stat().st_size == 100 * 8
    del buffer
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize("written", [12, 20, 33])
@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize("storage", STORAGES)
def test_save_and_restore(storage, num_envs, written, tmp_path):
    def make() -> WindowReplayBuffer:
        return make_replay_buffer(
            20 * num_envs, batch_size=10, num_envs=num_envs, storage=storage, seed=0
        )

    ids = torch.arange(num_envs).unsqueeze(-1) * 1000 + torch.arange(written + 5)
    history = steps(ids, ids % 1000 % 6 == 3)
    buffer = make()
    for chunk in history[:, :written].split(8, dim=1):
        buffer.extend(chunk)
    buffer.sample()
    buffer.dumps(tmp_path / "buffer")

    restored = make()
    restored.loads(tmp_path / "buffer")
    assert len(restored) == len(buffer)
    assert torch.equal(restored[:]["observation"], buffer[:]["observation"])
    envs = [deque(env, maxlen=20) for env in ids[:, :written].tolist()]
    ends = set(ids[ids % 1000 % 6 == 3].tolist())
    windows = draw(restored, 20)
    check_windows(windows, envs, ends)  # before any write, when only the cursor tells the seam
    assert torch.equal(windows["observation"][:10], buffer.sample()["observation"])  # same draws

    restored.extend(history[:, written:])  # the environments were reset in between
    for env, new in zip(envs, ids[:, written:].tolist(), strict=True):
        env.extend(new)
    check_windows(draw(restored, 20), envs, ends | set(ids[:, written - 1].tolist()))

    again = make()
    again.loads(tmp_path / "buffer")  # writing after a restore leaves the saved files alone
    assert torch.equal(again[:]["observation"], buffer[:]["observation"])


@pytest.mark.parametrize("num_envs", [1, 2])
def test_loading_a_state_dict_truncates_the_open_episodes(num_envs):
    ids = torch.arange(num_envs).unsqueeze(-1) * 1000 + torch.arange(30)
    make = lambda: make_replay_buffer(20 * num_envs, batch_size=10, num_envs=num_envs, seed=0)  # noqa: E731
    buffer, restored = make(), make()
    for chunk in steps(ids, ids < 0).split(8, dim=1):
        buffer.extend(chunk)
    restored.load_state_dict(buffer.state_dict())
    check_windows(draw(restored, 20), [deque(env, maxlen=20) for env in ids.tolist()], set())


def test_truncate_open_episodes_changes_only_the_newest_step():
    buffer = make_replay_buffer(20, batch_size=20, num_envs=2, seed=0)
    buffer.truncate_open_episodes()  # nothing stored, nothing to close
    ids = torch.tensor([[0, 1, 2], [10, 11, 12]])
    done = ids == 12
    buffer.extend(steps(ids, done))
    buffer.sample()  # fills TorchRL's cache of the episodes' ends
    buffer.truncate_open_episodes()
    stored = buffer[:]["next"]  # [num_envs, time]
    assert stored["done"].squeeze(-1).tolist() == [[False, False, True], [False, False, True]]
    assert stored["terminated"].squeeze(-1).tolist() == [[False] * 3, [False, False, True]]
    assert stored["truncated"].squeeze(-1).tolist() == [[False, False, True], [False] * 3]
    buffer.extend(steps(ids + 3, ids < 0))
    windows = draw(buffer, 20)
    check_windows(windows, [deque(range(6)), deque(range(10, 16))], {2, 12})


# ------------------------------------------------------------------------------------ errors


def test_sampling_an_empty_buffer_is_refused():
    with pytest.raises(RuntimeError, match="empty replay buffer"):
        make_replay_buffer(10, batch_size=2).sample()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, "capacity must be an integer of at least 1, not 0"),
        ({"capacity": 100.0}, "capacity must be an integer of at least 1, not 100.0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"window_length": 0}, "window_length must be an integer of at least 1"),
        ({"num_envs": 0}, "num_envs must be an integer of at least 1"),
        ({"batch_size": 101}, "capacity 100 is smaller than batch_size 101"),
        ({"num_envs": 3}, "capacity 100 is not a multiple of num_envs=3: use 99"),
        ({"num_envs": 50}, "2 steps of each of 50 environments, fewer than window_length 3"),
        ({"storage": "disk"}, "storage must be 'memory' or 'memmap', not 'disk'"),
        ({"scratch_dir": "here"}, "scratch_dir requires storage='memmap'"),
        ({"keys": ["observation"]}, r"keys must include \('next', 'done'\)"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_replay_buffer(**{"capacity": 100, "batch_size": 10, **arguments})

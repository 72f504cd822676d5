"""A replay buffer that stores each frame once returns the samples of one that stores stacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.envs import CatFrames, SerialEnv, TransformedEnv

from alm_torchrl.data import (
    IncrementalReplay,
    WindowReplayBuffer,
    bytes_per_transition,
    make_collector,
    make_replay_buffer,
)
from alm_torchrl.data.frames import FrameStore
from tests.data.counting import CountingEnv
from tests.synchronization import HostReads

STACK, HISTORY = 3, 4
STACKS = {"pixels": STACK, ("body", "history"): HISTORY}
RESETS = ("same", "zeros", "distinct")


class Source:
    """Environments with episodes of random lengths, with stacks of random frames."""

    def __init__(self, envs: int, longest: int, reset: str, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.longest, self.reset = longest, reset
        self.envs = [self.start() for _ in range(envs)]

    def frames(self, count: int) -> list[torch.Tensor]:
        pixels = torch.randint(256, (count, 2, 3, 3), generator=self.random, dtype=torch.uint8)
        vectors = torch.randn(count, 1, 5, generator=self.random)
        return [pixels, vectors]

    def start(self) -> list:
        length = int(torch.randint(1, self.longest + 1, (), generator=self.random))
        stacks = self.frames(max(STACK, HISTORY))
        for frames in stacks:
            if self.reset == "same":
                frames[:-1] = frames[-1]
            elif self.reset == "zeros":
                frames[:-1] = 0
        return [length, stacks[0][-STACK:], stacks[1][-HISTORY:]]

    def step(self) -> TensorDict:
        rows = []
        for env, (left, pixels, history) in enumerate(self.envs):
            new = self.frames(1)
            after = [torch.cat([old[1:], one]) for old, one in zip((pixels, history), new)]  # noqa: B905
            done = torch.tensor([left == 1])
            step = {"pixels": pixels.flatten(0, 1), "body": {"history": history.flatten(0, 1)}}
            outcome = {
                "pixels": after[0].flatten(0, 1),
                "body": {"history": after[1].flatten(0, 1)},
            }
            outcome |= {"reward": torch.randn(1, generator=self.random), "done": done}
            outcome |= {"truncated": done, "terminated": done & False}
            rows.append(TensorDict({**step, "action": torch.zeros(2), "next": outcome}))
            self.envs[env] = self.start() if left == 1 else [left - 1, *after]
        return torch.stack(rows)

    def steps(self, count: int) -> TensorDict:
        data = torch.stack([self.step() for _ in range(count)], 1)
        return data[0] if len(self.envs) == 1 else data


def make(envs: int, steps: int, stacks: dict | None, storage: str = "memory") -> WindowReplayBuffer:
    return make_replay_buffer(
        steps * envs, batch_size=min(32, steps), num_envs=envs, seed=0, storage=storage,
        frame_stacks=stacks,
    )  # fmt: skip


def assert_same_windows(compact: WindowReplayBuffer, plain: WindowReplayBuffer) -> None:
    for _ in range(3):
        ours, theirs = compact.sample(), plain.sample()
        assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
        assert ours.shape == theirs.shape
        for key, leaf in theirs.items(True, True):
            assert ours[key].dtype == leaf.dtype
            assert torch.equal(ours[key], leaf), key


@pytest.mark.parametrize("storage", ["memory", "memmap"])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("envs", [1, 3])
def test_samples_equal_those_of_a_buffer_that_stores_stacks(envs, reset, storage):
    source = Source(envs, longest=6, reset=reset)
    compact, plain = make(envs, 20, STACKS, storage), make(envs, 20, None)
    for count in (1, 1, 5, 20, 3, *[1] * 30, 17, 8):  # the ring wraps around several times
        data = source.steps(count)
        before = data.clone()
        compact.extend(data)
        plain.extend(data)
        assert (data == before).all()
        assert_same_windows(compact, plain)


@settings(max_examples=25, deadline=None)
@given(
    envs=st.integers(1, 2),
    size=st.integers(4, 12),
    longest=st.integers(1, 15),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=20),
    reset=st.sampled_from(RESETS),
    seed=st.integers(0, 100),
)
def test_samples_are_equal_for_random_episodes(envs, size, longest, counts, reset, seed):
    source = Source(envs, longest, reset, seed)
    compact, plain = make(envs, size, STACKS), make(envs, size, None)
    for count in counts:
        data = source.steps(count)
        compact.extend(data)
        plain.extend(data)
    assert_same_windows(compact, plain)


@pytest.mark.parametrize("per_env", [False, True])
def test_sampling_does_not_synchronize_with_the_device(per_env):
    source = Source(2, longest=6, reset="same")
    compact, plain = (
        make_replay_buffer(
            40, batch_size=16, num_envs=2, seed=0, per_env=per_env, frame_stacks=stacks
        )
        for stacks in (STACKS, None)
    )
    for _ in range(33):
        data = source.steps(1)
        compact.extend(data)
        plain.extend(data)
    assert_same_windows(compact, plain)
    with HostReads() as reads:
        compact.sample()
    assert not reads.found
    assert reads.operators > 10


def test_a_discontinuity_without_an_end():
    source = Source(1, longest=100, reset="distinct")
    compact, plain = make(1, 30, STACKS), make(1, 30, None)
    for _ in range(4):
        source.envs = [source.start()]  # as a reset between two batches
        data = source.steps(6)
        compact.extend(data)
        plain.extend(data)
        assert_same_windows(compact, plain)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("envs", [1, 2])
@pytest.mark.parametrize("longest", [4, 30])
def test_a_saved_replay_restores_every_frame(tmp_path: Path, envs, longest, reset):
    """Over several restarts, after the ring wrapped around, and from parts of chunks."""
    source = Source(envs, longest, reset)
    compact, plain = make(envs, 20, STACKS), make(envs, 20, None)
    saves = [
        IncrementalReplay(compact, tmp_path / "c"),
        IncrementalReplay(plain, tmp_path / "p"),
    ]
    for counts in ([13, 2], [9, 1, 1, 1], [20], [3, 11], [1]):
        for count in counts:
            data = source.steps(count)
            compact.extend(data)
            plain.extend(data)
        parts = [save.save() for save in saves]
        compact, plain = make(envs, 20, STACKS), make(envs, 20, None)
        saves = [
            IncrementalReplay(compact, tmp_path / "c"),
            IncrementalReplay(plain, tmp_path / "p"),
        ]
        for save, written in zip(saves, parts, strict=True):
            save.load(written)
        assert_same_windows(compact, plain)
        source.envs = [source.start() for _ in range(envs)]


def test_a_saved_replay_writes_each_frame_once(tmp_path: Path):
    source = Source(1, longest=50, reset="same")
    compact, plain = make(1, 1000, {"pixels": STACK}), make(1, 1000, None)
    saves = [
        IncrementalReplay(compact, tmp_path / "c"),
        IncrementalReplay(plain, tmp_path / "p"),
    ]
    for _ in range(2):
        data = source.steps(400)
        for buffer, save in zip((compact, plain), saves, strict=True):
            buffer.extend(data)
            save.save()
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).iterdir()) for n in ("c", "p")]
    saved = (sizes[1] - sizes[0]) / 800
    assert saved > (2 * STACK - 1) * 18 - 4 * STACK - 4  # 18 bytes a frame; a few episodes' starts


def test_a_saved_replay_with_other_stacks_is_refused(tmp_path: Path):
    compact = make(1, 20, STACKS)
    compact.extend(Source(1, 5, "same").steps(10))
    parts = IncrementalReplay(compact, tmp_path).save()
    with pytest.raises(ValueError, match="use the same frame_stacks"):
        IncrementalReplay(make(1, 20, None), tmp_path).load(parts)


@pytest.mark.parametrize("storage", ["memory", "memmap"])
@pytest.mark.parametrize("how", ["dumps", "state_dict"])
@pytest.mark.parametrize("written", [11, 33])
def test_saving_the_whole_buffer(tmp_path: Path, how, written, storage):
    source = Source(2, longest=6, reset="same")
    compact, plain = make(2, 20, STACKS, storage), make(2, 20, None)
    for _ in range(written):
        data = source.steps(1)
        compact.extend(data)
        plain.extend(data)
    restored = make(2, 20, STACKS, storage)
    if how == "dumps":
        compact.dumps(tmp_path / "buffer")
        restored.loads(tmp_path / "buffer")
    else:
        restored.load_state_dict(compact.state_dict())
    plain.truncate_open_episodes()
    source.envs = [source.start() for _ in range(2)]
    for count in (0, 1, 7, 20):
        if count:
            data = source.steps(count)
            restored.extend(data)
            plain.extend(data)
        assert_same_windows(restored, plain)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_stacks_of_torchrl_through_a_collector(num_envs):
    def create():
        env = CountingEnv(length=7)
        cat = CatFrames(3, -1, in_keys=["observation"], out_keys=["stacked"])
        return TransformedEnv(env, cat)

    env = create() if num_envs == 1 else SerialEnv(num_envs, create)
    collector = make_collector(env, None, frames_per_batch=num_envs, seed=3)
    buffers = [
        make_replay_buffer(40 * num_envs, batch_size=30, num_envs=num_envs, seed=0, frame_stacks=s)
        for s in ({"stacked": 3}, None)
    ]
    for _, data in zip(range(60), collector, strict=False):
        for buffer in buffers:
            buffer.extend(data)
    collector.shutdown()
    assert_same_windows(*buffers)


def allocated(frames: FrameStore) -> int:
    return sum(tensor.nbytes for tensor in (frames._ring, frames._pool, frames._places))


def test_bytes_of_a_transition_with_stacked_pixels():
    """The numbers in docs/environments.md."""
    pixels = torch.zeros(10, 9, 84, 84, dtype=torch.uint8)
    flag = torch.zeros(10, 1, dtype=torch.bool)
    outcome = {"pixels": pixels, "reward": torch.zeros(10, 1)}
    outcome |= {"done": flag, "terminated": flag, "truncated": flag}
    data = TensorDict({"pixels": pixels, "action": torch.zeros(10, 6), "next": outcome}, [10])
    assert bytes_per_transition(data, frame_stacks={"pixels": 3}) == 84 * 84 * 3 + 12 + 24 + 7
    assert bytes_per_transition(data) == 6 * 84 * 84 * 3 + 24 + 7
    buffer = make_replay_buffer(500, batch_size=8, frame_stacks={"pixels": 3})
    buffer.extend(data)
    stored = sum(leaf.nbytes for leaf in buffer.storage._storage.values(True, True))
    (frames,) = buffer.frames.values()
    taken = (stored + allocated(frames)) / 500
    assert taken == pytest.approx(21_211, rel=0.05)  # the pool for first frames, and 3 frames more
    assert buffer.sample()["next", "pixels"].dtype == torch.uint8


def test_first_frames_leave_the_pool_with_their_transitions():
    source = Source(1, longest=2, reset="same")
    buffer = make(1, 20, {"pixels": STACK})
    (frames,) = buffer.frames.values()
    for _ in range(300):  # some 200 episodes, of which 20 transitions hold 20 or fewer
        buffer.extend(source.steps(1))
    assert allocated(frames) <= (20 + STACK + 32) * 18 + 20 * STACK * 4


@pytest.mark.parametrize(
    ("stacks", "error", "message"),
    [
        ({"pixels": 2}, ValueError, "not stacks of 2 frames along their first dimension: a next"),
        ({"pixels": 4}, ValueError, "not stacks of 4 frames along their first dimension"),
        ({"sound": 3}, KeyError, "frame_stacks names"),
    ],
)
def test_observations_that_are_not_stacks_are_refused(stacks, error, message):
    with pytest.raises(error, match=message):
        make(1, 20, stacks).extend(Source(1, 5, "same").steps(3))


@pytest.mark.parametrize("stack", [0, -1])
def test_a_stack_without_frames_is_refused(stack):
    with pytest.raises(ValueError, match="at least 1 frame"):
        make(1, 20, {"pixels": stack})

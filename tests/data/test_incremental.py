"""Incremental saves of a replay buffer: each step is written once and restored in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from alm_torchrl.data import IncrementalReplay, WindowReplayBuffer, make_replay_buffer


def batch(first: int, steps: int, envs: int) -> TensorDict:
    shape = [steps] if envs == 1 else [envs, steps]
    time = torch.arange(first, first + steps).float().expand(shape).unsqueeze(-1)
    observation = time + 1000 * torch.arange(envs).reshape(*([] if envs == 1 else [-1, 1]), 1)
    flag = torch.zeros(*shape, 1, dtype=torch.bool)
    outcome = {"reward": time, "done": flag, "terminated": flag, "truncated": flag}
    step = {"nested": {"position": observation}, "action": time}
    return TensorDict({**step, "next": {"nested": {"position": observation + 1}, **outcome}}, shape)


def buffer(envs: int = 1, steps: int = 30, storage: str = "memory") -> WindowReplayBuffer:
    return make_replay_buffer(steps * envs, batch_size=16, num_envs=envs, storage=storage)


def everything(replay: WindowReplayBuffer) -> TensorDict:
    return replay.storage.get(slice(None))


@pytest.mark.parametrize("total", [7, 30, 47, 95])
@pytest.mark.parametrize("envs", [1, 3])
@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_a_restored_buffer_equals_the_saved_one(
    tmp_path: Path, envs: int, storage: str, total: int
) -> None:
    replay = buffer(envs, storage=storage)
    saved = IncrementalReplay(replay, tmp_path)
    for first in range(0, total, 5):
        replay.extend(batch(first, min(5, total - first), envs))
        if first % 3 == 0 or first + 5 >= total:
            parts = saved.save()
    assert replay.write_count == total

    fresh = buffer(envs, storage=storage)
    IncrementalReplay(fresh, tmp_path).load(parts)
    replay.truncate_open_episodes()
    for more in (0, 4):
        if more:
            replay.extend(batch(total, more, envs))
            fresh.extend(batch(total, more, envs))
        assert len(fresh) == len(replay)
        assert (everything(fresh) == everything(replay)).all()
        torch.manual_seed(0)
        sample = replay.sample()
        torch.manual_seed(0)
        assert (fresh.sample() == sample).all()


def test_a_step_is_written_once_and_dropped_when_overwritten(tmp_path: Path) -> None:
    replay = buffer()
    saved = IncrementalReplay(replay, tmp_path)
    assert saved.save() == []
    spans = []
    for first in range(0, 60, 10):
        replay.extend(batch(first, 10, 1))
        spans.append([(part.start, part.stop) for part in saved.save()])
    assert spans[1] == [(0, 10), (9, 20)]
    assert spans[-1] == [(29, 40), (39, 50), (49, 60)]
    assert saved.save() == saved.save()
    saved.remove_all_but(saved.save()[1:])
    assert sorted(path.name[:25] for path in tmp_path.iterdir()) == [
        "000000000039-000000000050",
        "000000000049-000000000060",
    ]


@pytest.mark.parametrize("through_link", [False, True])
def test_only_files_of_this_run_are_removed(tmp_path: Path, through_link: bool) -> None:
    folder, other = tmp_path / "replay-0", tmp_path / "other"
    other.mkdir()
    if through_link:
        folder.symlink_to(other)
    replay = buffer()
    for saved in (IncrementalReplay(buffer(), folder), IncrementalReplay(replay, folder)):
        saved.replay.extend(batch(0, 10, 1))
        saved.save()  # the parts of two runs, in one folder
    theirs = {path.name for path in folder.iterdir()} - {part.file for part in saved.chunks}
    (folder / ".snapshot").mkdir()
    (folder / "thesis.pt").write_bytes(b"mine")
    (folder / "000000000000-000000000010.pt").write_bytes(b"mine")
    theirs |= {".snapshot", "thesis.pt", "000000000000-000000000010.pt"}
    assert len(theirs) == 4
    stale = folder / f"{saved.chunks[0].file}.partial"
    stale.write_bytes(b"torn")

    resumed = IncrementalReplay(buffer(), folder)
    resumed.load(saved.chunks)
    resumed.replay.extend(batch(10, 5, 1))
    parts = resumed.save()
    resumed.remove_all_but(parts[1:])
    assert {path.name for path in folder.iterdir()} == theirs | {parts[1].file}


def test_truncated_episodes_stay_truncated_over_restarts(tmp_path: Path) -> None:
    replay = buffer()
    replay.extend(batch(0, 10, 1))
    for expected in ([9], [9, 14], [9, 14, 19]):
        saved = IncrementalReplay(replay, tmp_path)
        if replay.write_count == 10:
            parts = saved.save()
        replay = buffer()
        saved = IncrementalReplay(replay, tmp_path)
        saved.load(parts)
        closed = everything(replay)["next", "truncated"].flatten().nonzero().flatten()
        assert closed.tolist() == expected
        replay.extend(batch(replay.write_count, 5, 1))
        parts = saved.save()


def test_a_buffer_with_other_sizes_is_refused(tmp_path: Path) -> None:
    replay = buffer(envs=3)
    saved = IncrementalReplay(replay, tmp_path)
    replay.extend(batch(0, 10, 3))
    parts = saved.save()
    with pytest.raises(ValueError, match="num_envs=2"):
        IncrementalReplay(buffer(envs=2), tmp_path).load(parts)
    with pytest.raises(ValueError, match="empty"):
        saved.load(parts)
    with pytest.raises(ValueError, match="time steps 0 to 10 .* missing"):
        buffer().restore([], 10)
    with pytest.raises(IndexError, match="0 to 10 are stored"):
        replay.read(5, 11)


def test_a_smaller_buffer_loads_the_newest_steps(tmp_path: Path) -> None:
    replay = buffer()
    saved = IncrementalReplay(replay, tmp_path)
    for first in range(0, 40, 5):
        replay.extend(batch(first, 5, 1))
        parts = saved.save()
    small = buffer(steps=20)
    IncrementalReplay(small, tmp_path).load(parts)
    assert sorted(everything(small)["action"].flatten().tolist()) == list(range(20, 40))

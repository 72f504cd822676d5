"""Prioritized sampling: probabilities, importance weights, and priorities that survive."""

from __future__ import annotations

import importlib
import re
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.data.replay_buffers.scheduler import LinearScheduler
from torchrl.trainers import ReplayBufferTrainer

from alm_torchrl.data import IncrementalReplay, WindowReplayBuffer, make_replay_buffer
from tests.data.test_replay import check_windows, draw, episodes, steps

try:
    importlib.import_module("torchrl._torchrl")
    LOADS = True
except ImportError:
    LOADS = False
needs_extension = pytest.mark.skipif(
    not LOADS, reason=f"TorchRL's C++ extension does not load with torch {torch.__version__}"
)


def prioritized(capacity: int, **options: Any) -> WindowReplayBuffer:
    options = {"batch_size": 64, "prioritized": True, "seed": 0, **options}
    return make_replay_buffer(capacity, **options)


def set_errors(windows: TensorDict, errors: torch.Tensor) -> TensorDict:
    """Writes an error ``[B]`` to the first transitions, and a wrong one to the others."""
    later = torch.full(windows.shape, 1e6)
    later[:, 0] = errors
    return windows.set("td_error", later)


def first_ids(windows: TensorDict) -> torch.Tensor:
    return windows["observation"][:, 0, 0]


def chain(length: int, episodes_: int) -> tuple[TensorDict, torch.Tensor]:
    """Episodes of a chain with a reward at its end alone, and one error for each transition."""
    data = episodes([length] * episodes_)
    data["next", "reward"] = data["next", "done"].float()
    left = length - 1 - torch.arange(len(data)) % length
    return data, 0.8 ** left.float()  # the error of a value of zero decays with the distance


def learn_errors(buffer: WindowReplayBuffer, errors: torch.Tensor, batches: int = 60) -> None:
    for _ in range(batches):
        windows = buffer.sample()
        buffer.update_tensordict_priority(set_errors(windows, errors[first_ids(windows)]))


# ------------------------------------------------------------- the extension does not load


def test_a_pair_without_the_extension_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchrl._torchrl", None)
    with pytest.raises(RuntimeError, match=r"C\+\+ extension.*install .* torch 2\.14\.1") as caught:
        make_replay_buffer(10, batch_size=2, prioritized=True)
    assert "\n" not in str(caught.value)
    make_replay_buffer(10, batch_size=2)
    make_replay_buffer(10, batch_size=2, prioritized=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prioritized": {"gamma": 0.9}}, r"no \['gamma'\]; its options are \['alpha', 'beta'"),
        ({"prioritized": {"alpha": -1}}, "alpha of prioritized must be a number of at least 0"),
        ({"prioritized": {"beta": "1"}}, "beta of prioritized .* of at least 0, not '1'"),
        ({"prioritized": {"eps": 0}}, "eps of prioritized must be a number greater than 0, not 0"),
        ({"prioritized": True, "per_env": True, "num_envs": 2}, "per_env=True cannot be combined"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_replay_buffer(20, batch_size=2, **options)


def test_a_uniform_buffer_ignores_priorities():
    """TorchRL's trainer calls the method of every buffer that has it."""
    buffer = make_replay_buffer(20, batch_size=4)
    buffer.extend(episodes([10]))
    windows = buffer.sample()
    assert "priority_weight" not in windows
    assert "index" not in windows
    buffer.update_tensordict_priority(windows)


# ----------------------------------------------------------------------------- unbiasedness


@needs_extension
@pytest.mark.parametrize("num_envs", [1, 4])
def test_weights_make_a_mean_unbiased(num_envs):
    data, errors = chain(length=10, episodes_=40)
    buffer = prioritized(
        400, batch_size=100, num_envs=num_envs, prioritized={"alpha": 0.6, "beta": 1.0}
    )
    buffer.extend(data if num_envs == 1 else data.reshape(num_envs, -1))
    learn_errors(buffer, errors)
    windows = draw(buffer, 300)
    check_windows_of_chain(windows, length=10)
    values = windows["next", "reward"][:, 0, 0]
    weights = windows["priority_weight"][:, 0]
    uniform = data["next", "reward"].mean()

    # The ratio estimator, and the standard error of its linearization
    estimate = (weights * values).sum() / weights.sum()
    residuals = weights * (values - estimate)
    error = residuals.std() / weights.mean() / len(values) ** 0.5
    assert abs(estimate - uniform) < 3 * error
    assert error < 0.05 * uniform  # a bias of the size below would be found
    plain = values.mean()
    assert plain - uniform > 10 * values.std() / len(values) ** 0.5


def check_windows_of_chain(windows: TensorDict, length: int) -> None:
    ids, mask = windows["observation"].squeeze(-1), windows["validity_mask"]
    assert mask[:, 0].all()
    assert ((ids // length == ids[:, :1] // length) | ~mask).all()
    assert (ids[:, 1:] - ids[:, :-1] == mask[:, 1:].long()).all()


@needs_extension
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_probabilities_and_weights(alpha):
    errors = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    buffer = prioritized(5, batch_size=5, prioritized={"alpha": alpha, "beta": 0.7})
    buffer.extend(steps(torch.arange(5), torch.arange(5) == 1))
    learn_errors(buffer, errors)
    windows = draw(buffer, 4000)
    counts = torch.bincount(first_ids(windows), minlength=5) / len(windows)
    probabilities = errors**alpha / (errors**alpha).sum()
    assert torch.allclose(counts, probabilities, atol=4 * (0.25 / len(windows)) ** 0.5)
    weights = (errors.min() / errors) ** (alpha * 0.7)
    found = windows["priority_weight"]
    assert torch.allclose(found, weights[first_ids(windows)].unsqueeze(-1).expand_as(found))
    check_windows(windows, [deque(range(5))], {1})


# ----------------------------------------------------------------------- priorities are kept


@needs_extension
@pytest.mark.parametrize("shape", [(), (1,)])
def test_only_the_first_transition_gets_the_priority(shape):
    buffer = prioritized(8, batch_size=2, window_length=3)
    buffer.extend(episodes([8]))
    windows = buffer.sample()
    set_errors(windows, torch.tensor([5.0, 7.0]))
    windows["td_error"] = windows["td_error"].reshape(*windows.shape, *shape)
    buffer.update_tensordict_priority(windows)
    wanted = torch.ones(8)
    wanted[first_ids(windows)] = torch.tensor([5.0, 7.0])
    assert torch.allclose(priorities(buffer), wanted**0.6)


def priorities(buffer: WindowReplayBuffer) -> torch.Tensor:
    return torch.as_tensor(buffer.sampler.state_dict()["_sum_tree"][torch.arange(len(buffer))])


@needs_extension
@pytest.mark.parametrize("num_envs", [1, 3])
def test_new_transitions_get_the_largest_priority(num_envs):
    rows = 6
    buffer = prioritized(rows * num_envs, batch_size=6, num_envs=num_envs)
    ids = torch.arange(num_envs * 10).reshape(num_envs, 10)
    data = steps(ids, ids < 0) if num_envs > 1 else steps(ids[0], ids[0] < 0)
    buffer.extend(data[..., :5])
    windows = draw(buffer, 20)
    index = windows["index"][:1]
    for errors in (3.0, 0.5):
        buffer.update_tensordict_priority(set_errors(windows, torch.full((120,), errors)))
    buffer.extend(data[..., 5:8])  # rows 5, 0 and 1
    found = priorities(buffer).reshape(rows, num_envs)
    assert torch.allclose(found[[5, 0, 1]], torch.tensor(3.0) ** 0.6)  # the largest so far
    assert torch.allclose(found[2:5], torch.tensor(0.5) ** 0.6)
    assert index.shape == ((1, 3) if num_envs == 1 else (1, 3, 2))


@needs_extension
def test_emptying_forgets_the_priorities():
    buffer = prioritized(10, batch_size=4)
    buffer.extend(episodes([10]))
    learn_errors(buffer, torch.arange(10.0) + 5)
    buffer.empty()
    with pytest.raises(RuntimeError, match="empty replay buffer"):
        buffer.sample()
    buffer.extend(episodes([4]))
    assert torch.equal(priorities(buffer), torch.ones(4))
    assert (first_ids(buffer.sample()) < 4).all()


@needs_extension
def test_frame_stacks_and_memmap_can_be_prioritized(tmp_path):
    frames = torch.arange(12).reshape(12, 1, 1, 1).float()
    stack = torch.cat([frames[:-2], frames[1:-1]], 1)
    following = torch.cat([frames[1:-1], frames[2:]], 1)
    data = steps(torch.arange(10), torch.arange(10) == 9)
    data["pixels"], data["next", "pixels"] = stack, following
    buffer = prioritized(
        10, batch_size=4, frame_stacks={"pixels": 2}, storage="memmap", scratch_dir=tmp_path
    )
    buffer.extend(data)
    learn_errors(buffer, torch.arange(10.0) + 1)
    windows = buffer.sample()
    assert torch.equal(windows["pixels"], stack[windows["observation"].squeeze(-1)])
    assert torch.allclose(priorities(buffer), (torch.arange(10.0) + 1) ** 0.6)


# ---------------------------------------------------------------------------- save and load


def trained(
    num_envs: int, written: int, total: int | None = None
) -> tuple[WindowReplayBuffer, TensorDict]:
    """A buffer with random priorities, and a history that ends 7 steps after ``total``."""
    ids = torch.arange(num_envs).unsqueeze(-1) * 1000 + torch.arange((total or written) + 7)
    history = steps(ids, ids % 1000 % 6 == 3)
    buffer = prioritized(20 * num_envs, batch_size=10, num_envs=num_envs)
    for part in history[:, :written].split(8, dim=1):
        buffer.extend(part)
        windows = buffer.sample()
        buffer.update_tensordict_priority(set_errors(windows, torch.rand(len(windows)) * 3))
    return buffer, history


def continues_equally(
    one: WindowReplayBuffer, other: WindowReplayBuffer, history: TensorDict
) -> None:
    """Updates, samples and extends both; raises if anything differs."""
    for part in (None, history[:, -7:-3], history[:, -3:]):
        if part is not None:
            one.extend(part)
            other.extend(part)
        assert torch.equal(priorities(one), priorities(other))
        windows, same = one.sample(), other.sample()
        assert (windows == same).all()
        for buffer, found in ((one, windows), (other, same)):
            buffer.update_tensordict_priority(set_errors(found, first_ids(found).float() / 9))


@needs_extension
@pytest.mark.parametrize("written", [12, 20, 33])
@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize("by", ["dumps", "state_dict"])
def test_a_loaded_buffer_continues_equally(by, num_envs, written, tmp_path):
    buffer, history = trained(num_envs, written)
    buffer.truncate_open_episodes()  # as loading does
    restored, _ = trained(num_envs, 9)  # loading replaces other priorities
    if by == "dumps":
        buffer.dumps(tmp_path / "replay")
        restored = prioritized(20 * num_envs, batch_size=10, num_envs=num_envs)
        for _ in range(2):
            restored.loads(tmp_path / "replay")
    else:
        restored.load_state_dict(buffer.state_dict())
    continues_equally(buffer, restored, history)


@needs_extension
@pytest.mark.parametrize("written", [12, 20, 33])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_incremental_saves_keep_the_priorities(num_envs, written, tmp_path):
    buffer, history = trained(num_envs, 8, total=written)
    saved = IncrementalReplay(buffer, tmp_path)
    saved.save()
    for part in history[:, 8 : written - 1].split(9, dim=1):
        buffer.extend(part)
    saved.save()
    buffer.extend(history[:, written - 1 : written])
    saved.save()
    windows = buffer.sample()
    buffer.update_tensordict_priority(set_errors(windows, torch.full((10,), 9.0)))
    chunks = saved.save()  # no new transitions, but new priorities
    saved.remove_all_but(chunks)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(c.file for c in chunks)

    restored = prioritized(20 * num_envs, batch_size=10, num_envs=num_envs)
    resumed = IncrementalReplay(restored, tmp_path)
    resumed.load(chunks)
    assert chunks[:-1] == resumed.chunks
    buffer.truncate_open_episodes()
    restored._rng.set_state(buffer._rng.get_state())  # checkpoints save the generators elsewhere
    continues_equally(buffer, restored, history)
    resumed.remove_all_but(resumed.save())
    assert chunks[-1].file not in {path.name for path in tmp_path.iterdir()}


@needs_extension
def test_incremental_saves_of_other_buffers(tmp_path):
    buffer, _ = trained(1, 33)
    chunks = IncrementalReplay(buffer, tmp_path).save()
    small = prioritized(7, batch_size=7)
    IncrementalReplay(small, tmp_path).load(chunks)
    wanted = dict(zip(buffer[:]["observation"].flatten().tolist(), priorities(buffer), strict=True))
    for id_, priority in zip(
        small[:]["observation"].flatten().tolist(), priorities(small), strict=True
    ):
        assert priority == wanted[id_]
    uniform = make_replay_buffer(20, batch_size=7)
    IncrementalReplay(uniform, tmp_path).load(chunks)
    assert torch.equal(uniform[:]["observation"], buffer[:]["observation"])
    again = prioritized(20, batch_size=7)
    IncrementalReplay(again, tmp_path).load(chunks[:-1])  # saved by a uniform buffer
    assert torch.equal(priorities(again), torch.ones(20))


@needs_extension
def test_a_saved_uniform_buffer_is_refused(tmp_path):
    uniform = make_replay_buffer(20, batch_size=2)
    uniform.extend(episodes([10]))
    uniform.dumps(tmp_path / "replay")
    buffer = prioritized(20, batch_size=2)
    with pytest.raises(ValueError, match="has no priorities: load it into a buffer without"):
        buffer.loads(tmp_path / "replay")
    with pytest.raises(ValueError, match="has no priorities: load it into a buffer without"):
        buffer.load_state_dict(uniform.state_dict())


# ------------------------------------------------------------------------------------ errors


@needs_extension
@pytest.mark.parametrize("error", [-1.0, float("nan"), float("inf")])
def test_invalid_errors_are_refused(error):
    buffer = prioritized(10, batch_size=4)
    buffer.extend(episodes([10]))
    windows = buffer.sample()
    before = priorities(buffer)
    with pytest.raises(ValueError, match="'td_error' must be finite and not negative"):
        buffer.update_tensordict_priority(set_errors(windows, torch.full((4,), error)))
    with pytest.raises(KeyError, match="no entry 'td_error': call the loss"):
        buffer.update_tensordict_priority(windows.exclude("td_error"))
    assert torch.equal(priorities(buffer), before)


@needs_extension
def test_torchrls_scheduler_and_trainer_work():
    buffer = prioritized(10, batch_size=4, prioritized={"beta": 0.4})
    buffer.extend(episodes([10]))
    scheduler = LinearScheduler(buffer, "beta", final_value=1.0, num_steps=2)
    for expected in (0.7, 1.0):
        scheduler.step()
        assert buffer.sampler.beta == pytest.approx(expected)
    hook = ReplayBufferTrainer(buffer, batch_size=4)
    windows = hook.sample(None)
    hook.update_priority(set_errors(windows, torch.full((4,), 6.0)))
    assert torch.allclose(priorities(buffer)[first_ids(windows)], torch.tensor(6.0) ** 0.6)


@needs_extension
def test_samples_depend_only_on_the_seed(tmp_path: Path):
    def sample(seed: int) -> torch.Tensor:
        buffer = prioritized(100, batch_size=50, seed=seed)
        buffer.extend(episodes([100]))
        torch.manual_seed(torch.randint(1000, ()))
        return first_ids(draw(buffer, 3))

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@needs_extension
def test_the_example_of_the_documentation_runs():
    """The page cannot run it everywhere."""
    page = Path(__file__).parents[2] / "docs" / "replay.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 2
    names: dict[str, Any] = {}
    for example in examples:
        exec(example, names)
    replay, windows = names["replay"], names["windows"]
    rewards = windows["next", "reward"][:, 0].abs().flatten()
    found = priorities(replay)[windows["index"][:, 0]]
    assert torch.allclose(found, (rewards + 1e-8) ** 0.6)

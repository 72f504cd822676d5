"""Environment step, then update, in that order and at any ratio."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from alm_torchrl.modules import NoiseSchedule
from alm_torchrl.training import ExperienceStream


class Recorder:
    """Replaces collector, replay buffer and learner, and records the order of events."""

    def __init__(self, frames_per_batch: int = 1, ends: tuple[int, ...] = ()) -> None:
        self.frames_per_batch, self.ends = frames_per_batch, ends
        self.events: list[str] = []
        self.noise = NoiseSchedule(start=1.0, end=0.0, num_steps=10)

    def __iter__(self):
        frame = 0
        while True:
            self.events.append("step")
            done = torch.tensor([[frame + i in self.ends] for i in range(self.frames_per_batch)])
            reward = torch.arange(frame, frame + self.frames_per_batch).float().unsqueeze(-1)
            frame += self.frames_per_batch
            yield TensorDict(
                next=TensorDict(done=done, episode_reward=reward),
                batch_size=[self.frames_per_batch],
            ).auto_batch_size_(1)

    def extend(self, data) -> None:
        self.events.append("store")

    def sample(self) -> str:
        self.events.append("sample")
        return "batch"

    def run(self, **options) -> ExperienceStream:
        experience = ExperienceStream(self, self, noise=self.noise, **options)
        for batch in experience:
            assert batch == "batch"
            self.events.append(f"update at {float(self.noise.scale):.1f}")
        return experience


def test_every_step_is_stored_before_the_update_that_follows_it() -> None:
    recorder = Recorder()
    experience = recorder.run(total_steps=3, warmup_steps=2)
    warmup = ["step", "store"] * 2
    assert recorder.events == warmup + [
        *("step", "store", "sample", "update at 1.0"),
        *("step", "store", "sample", "update at 0.9"),
        *("step", "store", "sample", "update at 0.8"),
    ]
    assert (experience.steps, experience.frames) == (3, 5)


def test_warmup_updates_precede_the_first_action() -> None:
    recorder = Recorder()
    recorder.publish = lambda update: recorder.events.append(f"publish {update}")
    experience = recorder.run(
        total_steps=2, warmup_steps=2, warmup_updates=3, updates_per_step=2.0, policy=recorder
    )
    assert recorder.events == [
        *("step", "store") * 2,
        *("sample", "update at 1.0") * 3,
        *("publish 3", "step", "store", *("sample", "update at 1.0") * 2),
        *("publish 5", "step", "store", *("sample", "update at 0.9") * 2),
    ]
    assert len(experience) == experience.updates == 7


def test_on_batch_receives_every_stored_batch() -> None:
    recorder = Recorder(frames_per_batch=2)
    recorder.run(
        total_steps=2,
        warmup_steps=2,
        on_batch=lambda data: recorder.events.append(f"observe {len(data)}"),
    )
    assert recorder.events[:4] == ["step", "store", "observe 2", "step"]
    assert recorder.events.count("observe 2") == recorder.events.count("store") == 2


@pytest.mark.parametrize(
    ("ratio", "frames", "updates"),
    [(2.0, 1, [2, 2, 2, 2]), (0.5, 1, [0, 1, 0, 1]), (1.5, 1, [1, 2, 1, 2]), (1.0, 2, [2, 2])],
)
def test_updates_per_step(ratio: float, frames: int, updates: list[int]) -> None:
    recorder = Recorder(frames)
    experience = recorder.run(total_steps=4, warmup_steps=2, updates_per_step=ratio)
    text = " ".join(recorder.events).split("step store")[1:]
    counted = [part.count("sample") for part in text]
    assert counted == [0] * (2 // frames) + updates
    assert len(experience) == sum(updates)


def test_the_length_is_the_number_of_batches() -> None:
    recorder = Recorder()
    recorder.run(total_steps=7, warmup_steps=0, updates_per_step=0.4)
    assert recorder.events.count("sample") == 2
    assert len(ExperienceStream(recorder, recorder, total_steps=7, updates_per_step=0.4)) == 2


def test_returns_of_finished_episodes_are_kept() -> None:
    experience = Recorder(ends=(1, 4)).run(total_steps=5, warmup_steps=1)
    assert list(experience.episode_returns) == [1.0, 4.0]


@pytest.mark.parametrize(
    "options",
    [
        {"total_steps": 0},
        {"total_steps": 5, "warmup_steps": -1},
        {"total_steps": 5, "updates_per_step": 0.0},
        {"total_steps": 5, "updates_per_step": 0.1},
        {"total_steps": 5, "updates_per_step": 0.1, "warmup_updates": 1},
        {"total_steps": 5, "warmup_updates": -1},
        {"total_steps": 5, "warmup_updates": 1, "warmup_steps": 0},
    ],
)
def test_numbers_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"expected total_steps|give no update|warmup_updates="):
        ExperienceStream(Recorder(), Recorder(), **options)

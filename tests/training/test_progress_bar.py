"""What a run shows of its progress, on a terminal and in a file."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
import torch

from alm_torchrl.training.callbacks import ProgressBar


class Screen(io.StringIO):
    """Standard error as a terminal or a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def lines(self) -> list[str]:
        return re.split(r"[\r\n]+", self.getvalue())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still unless it is moved."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    return clock


def start(monkeypatch, terminal: bool, **experience) -> tuple[Screen, ProgressBar, SimpleNamespace]:
    screen = Screen(terminal)
    monkeypatch.setattr("sys.stderr", screen)
    counters = {"frames": 0, "warmup_steps": 10, "updates": 0, "warmup_updates": 0}
    counters |= {"steps": 0, "total_steps": 200_000, "on_collected": None} | experience
    module = SimpleNamespace(
        experience=SimpleNamespace(**counters), compiles=False, trainer=SimpleNamespace()
    )
    bar = ProgressBar()
    bar.on_train_start(module.trainer, module)
    return screen, bar, module


def learn(bar: ProgressBar, module: SimpleNamespace, steps: int) -> None:
    module.experience.steps += steps
    module.experience.frames += steps
    module.experience.updates += steps
    module.experience.on_collected()
    bar.on_train_batch_end(module.trainer, module)


def test_a_terminal_shows_the_phase_and_the_return_in_80_columns(monkeypatch, clock) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    screen, bar, module = start(monkeypatch, True, warmup_updates=5)
    assert screen.lines()[-1].startswith("warm-up   0%|")
    module.experience.frames = 7
    clock.now += 1
    module.experience.on_collected()
    assert re.match(r"warm-up +70%\|.* 7/10 \[00:01<00:00\]", screen.lines()[-1])
    module.experience.frames = 10
    module.experience.on_collected()
    assert screen.lines()[-1].startswith("warm-up updates")
    module.experience.updates, module.compiles = 5, True
    module.experience.on_collected()
    assert screen.lines()[-1].startswith("compiling")
    learn(bar, module, 1)
    assert screen.lines()[-1].startswith("training")
    module.experience.steps = 123_456
    bar.on_validation_batch_end(module.trainer, module, torch.full((1, 5), -12345.0))
    clock.now += 1
    learn(bar, module, 1)
    last = screen.lines()[-1]
    assert last.startswith("return -12345 training")
    assert len(last) == 80
    bar.teardown(module.trainer, module, stage="fit")
    assert screen.getvalue().endswith("\n")
    assert max(map(len, screen.lines())) <= 80


def test_the_time_left_after_a_resume_counts_the_steps_of_this_session(monkeypatch, clock) -> None:
    screen, bar, module = start(monkeypatch, True, frames=5010, steps=5000, total_steps=6000)
    for _ in range(10):
        learn(bar, module, 1)
        clock.now += 1
    learn(bar, module, 1)
    assert re.search(r"501\d/6000 \[00:\d\d<1[456]:\d\d\]", screen.lines()[-1])  # 1 step per second
    screen, bar, module = start(monkeypatch, False, frames=5010, steps=5000, total_steps=6000)
    clock.now += 500  # until the first update
    for _ in range(11):
        learn(bar, module, 1)
        clock.now += 1
    bar.on_validation_batch_end(module.trainer, module, torch.tensor([[7.0, 9.0]]))
    assert screen.getvalue() == "step 5011/6000: return 8, 0.9 steps/s, 18:07 left\n"


def test_a_file_gets_one_plain_line_for_each_evaluation(monkeypatch, clock) -> None:
    screen, bar, module = start(monkeypatch, False)
    module.experience.frames = 10
    bar.on_validation_batch_end(module.trainer, module, torch.ones(1, 1))
    for returns in (2.0, 3.0):
        learn(bar, module, 50)
        clock.now += 10
        bar.on_validation_batch_end(module.trainer, module, torch.full((2, 1), returns))
    bar.teardown(module.trainer, module, "fit")
    assert screen.getvalue().splitlines() == [
        "step 0/200000: return 1",
        "step 50/200000: return 2",
        "step 100/200000: return 3, 2.5 steps/s, 22:12:40 left",
    ]
    assert "\r" not in screen.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_other_processes_show_nothing(monkeypatch, clock, terminal: bool) -> None:
    screen, bar, module = start(monkeypatch, terminal)
    shown = screen.getvalue()
    bar.disable()
    learn(bar, module, 20)
    bar.on_validation_batch_end(module.trainer, module, torch.ones(1, 1))
    assert screen.getvalue() == shown

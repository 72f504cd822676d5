"""Measurements that need one long run: memory, and the training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from alm_torchrl.data import make_replay_buffer
from alm_torchrl.training import ExperienceStream, make_trainer
from benchmarks.measure import peak_memory, synchronize
from benchmarks.workloads import QUICKSTART, TASKS, ALMWork, windows
from recipes.build import make_module

CONFIG = Path(__file__).resolve().parents[1] / "recipes" / "conf"
#: Updates before memory is measured, while the allocator warms up.
SETTLING = 300
#: Tolerated growth in bytes: the replay buffer fills, and the allocator rounds.
TOLERATED = 16 * 2**20


def memory(task: str, device: torch.device, updates: int) -> tuple[str, dict[str, Any]]:
    """Measures memory during updates, each with a write to the replay buffer and a sample from it.

    Args:
        task: task whose sizes are used.
        device: device of the update; on a CPU the memory of the process is measured.
        updates: number of updates after the warm-up, with the quickstart's sizes.

    Returns:
        A line to print, and a record with the entry ``"leaks"``.
    """
    work = ALMWork(TASKS[task], device, QUICKSTART, captured=device.type == "cuda")
    replay = make_replay_buffer(
        10_000, batch_size=QUICKSTART.batch, window_length=QUICKSTART.horizon, device=device
    )
    replay.extend(windows(TASKS[task], (2000,), torch.device("cpu")))
    transition = windows(TASKS[task], (1,), torch.device("cpu"))
    held: dict[int, int] = {}
    for done in range(-SETTLING, updates + 1):
        if done >= 0 and done % max(1, updates // 20) == 0:
            held[done] = _held(device)
        replay.extend(transition)
        work.update(replay.sample())
    growth, peak = max(held.values()) - held[0], peak_memory(device)
    line = (
        f"{held[0] / 2**20:.0f} MiB after {SETTLING} updates; at most {growth / 2**20:.1f} MiB "
        f"more in the next {updates}; peak {peak / 2**20:.0f} MiB"
    )
    leaks = growth > TOLERATED
    return line, {"held": held, "growth": growth, "peak_memory": peak, "leaks": leaks}


def _held(device: torch.device) -> int:
    """Returns the bytes in use."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def recipe_config(task: str, device: torch.device, steps: int, options: list[str]) -> Any:
    """Composes the recipe's options for a run with one evaluation at its end."""
    fixed = [
        f"task={task}", f"training.total_steps={steps}", f"evaluation.every={steps}",
        "evaluation.episodes=1", "training.warmup_steps=1000", "run.folder=unused",
        f"run.log_every={max(1, steps // 5)}",
        f"run.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}",
    ]  # fmt: skip
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        return OmegaConf.to_object(compose("mujoco", fixed + options))


def loop(
    task: str, device: torch.device, steps: int, options: list[str]
) -> tuple[str, dict[str, Any]]:
    """Measures the speed of a training run without evaluations, and the share of collection.

    Args:
        task: name of the recipe's task.
        device: device of the training.
        steps: environment steps; the first tenth is not timed.
        options: options of the recipe, as on its command line.

    Returns:
        A line to print, and a record.
    """
    config = recipe_config(task, device, steps, options)
    with TemporaryDirectory() as folder:
        trainer = make_trainer(
            folder,
            seed=0,
            title="",
            eval_every=steps,
            accelerator=config.run.accelerator,
            tensorboard=False,
        )
        trainer.limit_val_batches = 0
        module = make_module(config, trainer.strategy.root_device)
        clock = _Clock(module.experience, start=config.training.warmup_steps + steps // 10)
        with clock.watching():
            trainer.fit(module)
    synchronize()
    seconds = time.perf_counter() - clock.started
    rate = (steps - steps // 10) / seconds
    share = clock.collecting / seconds
    line = f"{rate:.1f} environment steps/s; acting and environment take {share:.0%} of the time"
    return line, {"steps_per_second": rate, "share_collecting": share, "options": options}


class _Clock:
    """Measures the time that a run waits for its collector, starting at a given frame."""

    def __init__(self, experience: ExperienceStream, start: int) -> None:
        self.experience = experience
        self.start = start
        self.started = time.perf_counter()
        self.collecting = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Replaces the collector of the experience by a timed iterator."""
        collector = self.experience.collector
        self.experience.collector = self._timed(iter(collector))
        try:
            yield
        finally:
            collector.shutdown()

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            if self.experience.frames == self.start:
                synchronize()
                self.started, self.collecting = time.perf_counter(), 0.0
            before = time.perf_counter()
            batch = next(batches)
            self.collecting += time.perf_counter() - before
            yield batch

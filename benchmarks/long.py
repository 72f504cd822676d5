"""Measurements that take one long run rather than turns: memory, and the whole training loop."""

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
#: Updates in which the allocator finds what it needs.
SETTLING = 300
#: Growth after them that is no leak, in bytes: the replay buffer fills, the allocator rounds.
TOLERATED = 16 * 2**20


def memory(task: str, device: torch.device, updates: int) -> tuple[str, dict[str, Any]]:
    """Memory over many updates, each after a write into the replay buffer and a draw from it.

    Args:
        task: whose sizes are taken.
        device: where; on a CPU the memory is the process's.
        updates: how many after the first few hundred, at the quickstart's sizes.

    Returns:
        A line to print, and the record with ``"leaks"``.
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
    """Bytes in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def recipe_config(task: str, device: torch.device, steps: int, options: list[str]) -> Any:
    """The recipe's configuration for a run of so many steps, with one evaluation at its end."""
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
    """A training run of the recipe without evaluations: its rate, and what collecting takes of it.

    Args:
        task: the recipe's task.
        device: where.
        steps: environment steps, a tenth of which pass before the clock is started.
        options: of the recipe, as on its command line.

    Returns:
        A line to print, and the record.
    """
    config = recipe_config(task, device, steps, options)
    with TemporaryDirectory() as folder:
        trainer = make_trainer(
            folder,
            seed=0,
            title="",
            eval_every=steps,
            accelerator=config.run.accelerator,
            precision=config.run.precision,
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
    """Measures how long a run waits for its collector, from a given frame on."""

    def __init__(self, experience: ExperienceStream, start: int) -> None:
        self.experience = experience
        self.start = start
        self.started = time.perf_counter()
        self.collecting = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Has the experience iterate this clock in place of its collector."""
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

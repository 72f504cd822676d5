"""Time of checkpoints with a full replay buffer."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import torch

from alm_torchrl.training import make_trainer
from alm_torchrl.training.checkpoints import Checkpoints
from benchmarks.long import recipe_config
from benchmarks.measure import synchronize
from recipes.build import make_module

#: Transitions written to the buffer at a time.
CHUNK = 10_000


def saving(
    task: str, device: torch.device, transitions: int, steps: int, interval: int = 5000
) -> tuple[str, dict[str, Any]]:
    """Trains with the paper's sizes, fills the replay buffer, and times several checkpoints.

    Args:
        task: name of the recipe's task.
        device: device of the training.
        transitions: size of the full replay buffer.
        steps: environment steps that are timed for comparison.
        interval: environment steps between checkpoints; 5,000 in the preset ``paper``.

    Returns:
        A line to print, and a record.
    """
    options = ["preset=paper", f"training.replay_capacity={transitions}", "run.compile=never"]
    config = recipe_config(task, device, steps, options)
    with TemporaryDirectory() as folder:
        trainer = make_trainer(
            folder,
            seed=0,
            title="",
            eval_every=steps,
            checkpoint_every=10 * steps,
            accelerator=config.run.accelerator,
            tensorboard=False,
        )
        trainer.limit_val_batches = 0
        ticks = _Ticks()
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(ticks)
        module = make_module(config, trainer.strategy.root_device)
        trainer.fit(module)
        replay, experience = module.experience.replay, module.experience
        collected = replay.storage.get(slice(None))
        again = torch.arange(CHUNK, device=device) % len(replay)
        rows = collected[again]
        rows["next", "done"][again == len(replay) - 1] = True
        for _ in range(transitions // CHUNK):
            replay.extend(rows)
        saver = next(c for c in callbacks if isinstance(c, Checkpoints))
        seconds = []
        for _ in range(4):
            experience.updates += interval
            start = time.perf_counter()
            saver.save(trainer, module)
            seconds.append(time.perf_counter() - start)
            replay.extend(rows[:interval])
        sizes = sum(path.stat().st_size for path in Path(folder, "checkpoints").rglob("*.pt"))
    whole, *later = seconds
    share = median(later) / (median(later) + interval * ticks.step)
    line = (
        f"{len(replay)} transitions ({sizes / 2**20:.0f} MiB): all in {whole:.1f} s; those of "
        f"{interval} steps in {median(later):.2f} s, {share:.2%} of their training time "
        f"({ticks.step * 1e3:.0f} ms each)"
    )
    record = {"seconds": seconds, "step": ticks.step, "interval": interval, "share": share}
    return line, record


class _Ticks(L.Callback):
    """Measures the median time of a training step, without the first quarter."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Records the time."""
        synchronize()
        self.times.append(time.perf_counter())

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        late = self.times[len(self.times) // 4 :]
        return median(b - a for a, b in pairwise(late))

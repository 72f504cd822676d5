"""What a training run shows in the terminal."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

__all__ = ["ProgressBar", "silence_library_warnings"]


class ProgressBar(TQDMProgressBar):
    """One line: progress, time left, environment steps per second and the newest return.

    Args:
        refresh_rate: updates between two refreshes.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._mark = (0, 0.0)
        self._rate = 0.0

    def init_train_tqdm(self) -> Tqdm:
        """The bar of the training, without "Epoch": there is but one."""
        bar = super().init_train_tqdm()
        progress = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}"
        bar.bar_format = progress + " [{elapsed}<{remaining}{postfix}]"
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        """No bar: an evaluation takes seconds."""
        return Tqdm(disable=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Sets up the bar, also for a run that goes on, for which no epoch starts."""
        super().on_train_start(trainer, pl_module)
        self.train_progress_bar.reset(len(pl_module.experience))
        self.train_progress_bar.set_description("learning")

    def on_train_epoch_start(self, *_: Any) -> None:
        """Leaves the bar as it is."""

    def get_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        """Steps per second since the last refresh but one, and the return."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        frames, now = pl_module.experience.frames, time.monotonic()
        if frames > self._mark[0]:
            if self._mark[1]:
                self._rate = (frames - self._mark[0]) / (now - self._mark[1])
            self._mark = (frames, now)
        return {"steps/s": f"{self._rate:.1f}", **metrics}


def silence_library_warnings() -> None:
    """Silences what the libraries say about themselves, and leaves their warnings about a run."""
    for name in ("lightning.pytorch", "lightning.fabric", "torchrl"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Where the reason is told before the processes of a run are killed because one has ended.
    launcher = "lightning.fabric.strategies.launchers.subprocess_script"
    logging.getLogger(launcher).setLevel(logging.INFO)
    for message in (
        ".*treespec.*is deprecated.*",  # Lightning on torch 2.13
        ".*inline_inbuilt_nn_modules is deprecated.*",  # tensordict on torch 2.13
        ".*does not have many workers.*",  # the experience is iterated in this process
        ".*in eval mode at the start of training.*",  # no layer here differs in eval mode
    ):
        warnings.filterwarnings("ignore", message=message)

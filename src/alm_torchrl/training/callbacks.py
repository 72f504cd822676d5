"""Callbacks of a run: evaluation schedule, saved agents, signals, progress bar, video."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from lightning.pytorch.callbacks import ProgressBar as ProgressBarBase
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from tqdm import tqdm

from alm_torchrl.envs.failures import failing_as
from alm_torchrl.envs.video import write_video
from alm_torchrl.training.checkpoints import AfterUpdate
from alm_torchrl.training.experience import ExperienceStream
from alm_torchrl.training.module import ALMModule


class EvaluationSchedule(L.Callback):
    """Evaluates after the warm-up updates, and then every ``every`` updates."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: ALMModule, batch: Any, batch_idx: int
    ) -> None:
        """Schedules an evaluation after this update if it is due."""
        updates = batch_idx + 1 - pl_module.experience.warmup_updates
        due = updates >= 0 and updates % self.every == 0
        # Lightning evaluates if the number of updates is a multiple of this.
        trainer.val_check_batch = 1 if due else batch_idx + 2


class SaveAgent(L.Callback):
    """Saves the newest agent as ``agent_last.pt``, and the best as ``agent_best.pt``.

    Args:
        folder: folder of the files; see :meth:`alm_torchrl.agent.ALMAgent.load`.
        seed_index: position of this seed among the seeds trained together.
    """

    def __init__(self, folder: str | Path, *, seed_index: int = 0) -> None:
        self.folder = Path(folder)
        self.seed_index = seed_index
        self.best = float("-inf")

    @property
    def state_key(self) -> str:
        """Key of this seed in a checkpoint."""
        return self._generate_state_key(seed_index=self.seed_index)

    def state_dict(self) -> dict[str, Any]:
        """Returns the best return so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best return."""
        self.best = state_dict["best"]

    @rank_zero_only
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: ALMModule, outputs: Tensor, *_: Any
    ) -> None:
        """Saves the evaluated agent."""
        agent = pl_module.evaluated_agents[self.seed_index]
        mean = outputs[self.seed_index].mean().item()
        agent.save(self.folder / "agent_last.pt")
        if mean > self.best:
            self.best = mean
            agent.save(self.folder / "agent_best.pt")

    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, pl_module: ALMModule, *_: Any) -> None:
        """Saves the agent of an interrupted run that has made an update."""
        if pl_module.restored and pl_module.experience.updates:
            pl_module.evaluated_agents[self.seed_index].save(self.folder / "agent_last.pt")


class StopOnSignal(AfterUpdate):
    """Ends a run on Ctrl-C or SIGTERM after the current update, with a checkpoint.

    Before the first update, a run of one process ends after the current collection batch, without
    a checkpoint. A second signal aborts without a checkpoint. Several processes end after the same
    update: they communicate before every update on a CPU, and every ``log_every`` updates on a GPU,
    because communication waits for the device.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Installs the handlers."""
        experience = pl_module.experience
        experience.stopping = False
        # Lightning's handler of SIGTERM would make processes wait for each other in an update.
        if threading.current_thread() is threading.main_thread():  # others cannot install any
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, partial(self._request, experience))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: ALMModule, batch: Any, batch_idx: int
    ) -> None:
        """Lets all processes agree on whether this update is the last."""
        due = pl_module.device.type == "cpu" or batch_idx % pl_module.log_every == 0
        if trainer.world_size > 1 and due:
            signaled = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
            pl_module.experience.stopping = signaled

    def after_update(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Ends the run if a signal arrived."""
        if pl_module.experience.stopping:
            raise KeyboardInterrupt

    def teardown(self, *_: Any, **__: Any) -> None:
        """Restores the previous handlers."""
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    on_exception = teardown

    def _request(self, experience: ExperienceStream, number: int, _: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if not torch.distributed.is_initialized():
            experience.stopping = True


class ProgressBar(ProgressBarBase):
    """Shows return, steps and time left: as a bar on a terminal, or one line per evaluation."""

    _FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._on_terminal = sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._score = ""
        self._begin: tuple[int, float] | None = None  # step and time

    def enable(self) -> None:
        """Shows the progress."""
        self._enabled = True

    def disable(self) -> None:
        """Hides the progress; Lightning calls it in all processes but the first."""
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Starts the bar with the warm-up, during which there are no batches."""
        self._show(pl_module)
        pl_module.experience.on_collected = lambda: self._show(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: ALMModule, *_: Any) -> None:
        """Moves the bar; the clock starts after the first update, which may compile."""
        experience = pl_module.experience
        if self._begin is None and experience.updates > experience.warmup_updates:
            self._begin = experience.steps, time.monotonic()
        self._show(pl_module)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: ALMModule, outputs: Tensor, *_: Any
    ) -> None:
        """Shows the new return."""
        self._score = f"return {outputs.mean():.0f}"
        self._show(pl_module)
        if self._enabled and not self._on_terminal:
            step, total = pl_module.experience.steps, pl_module.experience.total_steps
            first, start = self._begin or (step, 0.0)
            rate = (step - first) / (time.monotonic() - start)
            left = tqdm.format_interval((total - step) / (rate or 1))
            times = f", {rate:.1f} steps/s, {left} left" if rate else ""
            sys.stderr.write(f"step {step}/{total}: {self._score}{times}\n")

    def on_exception(self, *_: Any, **__: Any) -> None:
        """Ends the line of the bar."""
        if self._bar is not None:
            self._bar.close()

    teardown = on_exception

    def _show(self, module: ALMModule) -> None:
        """Updates the bar; each phase of a run has its own bar and clock."""
        if not (self._enabled and self._on_terminal):
            return
        experience = module.experience
        phase, done, total = "training", experience.steps, experience.total_steps
        if experience.frames < experience.warmup_steps:
            phase, done, total = "warm-up", experience.frames, experience.warmup_steps
        elif experience.updates < experience.warmup_updates:
            phase, done, total = "warm-up updates", experience.updates, experience.warmup_updates
        elif self._begin is None and module.compiles:
            phase = "compiling"
        label = f"{self._score} {phase}".strip()
        if self._bar is None or not self._bar.desc.endswith(phase):
            self.teardown()
            columns = min(80, shutil.get_terminal_size().columns)
            look = {"bar_format": self._FORMAT, "ncols": columns, "leave": phase == "training"}
            self._bar = tqdm(desc=label, initial=done, total=total, smoothing=0, **look)
        self._bar.desc = label
        self._bar.update(done - self._bar.n)


class Video(L.Callback):
    """Records the trained policy of the first seed as ``video.gif`` when training ends.

    Args:
        folder: folder of the file.
        env: an environment with uint8 ``"pixels"``: frames ``[H, W, 3]``, as from
            ``make_env(..., from_pixels=True)``, or stacks ``[3 * n, H, W]``, as from
            ``make_env(..., pixels=84)``. Without ``"pixels"``, nothing is recorded.
        steps: largest number of steps to record of the episode.
    """

    def __init__(self, folder: str | Path, env: EnvBase, *, steps: int = 200) -> None:
        self.folder = Path(folder)
        self.env = env
        self.steps = steps

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Plays the episode and writes the file."""
        if "pixels" not in self.env.observation_spec:
            return
        failed = failing_as("the environment of the video failed")
        with failed, torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            rollout = self.env.rollout(
                self.steps, pl_module.evaluated_agents[0].policy(), auto_cast_to_device=True
            )
        write_video(rollout["pixels"][::2], self.folder / "video.gif", fps=10)

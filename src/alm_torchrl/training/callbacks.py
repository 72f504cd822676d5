"""Callbacks of a run: evaluation schedule, saved agents, signals, progress bar, video."""

from __future__ import annotations

import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl.envs.failures import failing_as
from alm_torchrl.training.checkpoints import AfterUpdate
from alm_torchrl.training.experience import ExperienceStream
from alm_torchrl.training.module import ALMModule


class EvaluationSchedule(L.Callback):
    """Evaluates after the warm-up's updates and then every ``every`` updates."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: ALMModule, batch: Any, batch_idx: int
    ) -> None:
        """Schedules an evaluation after this update if it is due."""
        updates = batch_idx + 1 - pl_module.experience.warmup_updates
        due = updates >= 0 and updates % self.every == 0
        # Lightning evaluates when the number of updates is a multiple of this.
        trainer.val_check_batch = 1 if due else batch_idx + 2


class SaveAgent(L.Callback):
    """Saves the agent as ``agent_last.pt``, and the one of the best return as ``agent_best.pt``.

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
        """Saves the agent of an interrupted run after its first update."""
        if pl_module.restored and pl_module.experience.updates:
            pl_module.evaluated_agents[self.seed_index].save(self.folder / "agent_last.pt")


class StopOnSignal(AfterUpdate):
    """Ends a run on Ctrl-C or SIGTERM after the current update, with a checkpoint.

    Before the first update, a run of one process ends after the current collection batch, without
    a checkpoint. A second signal aborts without a checkpoint. Several processes end after the same
    update: they agree before every update on a CPU, and every ``log_every`` updates on a GPU,
    because agreeing waits for the device.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Installs the handlers, which only the main thread can do."""
        experience = pl_module.experience
        experience.stopping = False
        # Lightning's handler of SIGTERM makes processes wait for each other during an update.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, partial(self._request, experience))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: ALMModule, batch: Any, batch_idx: int
    ) -> None:
        """Lets all processes agree whether this update is the last."""
        asks = pl_module.device.type == "cpu" or batch_idx % pl_module.log_every == 0
        if trainer.world_size > 1 and asks:
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

    def on_exception(self, *_: Any, **__: Any) -> None:
        """Restores the previous handlers."""
        self.teardown()

    def _request(self, experience: ExperienceStream, number: int, _: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if not torch.distributed.is_initialized():
            experience.stopping = True


class ProgressBar(TQDMProgressBar):
    """One line: progress, time left, environment steps per second and the newest return."""

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._mark = (0, 0.0)
        self._rate = 0.0

    def init_train_tqdm(self) -> Tqdm:
        """The training bar, without "Epoch": a run has only one."""
        bar = super().init_train_tqdm()
        progress = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}"
        bar.bar_format = progress + " [{elapsed}<{remaining}{postfix}]"
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        """No bar: an evaluation takes seconds."""
        return Tqdm(disable=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Sets up the bar here, because a resumed run starts no epoch."""
        super().on_train_start(trainer, pl_module)
        self.train_progress_bar.reset(len(pl_module.experience))
        self.train_progress_bar.set_description("learning")

    def on_train_epoch_start(self, *_: Any) -> None:
        """Leaves the bar unchanged."""

    def get_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        """Environment steps per second and the newest return."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        frames, now = pl_module.experience.frames, time.monotonic()
        if frames > self._mark[0]:
            if self._mark[1]:
                self._rate = (frames - self._mark[0]) / (now - self._mark[1])
            self._mark = (frames, now)
        return {"steps/s": f"{self._rate:.1f}", **metrics}


class Video(L.Callback):
    """Records the trained policy of the first seed as ``video.gif`` when training ends.

    Args:
        folder: folder of the file.
        env: an environment with uint8 ``"pixels"``, either frames ``[H, W, 3]`` as of
            ``make_env(..., from_pixels=True)``, or stacks ``[3 n, H, W]`` as of
            ``make_env(..., pixels=84)``; without ``"pixels"`` nothing is recorded.
        steps: environment steps recorded, from the start of an episode.
    """

    def __init__(self, folder: str | Path, env: EnvBase, *, steps: int = 200) -> None:
        self.folder = Path(folder)
        self.env = env
        self.steps = steps

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Plays the episode and writes the file."""
        from PIL import Image

        if "pixels" not in self.env.observation_spec:
            return
        failed = failing_as("the environment of the video failed")
        with failed, torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            rollout = self.env.rollout(
                self.steps, pl_module.evaluated_agents[0].policy(), auto_cast_to_device=True
            )
        pixels = rollout["pixels"][::2]
        if pixels.shape[-1] != 3:  # stacks, the newest frame last
            pixels = pixels[:, -3:].movedim(1, -1)
        frames = [Image.fromarray(frame.contiguous().cpu().numpy()) for frame in pixels]
        frames[0].save(
            self.folder / "video.gif",
            save_all=True,
            append_images=frames[1:],
            duration=100,  # milliseconds
            loop=0,
        )

"""What a training run leaves behind: the learning curve, the agent, a video."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl.envs.failures import failing_as
from alm_torchrl.files import atomic_write
from alm_torchrl.training.checkpoints import Checkpoints, validates_next
from alm_torchrl.training.module import ALMModule
from alm_torchrl.training.processes import any_rank
from alm_torchrl.training.tables import check_table, significant, write_table

__all__ = ["EvaluationSchedule", "LearningCurve", "SaveAgent", "StopOnSignal", "Video"]


class EvaluationSchedule(L.Callback):
    """Evaluates when the warm-up has been learnt from, and then after every so many updates.

    Lightning by itself counts from the first update of all.

    Args:
        every: updates between two evaluations.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: ALMModule, batch: Any, batch_idx: int
    ) -> None:
        """Has Lightning evaluate after this update if it is time to."""
        updates = batch_idx + 1 - pl_module.experience.warmup_updates
        due = updates >= 0 and updates % self.every == 0
        # It evaluates where the number of updates is a multiple of this.
        trainer.val_check_batch = 1 if due else batch_idx + 2


class LearningCurve(L.Callback):
    """Keeps the evaluations as ``curve.csv`` and draws them as ``curve.png``.

    Both are rewritten after every evaluation, so they exist even if the run is interrupted. A row
    holds the step (the authors' counter, without the warm-up), the seed, the mean return, its
    standard deviation over episodes, all frames, and the seconds since the start. A checkpoint
    holds the rows too: a file that does not begin with them when a run goes on is written again
    from them, and what was there is kept as ``curve.csv.kept``, with a warning.

    Args:
        folder: where the two files go.
        seed: the seed to note in the curve.
        title: the title of the plot.
        seed_index: which of several seeds trained at once this is.
    """

    FIELDS = ("step", "seed", "return", "return_std", "frames", "seconds")

    def __init__(
        self, folder: str | Path, *, seed: int, title: str = "", seed_index: int = 0
    ) -> None:
        self.folder = Path(folder)
        self.seed = int(seed)  # of Python's own, which a checkpoint can hold
        self.title = title
        self.seed_index = seed_index
        self.rows: list[dict[str, float]] = []
        self._goes_on = False
        self._before = 0.0
        self._start = time.monotonic()

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the curve of this seed."""
        return self._generate_state_key(seed_index=self.seed_index)

    def state_dict(self) -> dict[str, Any]:
        """The curve so far, and the seconds that it took."""
        return {"rows": self.rows, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the curve."""
        self._goes_on = True
        self.rows, self._before = list(state_dict["rows"]), state_dict["seconds"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Starts the clock."""
        self._start = time.monotonic()

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Compares the file with the curve so far, and loses nothing if they differ."""
        if check_table(self.folder / "curve.csv", self.rows, self.seed, goes_on=self._goes_on):
            self._write()

    @rank_zero_only
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: ALMModule, outputs: Tensor, *_: Any
    ) -> None:
        """Adds the evaluation to both files."""
        experience, returns = pl_module.experience, outputs[self.seed_index]
        self.rows.append(
            {
                "step": experience.steps,
                "seed": self.seed,
                "return": significant(returns.mean().item()),
                "return_std": significant(returns.std(correction=0).item()),
                "frames": experience.frames,
                "seconds": round(self._seconds(), 1),
            }
        )
        self._write()

    @rank_zero_only
    def on_exception(
        self, trainer: L.Trainer, pl_module: ALMModule, exception: BaseException
    ) -> None:
        """Leaves both files behind when a run is interrupted before its first evaluation."""
        if pl_module.restored:
            self._write()

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def _write(self) -> None:
        write_table(self.folder / "curve.csv", self.FIELDS, self.rows)
        with atomic_write(self.folder / "curve.png") as file:
            self._draw(file)

    def _draw(self, file: BinaryIO) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        steps, mean, std = (
            torch.tensor([row[key] for row in self.rows])
            for key in ("step", "return", "return_std")
        )
        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.plot(steps, mean, marker="o", markersize=3)
        axes.fill_between(steps, mean - std, mean + std, alpha=0.2, linewidth=0)
        axes.set(xlabel="environment steps after the warm-up", ylabel="return", title=self.title)
        axes.grid(alpha=0.3)
        figure.savefig(file, format="png", dpi=150)


class SaveAgent(L.Callback):
    """Keeps the agent for acting: ``agent_last.pt``, and ``agent_best.pt`` by its return.

    Args:
        folder: where the files go; see :meth:`alm_torchrl.agent.ALMAgent.load`.
        seed_index: which of several seeds trained at once this is.
    """

    def __init__(self, folder: str | Path, *, seed_index: int = 0) -> None:
        self.folder = Path(folder)
        self.seed_index = seed_index
        self.best = float("-inf")

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the best return of this seed."""
        return self._generate_state_key(seed_index=self.seed_index)

    def state_dict(self) -> dict[str, Any]:
        """The best return so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the best return so far."""
        self.best = state_dict["best"]

    @rank_zero_only
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: ALMModule, outputs: Tensor, *_: Any
    ) -> None:
        """Saves the agent after an evaluation."""
        agent, mean = (
            pl_module.evaluated_agents[self.seed_index],
            outputs[self.seed_index].mean().item(),
        )
        agent.save(self.folder / "agent_last.pt")
        if mean > self.best:
            self.best = mean
            agent.save(self.folder / "agent_best.pt")

    @rank_zero_only
    def on_exception(
        self, trainer: L.Trainer, pl_module: ALMModule, exception: BaseException
    ) -> None:
        """Saves the agent when a run is interrupted, if anything was learnt."""
        if pl_module.restored and pl_module.experience.updates:
            pl_module.evaluated_agents[self.seed_index].save(self.folder / "agent_last.pt")


class StopOnSignal(L.Callback):
    """Lets Ctrl-C and SIGTERM end a run after the update in progress, with a checkpoint.

    Before the first update there is nothing to keep: a run of one process ends after the frames
    that it is collecting.

    SIGTERM is what cluster managers send before they take a machine away. A second signal aborts
    without a checkpoint. Of several processes, all end after the same update, whichever of them
    has got the signal: they ask each other before every update on a CPU, and on a GPU before every
    ``log_every``-th, since the answer has to be waited for.

    Args:
        checkpoints: what saves before the run ends, if anything does.
    """

    def __init__(self, checkpoints: Checkpoints | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._checkpoints = checkpoints
        self._module: ALMModule | None = None
        self._stopping = False
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Takes over the signals, where this is the main thread, which alone may.

        Also from Lightning, which has registered by now: its handler has the processes of a run
        wait for each other in the midst of an update.
        """
        self._module = pl_module
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: ALMModule, batch: Any, batch_idx: int
    ) -> None:
        """Has the processes of a run agree on whether this update is the last."""
        asks = pl_module.device.type == "cpu" or batch_idx % pl_module.log_every == 0
        if trainer.world_size > 1 and asks and any_rank(trainer, self.signal is not None):
            self._stop_next()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: ALMModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the run if it was asked to; where an evaluation follows, after that."""
        if not validates_next(trainer, batch_idx):
            self._stop_if_asked()

    def on_validation_end(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Ends the run if it was asked to."""
        self._stop_if_asked()

    def teardown(self, trainer: L.Trainer, pl_module: ALMModule, stage: str) -> None:
        """Gives the signals back."""
        self._restore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: ALMModule, exception: BaseException
    ) -> None:
        """Gives the signals back."""
        self._restore()

    def _stop_next(self) -> None:
        self._stopping = True
        if self._module is not None:
            self._module.experience.stopping = True
        if self._checkpoints is not None:
            self._checkpoints.requested = True

    def _stop_if_asked(self) -> None:
        if self._stopping:
            raise KeyboardInterrupt

    def _request(self, number: int, _: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if not torch.distributed.is_initialized():
            self._stop_next()

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()


class Video(L.Callback):
    """Records the trained policy (of the first seed) as ``video.gif`` when training ends.

    Args:
        folder: where the file goes.
        env: an environment that writes frames ``[H, W, 3]`` (uint8) to ``"pixels"``, such as
            ``make_env(..., from_pixels=True)``, or stacks of them ``[3 n, H, W]``, such as
            ``make_env(..., pixels=84)``; without frames nothing is recorded.
        steps: environment steps recorded, from the start of an episode.
        every: steps between two frames kept.
        fps: frames per second of the file.
    """

    def __init__(
        self,
        folder: str | Path,
        env: EnvBase,
        *,
        steps: int = 200,
        every: int = 2,
        fps: int = 10,
    ) -> None:
        self.folder = Path(folder)
        self.env = env
        self.steps = steps
        self.every = every
        self.fps = fps

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
        pixels = rollout["pixels"][:: self.every]
        if pixels.shape[-1] != 3:  # stacks, the newest frame last
            pixels = pixels[:, -3:].movedim(1, -1)
        frames = [Image.fromarray(frame.contiguous().cpu().numpy()) for frame in pixels]
        frames[0].save(
            self.folder / "video.gif",
            save_all=True,
            append_images=frames[1:],
            duration=1000 // self.fps,
            loop=0,
        )

"""What a run measures of its model at every evaluation, if it is asked to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from tensordict import TensorDictBase
from torch import Tensor

from alm_torchrl.envs import random_states, set_random_states
from alm_torchrl.envs.failures import env_name, failing_as
from alm_torchrl.evaluation import (
    Bias,
    UnknownReturnsError,
    classifier_calibration,
    effective_rank,
    model_error,
    rollout_for_bias,
    split_into_windows,
    value_bias,
)
from alm_torchrl.files import atomic_write
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training.module import ALMModule
from alm_torchrl.training.seeds import StackedLoss
from alm_torchrl.training.tables import check_table, significant, write_table

__all__ = ["Diagnostics", "Measurement", "ValueBias"]


class Measurement(L.Callback):
    """Measures after every evaluation, and keeps the numbers as a CSV file and a plot.

    The policy of the losses plays in the evaluation's environments. Generators of random numbers
    are set back afterwards, so that a run is the same with and without it. Of several seeds trained
    at once, each has files of its own, and the loggers get the first one's numbers, as
    ``eval/...``.

    Args:
        folder: where the files go.
        seed: the seed to note.
        steps: steps played in each environment.
        seed_index: which of several seeds trained at once this is.
    """

    #: What both files are called.
    name: str

    def __init__(
        self, folder: str | Path, *, seed: int, steps: int = 1000, seed_index: int = 0
    ) -> None:
        self.folder = Path(folder)
        self.seed = int(seed)  # of Python's own, which a checkpoint can hold
        self.steps = steps
        self.seed_index = seed_index
        self.rows: list[dict[str, float]] = []
        self._goes_on = False

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the numbers of this seed."""
        return self._generate_state_key(seed_index=self.seed_index)

    def state_dict(self) -> dict[str, Any]:
        """The numbers so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self.rows, self._goes_on = list(state_dict["rows"]), True

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Compares the file with the numbers so far, and loses nothing if they differ."""
        path = self.folder / f"{self.name}.csv"
        if check_table(path, self.rows, self.seed, goes_on=self._goes_on):
            self._write()

    @rank_zero_only
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: ALMModule, outputs: Tensor, *_: Any
    ) -> None:
        """Plays, measures, and rewrites both files."""
        loss, device, env = pl_module.loss, pl_module.device, pl_module.eval_env
        one = loss.losses[self.seed_index] if isinstance(loss, StackedLoss) else loss
        devices = [device] if device.type == "cuda" else []
        states = random_states(env)
        failing = failing_as(f"playing in {env_name(env)} for the {self.name} failed")
        with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False):
            with failing:
                rollout = rollout_for_bias(cast("ALMLoss", one), env, self.steps).to(device)
            found = self.measure(cast("ALMLoss", one), rollout)
        if states:
            set_random_states(env, states)
        numbers = {name: significant(float(value)) for name, value in found.items()}
        self.rows.append({"step": pl_module.experience.steps, "seed": self.seed, **numbers})
        if self.seed_index == 0:
            for logger in trainer.loggers:
                metrics = {f"eval/{name}": value for name, value in numbers.items()}
                logger.log_metrics(metrics, step=pl_module.experience.steps)
        self._write()

    def measure(self, loss: ALMLoss, rollout: TensorDictBase) -> Mapping[str, Tensor]:
        """The numbers, scalars by name.

        Args:
            loss: the objective of the seed.
            rollout: what its policy has just played, ``[N, steps]``.
        """
        raise NotImplementedError

    def draw(self, figure: Any) -> None:
        """Draws :attr:`rows` on a figure of matplotlib's."""
        raise NotImplementedError

    def _write(self) -> None:
        write_table(self.folder / f"{self.name}.csv", list(self.rows[0]), self.rows)
        with atomic_write(self.folder / f"{self.name}.png") as file:
            self._render(file)

    def _render(self, file: BinaryIO) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3.5), layout="constrained")
        FigureCanvasAgg(figure)
        self.draw(figure)
        figure.savefig(file, format="png", dpi=150)

    def _column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


class ValueBias(Measurement):
    """The normalized bias of action values and bound, as ``bias.csv`` and ``bias.png``.

    See :func:`alm_torchrl.evaluation.value_bias`. Where a time limit hides every return, the run
    goes on: it warns, and the numbers are NaN.

    Args:
        folder: where the files go.
        seed: the seed to note.
        steps: steps played in each environment.
        seed_index: which of several seeds trained at once this is.
        tail: largest share of an endless return that a time limit may hide.
    """

    name = "bias"

    def __init__(
        self,
        folder: str | Path,
        *,
        seed: int,
        steps: int = 1000,
        seed_index: int = 0,
        tail: float = 0.03,
    ) -> None:
        super().__init__(folder, seed=seed, steps=steps, seed_index=seed_index)
        self.tail = tail

    def measure(self, loss: ALMLoss, rollout: TensorDictBase) -> Mapping[str, Tensor]:
        """The fields of :class:`~alm_torchrl.evaluation.Bias`."""
        try:
            bias = value_bias(loss, rollout, tail=self.tail)
        except UnknownReturnsError as error:
            rank_zero_warn(f"the bias of this evaluation is left out: {error}")
            nan = torch.tensor(float("nan"))
            bias = Bias(nan, nan, nan, nan, nan, states=torch.tensor(0))
        return {f"bias_{name}": value for name, value in bias._asdict().items()}

    def draw(self, figure: Any) -> None:
        """Mean and standard deviation over states, of values and bound."""
        steps = self._column("step")
        for axes, name in zip(figure.subplots(1, 2, sharey=True), ("value", "bound"), strict=True):
            mean, std = self._column(f"bias_{name}"), self._column(f"bias_{name}_std")
            low, high = zip(*((m - s, m + s) for m, s in zip(mean, std, strict=True)), strict=True)
            axes.plot(steps, mean, marker="o", markersize=3)
            axes.fill_between(steps, low, high, alpha=0.2, linewidth=0)
            axes.axhline(0, color="black", linewidth=0.5)
            axes.set(xlabel="environment steps after the warm-up", title=f"bias of the {name}")
            axes.grid(alpha=0.3)


class Diagnostics(Measurement):
    """Latents, dynamics and classifier, as ``diagnostics.csv`` and ``diagnostics.png``.

    The effective rank of the target encoder's means over the states visited; the model's error
    after 1, 2, ... steps; the calibration of the classifier.

    Args:
        folder: where the files go.
        seed: the seed to note.
        steps: steps played in each environment.
        seed_index: which of several seeds trained at once this is.
        length: steps of the model's longest rollout.
    """

    name = "diagnostics"

    def __init__(
        self,
        folder: str | Path,
        *,
        seed: int,
        steps: int = 1000,
        seed_index: int = 0,
        length: int = 20,
    ) -> None:
        super().__init__(folder, seed=seed, steps=steps, seed_index=seed_index)
        self.length = length

    def measure(self, loss: ALMLoss, rollout: TensorDictBase) -> Mapping[str, Tensor]:
        """The numbers of all three."""
        flat = rollout.reshape(-1)
        bins = classifier_calibration(loss, flat)
        errors = model_error(loss, split_into_windows(rollout, min(self.length, rollout.shape[1])))
        return {
            "effective_rank": effective_rank(loss.encoding(flat).mean),
            "calibration_error": bins.error,
            **{f"model_error_{t}": error for t, error in enumerate(errors, start=1)},
            **{f"confidence_{b}": value for b, value in enumerate(bins.confidence)},
            **{f"frequency_{b}": value for b, value in enumerate(bins.frequency)},
        }

    def draw(self, figure: Any) -> None:
        """Rank over time, and the newest error by length and reliability."""
        newest = self.rows[-1]

        def values(prefix: str) -> list[float]:
            return [value for name, value in newest.items() if name.startswith(prefix)]

        rank, error, reliability = figure.subplots(1, 3)
        rank.plot(self._column("step"), self._column("effective_rank"), marker="o", markersize=3)
        rank.set(xlabel="environment steps after the warm-up", title="effective rank")
        errors = values("model_error_")
        error.plot(range(1, len(errors) + 1), errors, marker="o", markersize=3)
        error.set(xlabel="steps imagined", title="model error / variance")
        reliability.plot([0, 1], [0, 1], color="black", linewidth=0.5)
        reliability.plot(values("confidence_"), values("frequency_"), marker="o", markersize=3)
        reliability.set(xlabel="classifier's probability", title="share of encoded latents")
        for axes in (rank, error, reliability):
            axes.grid(alpha=0.3)

"""Measurements of the model after every evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    terminations,
    value_bias,
)
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training.curves import CurveFile, significant
from alm_torchrl.training.module import ALMModule
from alm_torchrl.training.seeds import losses_of


class Measurement(CurveFile):
    """Plays with the current policy after every evaluation, and records numbers of the rollout.

    A subclass sets ``name``, the stem of its files, and implements :meth:`measure`; it may override
    ``draw(figure)``. Random generators are restored afterwards, so training does not depend on
    measurements. The loggers receive the numbers of the first seed as ``eval/...``.

    It plays ``steps`` steps in each evaluation environment; see :class:`CurveFile` for the other
    arguments.

    Examples:
        >>> class RewardMean(Measurement):
        ...     name = "reward"
        ...
        ...     def measure(self, loss, rollout):
        ...         return {"reward_mean": rollout["next", "reward"].mean()}
    """

    def __init__(
        self, folder: str | Path, *, seed: int, seed_index: int = 0, steps: int = 1000
    ) -> None:
        super().__init__(folder, seed=seed, seed_index=seed_index)
        self.steps = steps

    def measure(self, loss: ALMLoss, rollout: TensorDictBase) -> Mapping[str, Tensor]:
        """Returns scalars by name from a rollout ``[N, steps]`` of this seed's policy."""
        raise NotImplementedError

    @rank_zero_only
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: ALMModule, outputs: Tensor, *_: Any
    ) -> None:
        """Plays, measures, logs, and writes both files."""
        loss = losses_of(pl_module.loss)[self.seed_index]
        device, env, step = pl_module.device, pl_module.eval_env, pl_module.experience.steps
        states = random_states(env)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with failing_as(f"playing in {env_name(env)} for the {self.name} failed"):
                rollout = rollout_for_bias(loss, env, self.steps).to(device)
            found = self.measure(loss, rollout)
        if states:
            set_random_states(env, states)
        numbers = {name: significant(float(value)) for name, value in found.items()}
        if self.seed_index == 0:
            for logger in trainer.loggers:
                logger.log_metrics({f"eval/{k}": v for k, v in numbers.items()}, step=step)
        self.add(step, numbers)


class ValueBias(Measurement):
    """The normalized bias of action values and bound, as ``bias.csv`` and ``bias.png``.

    See :func:`alm_torchrl.evaluation.value_bias` for the numbers and ``tail``, and
    :class:`Measurement` for the other arguments. If no return is known because of a time limit, the
    numbers are NaN, with a warning.
    """

    name = "bias"

    def __init__(self, folder: str | Path, *, tail: float = 0.03, **options: int) -> None:
        super().__init__(folder, **options)
        self.tail = tail

    def measure(self, loss: ALMLoss, rollout: TensorDictBase) -> Mapping[str, Tensor]:
        """Returns the fields of :class:`~alm_torchrl.evaluation.Bias`."""
        try:
            bias = value_bias(loss, rollout, tail=self.tail)
        except UnknownReturnsError as error:
            rank_zero_warn(f"the bias is not measured at this evaluation: {error}")
            nan = torch.tensor(float("nan"))
            bias = Bias(nan, nan, nan, nan, nan, states=torch.tensor(0))
        return {f"bias_{name}": value for name, value in bias._asdict().items()}

    def draw(self, figure: Any) -> None:
        """Draws mean and standard deviation over states, of values and bound."""
        for axes, name in zip(figure.subplots(1, 2, sharey=True), ("value", "bound"), strict=True):
            self.plot(axes, f"bias_{name}", f"bias_{name}_std", title=f"bias of the {name}")
            axes.axhline(0, color="black", linewidth=0.5)


class Diagnostics(Measurement):
    """The quality of the model, as ``diagnostics.csv`` and ``diagnostics.png``.

    It measures the effective rank of the target encoder's means over the visited states, the model
    error after 1 to ``length`` steps, the calibration of the classifier, and terminations
    (:class:`~alm_torchrl.evaluation.Terminations`, as ``end_...``). See :class:`Measurement` for
    the other arguments.
    """

    name = "diagnostics"

    def __init__(self, folder: str | Path, *, length: int = 20, **options: int) -> None:
        super().__init__(folder, **options)
        self.length = length

    def measure(self, loss: ALMLoss, rollout: TensorDictBase) -> Mapping[str, Tensor]:
        """Returns effective rank, model errors, calibration and terminations."""
        flat = rollout.reshape(-1)
        bins = classifier_calibration(loss, flat)
        errors = model_error(loss, split_into_windows(rollout, min(self.length, rollout.shape[1])))
        ends = terminations(loss, rollout)
        return {
            "effective_rank": effective_rank(loss.encoding(flat).mean),
            "calibration_error": bins.error,
            **{f"end_{name}": value for name, value in ends._asdict().items()},
            **{f"model_error_{t}": error for t, error in enumerate(errors, start=1)},
            **{f"confidence_{b}": value for b, value in enumerate(bins.confidence)},
            **{f"frequency_{b}": value for b, value in enumerate(bins.frequency)},
        }

    def draw(self, figure: Any) -> None:
        """Draws the rank over time, and the newest model error and reliability diagram."""
        newest = self.rows[-1]

        def values(prefix: str) -> list[float]:
            return [value for name, value in newest.items() if name.startswith(prefix)]

        rank, error, reliability = figure.subplots(1, 3)
        self.plot(rank, "effective_rank", title="effective rank")
        errors = values("model_error_")
        error.plot(range(1, len(errors) + 1), errors, marker="o", markersize=3)
        error.set(xlabel="model steps", title="model error / variance")
        reliability.plot([0, 1], [0, 1], color="black", linewidth=0.5)
        reliability.plot(values("confidence_"), values("frequency_"), marker="o", markersize=3)
        reliability.set(xlabel="predicted probability", title="observed frequency")
        for axes in (error, reliability):
            axes.grid(alpha=0.3)

"""One update of all networks, also as a CUDA graph."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training.seeds import StackedLoss, losses_of

#: On a CPU, tanh computed from exp takes a third of the time and differs by rounding only.
_INDUCTOR: dict[str, Any] = {"cpp.use_decompose_tanh": True}


def make_optimizer(
    loss: ALMLoss | StackedLoss,
    learning_rates: float | Mapping[str, float] = 1e-4,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
) -> torch.optim.Optimizer:
    """Makes a fused optimizer with one named parameter group for each learning rate.

    Args:
        loss: the objective, or those of several seeds.
        learning_rates: one rate, or one for each group of :meth:`ALMLoss.parameter_groups` by
            name; ``"encoder"`` and ``"dynamics"`` may replace ``"world_model"``.
        optimizer: class or factory of the optimizer, such as
            ``partial(torch.optim.AdamW, weight_decay=1e-2)``; it must accept ``fused``.

    Raises:
        ValueError: if a learning rate names no group, or the optimizer has no fused
            implementation.
    """
    groups = loss.parameter_groups()
    if not isinstance(learning_rates, Mapping):
        learning_rates = dict.fromkeys(groups, learning_rates)
    if "encoder" in learning_rates:
        groups = {**_split_world_model(loss, groups), **groups}
        del groups["world_model"]
    if learning_rates.keys() != groups.keys():
        raise ValueError(f"learning_rates has {sorted(learning_rates)}; expected {sorted(groups)}")
    accepted = inspect.signature(optimizer).parameters
    if "fused" not in accepted:
        raise ValueError(f"{optimizer} has no fused implementation: choose Adam, AdamW or SGD")
    options = {"fused": True}
    if "capturable" in accepted:
        options["capturable"] = next(loss.parameters()).device.type == "cuda"
    named = [{"name": n, "params": p, "lr": learning_rates[n]} for n, p in groups.items()]
    return optimizer(named, **options)


def _split_world_model(
    loss: ALMLoss | StackedLoss, groups: Mapping[str, list[Any]]
) -> dict[str, list[Any]]:
    """The parameters of the world model, split into encoder and dynamics."""
    first = losses_of(loss)[0]
    encoder = {id(p) for p in first.encoder_params.parameters()}
    split: dict[str, list[Any]] = {"encoder": [], "dynamics": []}
    names = first.parameter_groups()["world_model"]
    for own, parameter in zip(names, groups["world_model"], strict=True):
        split["encoder" if id(own) in encoder else "dynamics"].append(parameter)
    return split


class Steps(Protocol):
    """Anything that updates by ``step()``, such as TorchRL's ``SoftUpdate``."""

    def step(self) -> None:
        """Makes one step."""


class Update:
    """Losses, one backward pass, clipping by group, optimizer and target networks.

    An update never waits for the device. A gradient norm that is not finite leaves the weights
    unchanged, and :meth:`check` raises later.

    Args:
        loss: the objective, or those of several seeds.
        optimizer: see :func:`make_optimizer`.
        target_update: updates the target networks after the optimizer.
        max_grad_norm: largest gradient norm of each group of :meth:`ALMLoss.parameter_groups`.
        precision: ``"32-true"``, or ``"bf16-mixed"`` for losses under autocast to bfloat16.
        compiled: whether to compile the losses, in the first call.
        strict: whether a failed compilation raises; otherwise it warns and the losses run eagerly.
        backward: differentiates the sum of the losses, such as Lightning's ``manual_backward``.
    """

    def __init__(
        self,
        loss: ALMLoss | StackedLoss,
        optimizer: torch.optim.Optimizer,
        target_update: Steps,
        *,
        max_grad_norm: float = 100.0,
        precision: str = "32-true",
        compiled: bool = False,
        strict: bool = True,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        self.loss = loss
        self.optimizer = optimizer
        self.target_update = target_update
        self.max_grad_norm = max_grad_norm
        self.precision = precision
        self.strict = strict
        self.backward = backward
        self.groups: dict[str, list[Any]] = dict(loss.parameter_groups())
        self.device = next(loss.parameters()).device
        self.non_finite = torch.zeros(len(self.groups), dtype=torch.bool, device=self.device)
        self._clip: Callable[..., Tensor] = partial(nn.utils.clip_grad_norm_, foreach=True)
        if isinstance(loss, StackedLoss):
            self._clip = loss.clip_grad_norm_
        self._losses = self._eager
        if compiled:
            self._losses = torch.compile(self._eager, options=_INDUCTOR)

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Makes one update.

        Returns:
            Losses, metrics and the gradient norm of every group before clipping (``grad_norm/..``),
            scalars or, for several seeds, ``[S]``; detached and on the device.
        """
        metrics = self._backward(batch)
        norms = torch.stack([self._clip(p, self.max_grad_norm) for p in self.groups.values()])
        finite = norms.isfinite()
        self.non_finite |= ~finite.reshape(len(norms), -1).all(-1)
        # Gradient scalers use this too: a fused optimizer reads on the device whether to step.
        self.optimizer.found_inf = 1.0 - finite.all().float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.target_update.step()
        for name, norm in zip(self.groups, norms, strict=True):
            metrics[f"grad_norm/{name}"] = norm
        return metrics

    def check(self) -> None:
        """Waits for the device and raises if a gradient norm was not finite so far."""
        bad = [n for n, flag in zip(self.groups, self.non_finite.tolist(), strict=True) if flag]
        if bad:
            names = ", ".join(map(repr, bad))
            raise FloatingPointError(
                f"the gradient norm of the {names} loss is not finite; the update was skipped. "
                "Look for non-finite observations or rewards, or lower the learning rate"
            )

    def _backward(self, batch: TensorDictBase) -> TensorDictBase:
        """Computes the gradients of all losses."""
        try:
            return self._gradients(self._losses, batch)
        except TorchDynamoException as error:
            if self.strict:
                raise
            warnings.warn(
                f"torch.compile failed, so the losses run without it ({_first_line(error)})",
                stacklevel=2,
            )
        self.optimizer.zero_grad()
        self._losses = self._eager
        return self._gradients(self._losses, batch)

    def _gradients(
        self, losses: Callable[[TensorDictBase], TensorDictBase], batch: TensorDictBase
    ) -> TensorDictBase:
        torch.clear_autocast_cache()  # a surrounding autocast would reuse its casts of weights
        mixed = self.precision == "bf16-mixed"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            out = losses(batch)
        self.backward(torch.stack([out[key] for key in self.loss.out_keys]).sum())
        return out.detach()

    def _eager(self, batch: TensorDictBase) -> TensorDictBase:
        return self.loss(batch)


class CapturedUpdate:
    """An update as one CUDA graph, launched as a whole instead of kernel by kernel.

    The first calls run eagerly on a side stream, then the update is captured. Batches are copied
    to the memory that the graph reads, so all must have the shapes of the first.

    Args:
        update: the update; its optimizer must be ``capturable``.
        warmup: eager calls before the capture, which allocate memory and compile the losses.
    """

    def __init__(self, update: Update, warmup: int = 5) -> None:
        self.update = update
        self._warmup = warmup
        self._stream = torch.cuda.Stream(update.device)
        self._graph: Any = None
        self._batch: Any = None
        self._metrics: Any = None
        self._failed = False

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Makes one update; the next call overwrites the result."""
        if self._warmup > 0:
            self._warmup -= 1
            return self._on_side_stream(batch)
        if self._graph is None:
            self._capture(batch)
        if self._failed:
            return self.update(batch)
        self._batch.update_(batch, non_blocking=True)
        self._graph.replay()
        return self._metrics

    def check(self) -> None:
        """See :meth:`Update.check`."""
        self.update.check()

    def _on_side_stream(self, batch: TensorDictBase) -> TensorDictBase:
        """Runs the update on the side stream, as CUDA graphs require before a capture."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            metrics = self.update(batch)
        current.wait_stream(self._stream)
        return metrics

    def _capture(self, batch: TensorDictBase) -> None:
        self._batch = batch.clone()
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                self._metrics = self.update(self._batch)
        except RuntimeError as error:
            if self.update.strict:
                raise
            warnings.warn(
                "the update cannot be captured as a CUDA graph, so its kernels are launched one "
                f"by one ({_first_line(error)})",
                stacklevel=2,
            )
            self._failed = True
            self.update.optimizer.zero_grad()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

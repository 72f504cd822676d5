"""One update of all networks, optionally as a CUDA graph."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torchrl.objectives import SoftUpdate

from alm_torchrl.files import one_line
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training.seeds import StackedLoss, TargetUpdate, losses_of


def make_optimizer(
    loss: ALMLoss | StackedLoss,
    learning_rates: float | Mapping[str, float] = 1e-4,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
) -> torch.optim.Optimizer:
    """Makes a fused optimizer with named parameter groups.

    Args:
        loss: the objective.
        learning_rates: one rate, or a rate for each group of :meth:`ALMLoss.parameter_groups` by
            name; ``"encoder"`` and ``"dynamics"`` may replace ``"world_model"``.
        optimizer: class or factory of the optimizer, such as
            ``partial(torch.optim.AdamW, weight_decay=1e-2)``; it must accept ``fused``.
    """
    groups: dict[str, list[Any]] = dict(loss.parameter_groups())
    if not isinstance(learning_rates, Mapping):
        learning_rates = dict.fromkeys(groups, learning_rates)
    if "encoder" in learning_rates:  # the first parameters of the world model
        world_model = groups.pop("world_model")
        count = sum(p.requires_grad for p in losses_of(loss)[0].encoder_params.parameters())
        groups = {"encoder": world_model[:count], "dynamics": world_model[count:], **groups}
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


class Update:
    """Computes losses and gradients, clips by group, and steps optimizer and target networks.

    An update never waits for the device. A non-finite gradient norm leaves the weights unchanged,
    and :meth:`check` raises later.

    Args:
        loss: the objective.
        optimizer: see :func:`make_optimizer`.
        target_update: updates the target networks.
        max_grad_norm: largest gradient norm of each group of :meth:`ALMLoss.parameter_groups`.
        precision: ``"32-true"``, or ``"bf16-mixed"`` for losses under autocast to bfloat16.
        compiled: whether the first call compiles the losses.
        strict: whether a failed compilation raises; otherwise it warns, and losses run eagerly.
        backward: computes the gradients of the sum, such as Lightning's ``manual_backward``.
    """

    def __init__(
        self,
        loss: ALMLoss | StackedLoss,
        optimizer: torch.optim.Optimizer,
        target_update: TargetUpdate | SoftUpdate,
        *,
        max_grad_norm: float = 100.0,
        precision: str = "32-true",
        compiled: bool = False,
        strict: bool = True,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        self.loss, self.optimizer, self.target_update = loss, optimizer, target_update
        self.max_grad_norm, self.precision = max_grad_norm, precision
        self.strict, self.backward = strict, backward
        self.groups: dict[str, list[Any]] = dict(loss.parameter_groups())
        self.device = next(loss.parameters()).device
        self.non_finite = torch.zeros(len(self.groups), dtype=torch.bool, device=self.device)
        self._clip: Callable[..., Tensor] = partial(nn.utils.clip_grad_norm_, foreach=True)
        if isinstance(loss, StackedLoss):
            self._clip = loss.clip_grad_norm_
        self._losses = self._eager
        if compiled:
            # On a CPU, tanh by exp takes a third of the time and differs only by rounding. Random
            # numbers drawn in a compiled loop prevent its vectorization.
            options = {"cpp.use_decompose_tanh": True, "fallback_random": self.device.type == "cpu"}
            self._losses = torch.compile(self._eager, options=options)

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Makes one update; returns detached losses, metrics and gradient norms.

        They are scalars, or ``[S]`` for several seeds. ``grad_norm/<group>`` is the gradient norm
        before clipping.
        """
        metrics = self._backward(batch)
        norms = torch.stack([self._clip(p, self.max_grad_norm) for p in self.groups.values()])
        finite = norms.isfinite()
        self.non_finite |= ~finite.reshape(len(norms), -1).all(-1)
        # A fused optimizer reads this on the device, and skips its step if it is not zero.
        self.optimizer.found_inf = 1.0 - finite.all().float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.target_update.step()
        for name, norm in zip(self.groups, norms, strict=True):
            metrics[f"grad_norm/{name}"] = norm
        return metrics

    def check(self) -> None:
        """Waits for the device and raises if a gradient norm was not finite in any update."""
        bad = [n for n, flag in zip(self.groups, self.non_finite.tolist(), strict=True) if flag]
        if bad:
            names = ", ".join(map(repr, bad))
            raise FloatingPointError(
                f"the gradient norm of the {names} loss is not finite; the update was skipped. "
                "Look for non-finite observations or rewards, or lower the learning rate"
            )

    def _backward(self, batch: TensorDictBase) -> TensorDictBase:
        """Computes the losses and their gradients, eagerly if the compilation fails."""
        try:
            return self._gradients(batch)
        except TorchDynamoException as error:
            if self.strict:
                raise
            warnings.warn(
                f"torch.compile failed, so the losses run without it ({one_line(error)})",
                stacklevel=2,
            )
        self.optimizer.zero_grad()
        self._losses = self._eager
        return self._gradients(batch)

    def _gradients(self, batch: TensorDictBase) -> TensorDictBase:
        torch.clear_autocast_cache()  # a surrounding autocast would reuse outdated weights
        mixed = self.precision == "bf16-mixed"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            out = self._losses(batch)
        self.backward(torch.stack([out[key] for key in self.loss.out_keys]).sum())
        return out.detach()

    def _eager(self, batch: TensorDictBase) -> TensorDictBase:
        return self.loss(batch)


class CapturedUpdate:
    """An update as one CUDA graph, which is launched as a whole instead of kernel by kernel.

    The first calls run eagerly on a side stream, as CUDA graphs require. Then the update is
    captured. All of them read a copy of the batch in the same memory, so the shape of the batches
    must not change.

    Args:
        update: the update; its optimizer must be ``capturable``.
        warmup: eager calls before the capture, which allocate memory and compile the losses.
    """

    def __init__(self, update: Update, warmup: int = 5) -> None:
        self.update = update
        self.check = update.check
        self._warmup = warmup
        self._stream = torch.cuda.Stream(update.device)
        self._batch: TensorDictBase | None = None
        self._graph: Any = None
        self._failed = False

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Makes one update; the next call overwrites the result.

        The priority that the loss may write is copied to the batch.
        """
        if self._failed:
            return self.update(batch)
        if self._batch is None:
            self._batch = batch.clone()
        else:
            self._batch.update_(batch, non_blocking=True)
        if self._warmup > 0:
            self._warmup -= 1
            metrics = self._warm_up(self._batch)
        else:
            if self._graph is None and not self._capture(self._batch):
                return self.update(batch)
            self._graph.replay()
            metrics = self._metrics
        key = losses_of(self.update.loss)[0].tensor_keys.priority
        if (priority := self._batch.get(key, None)) is not None:
            batch.set(key, priority.clone())
        return metrics

    def _warm_up(self, batch: TensorDictBase) -> TensorDictBase:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            metrics = self.update(batch)
        current.wait_stream(self._stream)
        return metrics

    def _capture(self, batch: TensorDictBase) -> bool:
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                self._metrics = self.update(batch)
        except RuntimeError as error:
            if self.update.strict:
                raise
            warnings.warn(
                "the update cannot be captured as a CUDA graph, so it runs without one "
                f"({one_line(error)})",
                stacklevel=2,
            )
            self._failed = True
            self.update.optimizer.zero_grad()
        return not self._failed

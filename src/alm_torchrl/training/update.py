"""One update, and the same as a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torchrl.objectives.utils import TargetNetUpdater

from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training.seeds import StackedLoss, StackedSoftUpdate

__all__ = ["CapturedUpdate", "Update", "make_optimizer"]

#: On a CPU, tanh by way of exp takes a third of the time, and differs by a rounding error.
_INDUCTOR: dict[str, Any] = {"cpp.use_decompose_tanh": True}


def make_optimizer(
    loss: ALMLoss | StackedLoss, learning_rates: float | Mapping[str, float] = 1e-4
) -> torch.optim.Optimizer:
    """Adam over the parameter groups of a loss, fused, and on a GPU fit for a CUDA graph.

    Args:
        loss: the objective, or those of several seeds.
        learning_rates: one rate, or one for each parameter group by name.

    Returns:
        The optimizer; its groups are named.

    Raises:
        ValueError: if a learning rate names no group.
    """
    groups = loss.parameter_groups()
    if not isinstance(learning_rates, Mapping):
        learning_rates = dict.fromkeys(groups, learning_rates)
    if learning_rates.keys() != groups.keys():
        raise ValueError(f"learning_rates names {sorted(learning_rates)}, wanted {sorted(groups)}")
    return torch.optim.Adam(
        [{"name": n, "params": p, "lr": learning_rates[n]} for n, p in groups.items()],
        fused=True,
        capturable=next(loss.parameters()).device.type == "cuda",
    )


class Update:
    """Losses, one backward pass, clipping by group, optimizer and target networks.

    Nothing here waits for the device. A gradient norm that is not finite leaves the weights as
    they are, without being looked at by the host, until :meth:`check` raises.

    Args:
        loss: the objective, or those of several seeds.
        optimizer: what :func:`make_optimizer` makes.
        target_update: moves the target networks after the optimizer.
        max_grad_norm: largest gradient norm of a group.
        precision: ``"32-true"``, or ``"bf16-mixed"`` for losses under autocast to bfloat16.
        compiled: whether ``torch.compile`` traces the losses, in the first call.
        strict: whether a compilation that fails is an error; else the losses run without it, with
            a warning.
        backward: differentiates the sum of the losses, such as Lightning's ``manual_backward``,
            which averages the gradients over the processes of a run.
    """

    def __init__(
        self,
        loss: ALMLoss | StackedLoss,
        optimizer: torch.optim.Optimizer,
        target_update: TargetNetUpdater | StackedSoftUpdate,
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
        self.groups = [group["name"] for group in optimizer.param_groups]
        self.device = next(loss.parameters()).device
        self.non_finite = torch.zeros(len(self.groups), dtype=torch.bool, device=self.device)
        self._losses = self._eager
        if compiled:
            self._losses = torch.compile(self._eager, options=_INDUCTOR)

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Makes one update.

        Args:
            batch: what the loss reads.

        Returns:
            Losses, metrics and the gradient norm of every group before clipping (``grad_norm/..``),
            scalars or, of several seeds, ``[S]``; detached and still on the device.
        """
        metrics = self._backward(batch)
        norms = torch.stack([self._clip(group["params"]) for group in self.optimizer.param_groups])
        finite = norms.isfinite()
        self.non_finite |= ~finite.reshape(len(norms), -1).all(-1)
        # What a gradient scaler uses: a fused optimizer reads on the device whether to step.
        self.optimizer.found_inf = 1.0 - finite.all().float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.target_update.step()
        for name, norm in zip(self.groups, norms, strict=True):
            metrics[f"grad_norm/{name}"] = norm
        return metrics

    def check(self) -> None:
        """Waits for the device, and stops a run that cannot go on.

        Raises:
            FloatingPointError: if a gradient norm was not finite since the start.
        """
        bad = [n for n, flag in zip(self.groups, self.non_finite.tolist(), strict=True) if flag]
        if bad:
            names = ", ".join(map(repr, bad))
            raise FloatingPointError(
                f"the gradient norm of the {names} loss is not finite; the update was skipped. "
                "Look for non-finite observations or rewards, or lower the learning rate"
            )

    def _backward(self, batch: TensorDictBase) -> TensorDictBase:
        """Leaves the gradients of all losses at the parameters."""
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
        torch.clear_autocast_cache()  # a surrounding autocast keeps casts of weights
        with self._autocast():
            out = losses(batch)
        self.backward(torch.stack([out[key] for key in self.loss.out_keys]).sum())
        return out.detach()

    def _eager(self, batch: TensorDictBase) -> TensorDictBase:
        """The losses of a batch, as they are compiled."""
        return self.loss(batch)

    def _autocast(self) -> AbstractContextManager[object]:
        """The precision of the losses, whatever surrounds the update."""
        enabled = self.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        """Clips the norm of a group's gradient, of each seed apart, and returns what it was."""
        if not isinstance(self.loss, StackedLoss):
            return nn.utils.clip_grad_norm_(parameters, self.max_grad_norm, foreach=True)
        grads = [p.grad.view(len(p), -1) for p in parameters if p.grad is not None]
        norms = torch.stack([grad.norm(dim=1) for grad in grads]).norm(dim=0)
        factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0).unsqueeze(1)
        torch._foreach_mul_(grads, [factors] * len(grads))
        return norms


class CapturedUpdate:
    """An update as one CUDA graph, launched at once in place of its hundreds of kernels.

    The first calls run as they are, on a stream of their own, and are captured after that. Batches
    are copied to where the graph reads, so that all must have the shapes of the first.

    Args:
        update: what is captured; its optimizer must be ``capturable``.
        warmup: calls before the capture, in which memory is allocated and losses are compiled.
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
        """Makes one update.

        Args:
            batch: what the loss reads, of the same shapes every time.

        Returns:
            As :class:`Update`; overwritten by the next call.
        """
        if self._warmup > 0:
            self._warmup -= 1
            return self._aside(batch)
        if self._graph is None:
            self._capture(batch)
        if self._failed:
            return self.update(batch)
        self._batch.update_(batch, non_blocking=True)
        self._graph.replay()
        return self._metrics

    def check(self) -> None:
        """As :meth:`Update.check`."""
        self.update.check()

    def _aside(self, batch: TensorDictBase) -> TensorDictBase:
        """Runs the update on the side stream, as the documentation of CUDA graphs asks for."""
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
                f"the update cannot be captured as a CUDA graph, so its kernels are launched one "
                f"by one ({_first_line(error)})",
                stacklevel=2,
            )
            self._failed = True
            self.update.optimizer.zero_grad()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

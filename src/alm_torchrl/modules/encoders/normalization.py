"""Running normalization of observations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from alm_torchrl.distributions import full_precision
from alm_torchrl.modules.networks import concatenate


def centered_bytes(images: Tensor) -> Tensor:
    """Maps bytes to float32 in [-0.5, 0.5], and leaves floating-point images unchanged."""
    return images if images.is_floating_point() else images.to(torch.float32) / 255 - 0.5


class RunningNorm(nn.Module):
    r"""Normalizes observations to mean 0 and variance 1 by running statistics.

    .. math:: x' = \mathrm{clip}((x - \mu) / \sqrt{\sigma^2 + \epsilon}, -c, c)

    The statistics are buffers shared with the target encoder. Only :meth:`update` changes them,
    which :meth:`ALMAgent.update_statistics` calls if the network is in a
    :class:`NormalizedInputs`.

    Args:
        *shape: shape of an observation. A vector ``(O,)`` has a mean and a variance for each entry.
            An image ``(C, H, W)`` has a mean for each pixel and one variance, so that constant
            pixels become 0 and noise in a corner is not amplified; bytes are first mapped to
            [-0.5, 0.5].
        clip: largest absolute value of the result.
        epsilon: added to the variance.

    Examples:
        >>> norm = RunningNorm(2)
        >>> x = 3 + 5 * torch.randn(1000, 2)
        >>> norm.update(x)
        >>> round(float(norm(x).std()), 2)
        1.0
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, *shape: int, clip: float = 10.0, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.clip = clip
        self.epsilon = epsilon
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape if len(shape) == 1 else ()))
        # An integer: Apple GPUs have no float64, and float32 cannot count beyond 16,777,216.
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes ``[..., *shape]``."""
        x = full_precision(self._as_float(x))
        scale = (self.variance + self.epsilon).rsqrt()
        return ((x - self.mean) * scale).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Adds observations ``[..., *shape]`` to the statistics (Chan et al.'s parallel form)."""
        x = self._as_float(x.reshape(-1, *self.mean.shape)).to(self.mean)
        total = self.count + len(x)
        share = (len(x) / total).to(self.mean.dtype)
        delta = x.mean(0) - self.mean
        spread = share * x.var(0, correction=0) + share * (1 - share) * delta.square()
        if not self.variance.ndim:
            spread = spread.mean()
        self.variance.copy_((1 - share) * self.variance * (self.count > 0) + spread)
        self.mean.add_(share * delta)
        self.count.copy_(total)

    update_statistics = update

    def _as_float(self, x: Tensor) -> Tensor:
        return centered_bytes(x) if self.mean.ndim > 1 else concatenate(x)


class NormalizedInputs(nn.Module):
    """A network with normalized inputs.

    There is one norm for each input, or a single norm for the concatenation of all inputs.

    Examples:
        >>> network = NormalizedInputs(nn.Linear(3, 8), [RunningNorm(3)])
        >>> network.update_statistics(torch.randn(10, 1), torch.randn(10, 2))
        >>> network(torch.randn(4, 1), torch.randn(4, 2)).shape
        torch.Size([4, 8])
    """

    def __init__(self, network: nn.Module, norms: Sequence[RunningNorm]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        """Runs the network on the normalized inputs."""
        return self.network(*(norm(value) for norm, value in self._pairs(inputs)))

    def update_statistics(self, *inputs: Tensor) -> None:
        """Adds new observations to the statistics."""
        for norm, value in self._pairs(inputs):
            norm.update(value)

    def _pairs(self, inputs: tuple[Tensor, ...]) -> Iterator[tuple[RunningNorm, Tensor]]:
        if len(self.norms) == 1 < len(inputs):
            inputs = (concatenate(*inputs),)
        return zip(cast("Sequence[RunningNorm]", self.norms), inputs, strict=True)

"""Running normalization of observations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from alm_torchrl.distributions import full_precision
from alm_torchrl.modules.augmentation import without_augmentation
from alm_torchrl.modules.encoders.specs import joined

__all__ = ["NormalizedInputs", "RunningNorm", "centered_bytes"]


def centered_bytes(images: Tensor) -> Tensor:
    """Brings bytes to [-0.5, 0.5], as float32, and leaves floating-point images as they are.

    Args:
        images: of any shape.

    Examples:
        >>> centered_bytes(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([-0.5000,  0.5000])
    """
    return images if images.is_floating_point() else images.to(torch.float32) / 255 - 0.5


class RunningNorm(nn.Module):
    r"""Brings observations to mean 0 and variance 1 by statistics of all that was seen.

    .. math:: x' = \mathrm{clip}((x - \mu) / \sqrt{\sigma^2 + \epsilon}, -c, c)

    The statistics are buffers, saved with the weights. They move in :meth:`update` and nowhere
    else, so that a loss evaluated twice gives the same result twice.
    :meth:`ALMAgent.update_statistics` calls it on data that is collected. The target encoder of
    ``ALMLoss`` reads the same buffers as the encoder.

    Args:
        *shape: of an observation: ``(O,)`` for a vector, of which every entry has a mean and a
            variance. An image ``(C, H, W)`` has a mean for every pixel and one variance, so that
            what never moves becomes 0, and noise in a corner is not blown up. Its bytes are brought
            to [-0.5, 0.5] first.
        clip: largest absolute value of the result, in standard deviations.
        epsilon: added to the variance, in squared units of the observation.

    Examples:
        >>> norm = RunningNorm(2)
        >>> x = 3 + 5 * torch.randn(1000, 2)
        >>> torch.allclose(norm(x), x.clamp(-10, 10), rtol=1e-5)  # nothing was seen yet
        True
        >>> norm.update(x)
        >>> bool(norm(x).mean().abs() < 1e-4), round(float(norm(x).std()), 2)
        (True, 1.0)
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
        # Whole numbers, since an Apple GPU has no float64, and float32 stops at 16,777,216
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes ``[..., *shape]``."""
        x = full_precision(self._values(x))
        scale = (self.variance + self.epsilon).rsqrt()
        return ((x - self.mean) * scale).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Takes observations into the statistics, in place (Chan et al.'s parallel form).

        Args:
            x: new observations, ``[..., *shape]``.
        """
        x = self._values(x.reshape(-1, *self.mean.shape)).to(self.mean)
        total = self.count + len(x)
        share = (len(x) / total).to(self.mean.dtype)
        delta = x.mean(0) - self.mean
        spread = share * x.var(0, correction=0) + share * (1 - share) * delta.square()
        if not self.variance.ndim:
            spread = spread.mean()
        self.variance.copy_((1 - share) * self.variance * (self.count > 0) + spread)
        self.mean.add_(share * delta)
        self.count.copy_(total)

    def _values(self, x: Tensor) -> Tensor:
        return centered_bytes(x) if self.mean.ndim > 1 else joined(x)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"{tuple(self.mean.shape)}, clip={self.clip}, epsilon={self.epsilon}"


class NormalizedInputs(nn.Module):
    """A network that reads its inputs through a :class:`RunningNorm`.

    ``LatentModule.update_statistics`` finds it by its method :meth:`update_statistics`.

    Args:
        network: what reads the normalized inputs.
        norms: one for each input. One alone reads all inputs, concatenated.

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
        """Runs the network on the normalized inputs, each ``[..., O_i]`` or ``[..., C, H, W]``."""
        return self.network(*(norm(value) for norm, value in self._pairs(inputs)))

    def update_statistics(self, *inputs: Tensor) -> None:
        """Takes new observations into the statistics."""
        for norm, value in self._pairs(inputs):
            norm.update(value)

    def acting(self) -> NormalizedInputs:
        """The same statistics and network, without augmentation; itself if there is none."""
        network = without_augmentation(self.network)
        if network is self.network:
            return self
        return NormalizedInputs(network, cast("Sequence[RunningNorm]", self.norms))

    def _pairs(self, inputs: tuple[Tensor, ...]) -> Iterator[tuple[RunningNorm, Tensor]]:
        if len(self.norms) == 1 < len(inputs):
            inputs = (joined(*inputs),)
        return zip(cast("Sequence[RunningNorm]", self.norms), inputs, strict=True)

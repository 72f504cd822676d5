"""Running normalisation of observations."""

from __future__ import annotations

import torch
from torch import Tensor, cat, nn

from alm_torchrl.distributions import full_precision

__all__ = ["NormalisedInputs", "RunningNorm"]


class RunningNorm(nn.Module):
    r"""Brings observations to mean 0 and variance 1 by statistics of all that was seen.

    .. math:: x' = \mathrm{clip}((x - \mu) / \sqrt{\sigma^2 + \epsilon}, -c, c)

    The statistics are buffers, saved with the weights. They move in :meth:`update` and nowhere
    else, so that a loss evaluated twice gives the same result twice.
    :meth:`ALMAgent.update_statistics` calls it on data that is collected. The target encoder of
    ``ALMLoss`` reads the same buffers as the encoder.

    Args:
        size: size of the last dimension.
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

    def __init__(self, size: int, *, clip: float = 10.0, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.clip = clip
        self.epsilon = epsilon
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``[..., size]``."""
        x = full_precision(x)
        scale = (self.variance + self.epsilon).rsqrt()
        return ((x - self.mean) * scale).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Takes observations into the statistics, in place (Chan et al.'s parallel form).

        Args:
            x: new observations, ``[..., size]``.
        """
        x = x.reshape(-1, x.shape[-1]).to(self.mean)
        total = self.count + len(x)
        share = (len(x) / total).to(self.mean.dtype)
        delta = x.mean(0) - self.mean
        spread = share * x.var(0, correction=0) + share * (1 - share) * delta.square()
        self.variance.copy_((1 - share) * self.variance * (self.count > 0) + spread)
        self.mean.add_(share * delta)
        self.count.copy_(total)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"{len(self.mean)}, clip={self.clip}, epsilon={self.epsilon}"


class NormalisedInputs(nn.Module):
    """A network that reads its concatenated inputs through a :class:`RunningNorm`.

    ``LatentModule.update_statistics`` finds it by its method :meth:`update_statistics`.

    Args:
        network: what reads the normalised ``[..., size]``.
        size: total size of the inputs.

    Examples:
        >>> network = NormalisedInputs(nn.Linear(3, 8), 3)
        >>> network.update_statistics(torch.randn(10, 1), torch.randn(10, 2))
        >>> network(torch.randn(4, 1), torch.randn(4, 2)).shape
        torch.Size([4, 8])
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.norm = RunningNorm(size)
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        """Concatenates ``[..., O_i]`` and runs the network on the normalised result."""
        return self.network(self.norm(cat(inputs, dim=-1)))

    def update_statistics(self, *inputs: Tensor) -> None:
        """Takes new observations, each ``[..., O_i]``, into the statistics."""
        self.norm.update(cat(inputs, dim=-1))

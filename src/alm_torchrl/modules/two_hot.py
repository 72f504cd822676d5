"""Rewards and values as categorical distributions over bins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrl.modules import symexp, symlog

from alm_torchrl.modules.networks import FullPrecisionLinear
from alm_torchrl.modules.rebuildable import Rebuildable


@dataclass(frozen=True)
class TwoHot(Rebuildable):
    r"""A categorical reward or value, trained with a cross-entropy instead of a squared error.

    The network has a logit :math:`x_i` for each bin :math:`b_i`. The bins are evenly spaced in
    :math:`[-l, l]`, in units of :math:`\mathrm{symlog}(y) = \mathrm{sign}(y) \log(1 + |y|)`. The
    prediction is

    .. math:: \mathrm{symexp}\big(\textstyle\sum_i \mathrm{softmax}(x)_i \, b_i\big)

    The target is "two-hot": it divides its weight between the two bins next to
    :math:`\mathrm{symlog}(y)`. The gradient therefore does not grow with the scale of the rewards.
    Predictions start at zero. This is the form of TD-MPC2 (Hansen et al., 2024, arXiv 2310.16828)
    and of the first version of DreamerV3 (Hafner et al., 2023, arXiv 2301.04104);
    :class:`torchrl.modules.SymExpTwoHot` averages the bins after symexp instead. A prediction for
    random targets is symexp of the mean of their symlog, which is closer to zero than their mean
    if they have one sign.

    Args:
        bins: number of bins, at least 2.
        limit: largest absolute value in units of symlog; larger targets are clamped. The default
            covers returns of up to 22,025.

    Examples:
        >>> two_hot = TwoHot(bins=5, limit=2.0)
        >>> two_hot.encode(symexp(torch.tensor([0.25])))
        tensor([[0.0000, 0.0000, 0.7500, 0.2500, 0.0000]])
        >>> two_hot.decode(torch.zeros(3, 5))
        tensor([0., 0., 0.])
    """

    bins: int = 101
    limit: float = 10.0

    def __post_init__(self) -> None:
        if self.bins < 2 or not 0 < self.limit < torch.inf:
            raise ValueError(f"expected at least 2 bins and a finite limit > 0, got {self}")

    def encode(self, target: Tensor) -> Tensor:
        """Returns the weights of the bins, ``[..., bins]``, for targets ``[...]``."""
        step = 2 * self.limit / (self.bins - 1)
        scaled = symlog(target).clamp(-self.limit, self.limit)
        # Not TorchRL's two_hot_encode: it writes in place, which torch.vmap refuses.
        distance = (scaled.unsqueeze(-1) - self._positions(target)).abs()
        return (1 - distance / step).clamp(min=0)

    def decode(self, logits: Tensor) -> Tensor:
        """Returns the predictions ``[...]`` for logits ``[..., bins]``."""
        return symexp((logits.softmax(-1) * self._positions(logits)).sum(-1))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Returns the cross-entropy ``[..., N]`` for logits ``[..., N, bins]``, in nats.

        ``target`` is ``[..., N]``, or ``[..., 1]`` for all ``N`` predictions.
        """
        return -(self.encode(target) * logits.log_softmax(-1)).sum(-1)

    def _positions(self, like: Tensor) -> Tensor:
        """Returns the positions of the bins in units of symlog, ``[bins]``."""
        limits = (-self.limit, self.limit)
        return torch.linspace(*limits, self.bins, dtype=like.dtype, device=like.device)


class TwoHotNetwork(nn.Module):
    """Adds predictions ``[..., N]`` to the logits ``[..., N, bins]`` of a network."""

    def __init__(self, network: nn.Module, two_hot: TwoHot) -> None:
        super().__init__()
        self.network = network
        self.two_hot = two_hot
        for layer in network.modules():
            if isinstance(layer, FullPrecisionLinear):  # the last layer of a LayerNormMLP
                nn.init.zeros_(layer.weight)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits and predictions."""
        logits = self.network(*inputs).unflatten(-1, (-1, self.two_hot.bins))
        return logits, self.two_hot.decode(logits)

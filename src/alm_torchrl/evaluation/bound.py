"""The lower bound on the return that ALM maximises."""

from __future__ import annotations

import torch
from torch import Tensor

from alm_torchrl.objectives.alm import ALMLoss

__all__ = ["lower_bound"]


@torch.no_grad()
def lower_bound(loss: ALMLoss, latent: Tensor, action: Tensor | None = None) -> Tensor:
    r"""The K-step lower bound of the return from given latents, along one imagined rollout.

    .. math:: L^K = \sum_{t<K} \gamma^t \left(r(z_t, a_t) + c \cdot \mathrm{logratio}_t\right)
              + \gamma^K \min_i Q_i(z_K, a_K)

    Args:
        loss: the objective, whose networks, horizon, discount and coefficient are used.
        latent: where to start, ``[B, D]``.
        action: the first action, ``[B, A]``; drawn from the actor by default.

    Returns:
        The bound, ``[B, 1]``, in units of return.
    """
    return loss.bound(loss.imagine(latent, action))

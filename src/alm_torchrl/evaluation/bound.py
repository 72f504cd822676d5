"""The lower bound on the return that ALM maximizes."""

from __future__ import annotations

import torch
from torch import Tensor

from alm_torchrl.objectives.alm import ALMLoss

__all__ = ["lower_bound"]


@torch.no_grad()
def lower_bound(loss: ALMLoss, latent: Tensor, action: Tensor | None = None) -> Tensor:
    r"""The K-step bound from given latents, along one imagined rollout, as ALM maximizes it.

    .. math:: L^K = \sum_{t<K} \gamma^t \left(r(z_t, a_t) + c \cdot \mathrm{logratio}_t\right)
              + \gamma^K \min_i Q_i(z_K, a_K)

    Without the theorem's logarithms, and with learnt rewards and values, it is an estimate of the
    return, and nothing keeps it below; :func:`alm_torchrl.evaluation.value_bias` measures by how
    much it is off. The theorem itself is
    :func:`~alm_torchrl.objectives.functional.log_return_bound`.

    Args:
        loss: the objective, whose networks, horizon, discount and coefficient are used.
        latent: where to start, ``[B, D]``.
        action: the first action, ``[B, A]``; drawn from the actor by default.

    Returns:
        The bound, ``[B, 1]``, in units of return.
    """
    return loss.bound(loss.imagine(latent, action))

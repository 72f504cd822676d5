r"""The mathematics of Aligned Latent Models as pure functions of tensors.

Notation, as in Ghugare et al. (2023), arXiv 2209.08466: observation :math:`s`, latent :math:`z`,
action :math:`a`, encoder :math:`e`, latent dynamics :math:`m`, policy :math:`\pi`, reward
:math:`r`, discount :math:`\gamma`, horizon :math:`K`.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F

from alm_torchrl.distributions import OneHotGroups, one_hot_kl

__all__ = [
    "detached",
    "discounts",
    "episode_mask",
    "k_step_bound",
    "kl_divergence",
    "lambda_returns",
    "log_ratio",
    "log_return_bound",
    "masked_mean",
    "squared_distance",
    "survival",
    "td_target",
]


def kl_divergence(p: D.Distribution, q: D.Distribution) -> Tensor:
    r"""The KL divergence of two latent distributions, in nats ``[...]``.

    For diagonal Normals it is

    .. math:: KL(p \| q) = \sum_d \log\frac{\sigma^q_d}{\sigma^p_d}
              + \frac{(\sigma^p_d)^2 + (\mu^p_d - \mu^q_d)^2}{2 (\sigma^q_d)^2} - \frac{1}{2}

    This and the divergence of :class:`~alm_torchrl.distributions.OneHotGroups` compile without a
    graph break. Other pairs need :func:`torch.distributions.register_kl`.

    Raises:
        NotImplementedError: if no divergence is registered for the pair.

    Examples:
        >>> p = D.Independent(D.Normal(torch.zeros(3, 2), 1.0), 1)
        >>> q = D.Independent(D.Normal(torch.ones(3, 2), 1.0), 1)
        >>> kl_divergence(p, q)
        tensor([1., 1., 1.])
    """
    if _is_diagonal_normal(p) and _is_diagonal_normal(q):
        first, second = p.base_dist, q.base_dist
        variance_ratio = (first.scale / second.scale).square()
        distance = ((first.loc - second.loc) / second.scale).square()
        return 0.5 * (variance_ratio + distance - 1 - variance_ratio.log()).sum(-1)
    if isinstance(p, OneHotGroups) and isinstance(q, OneHotGroups):
        return one_hot_kl(p, q)
    return D.kl_divergence(p, q)


def _is_diagonal_normal(dist: D.Distribution) -> TypeGuard[Any]:
    return (
        isinstance(dist, D.Independent)
        and isinstance(dist.base_dist, D.Normal)
        and dist.reinterpreted_batch_ndims == 1
    )


def squared_distance(p: D.Distribution, q: D.Distribution) -> Tensor:
    r"""The squared distance :math:`\sum_d (\mu^p_d - \mu^q_d)^2` of the means, ``[...]``.

    For two Normals of scale :math:`\sigma`, it equals :math:`2 \sigma^2` times the KL divergence.

    Examples:
        >>> p = D.Independent(D.Normal(torch.zeros(3, 2), 1.0), 1)
        >>> q = D.Independent(D.Normal(torch.ones(3, 2), 5.0), 1)
        >>> squared_distance(p, q)
        tensor([2., 2., 2.])
    """
    return (p.mean - q.mean).square().sum(-1)


def log_ratio(logits: Tensor) -> Tensor:
    r"""The classifier's estimate of :math:`\log e(z' \mid s') - \log m(z' \mid z, a)`.

    It is ``[..., 1]``, in nats. Class 1 of the ``logits`` ``[..., 2]`` is an encoded next latent.

    Examples:
        >>> log_ratio(torch.tensor([[0.5, 2.0]]))
        tensor([[1.5000]])
    """
    return logits[..., 1:2] - logits[..., 0:1]


def td_target(reward: Tensor, terminated: Tensor, next_value: Tensor, gamma: Tensor) -> Tensor:
    r"""The one-step target :math:`y = r + \gamma (1 - \mathrm{terminated}) Q(z', a')`.

    All but the scalar ``gamma`` are ``[..., 1]``. Pass ``terminated``, not ``done``: a time limit
    is not a termination.

    Examples:
        >>> r, end = torch.ones(2, 1), torch.tensor([[False], [True]])
        >>> td_target(r, end, 10 * r, torch.tensor(0.9)).flatten()
        tensor([10.,  1.])
    """
    return reward + gamma * torch.where(terminated, torch.zeros_like(next_value), next_value)


def discounts(gamma: Tensor, steps: int) -> Tensor:
    r"""The weights :math:`1, \gamma, \gamma^2, \dots` of a rollout, ``[steps, 1]``.

    Examples:
        >>> discounts(torch.tensor(0.5), 3).flatten()
        tensor([1.0000, 0.5000, 0.2500])
    """
    return gamma ** torch.arange(steps, device=gamma.device).unsqueeze(-1)


def survival(continuation: Tensor) -> Tensor:
    r"""The probability that an episode reaches each step of a rollout, ``[..., K + 1, 1]``.

    .. math:: \textstyle\prod_{i<t} d_i, \qquad t = 0, \dots, K

    ``continuation`` is the probability :math:`d_t` that a step does not terminate, ``[..., K, 1]``.

    Examples:
        >>> survival(torch.tensor([[0.5], [0.5]])).flatten()
        tensor([1.0000, 0.5000, 0.2500])
    """
    return F.pad(continuation, (0, 0, 1, 0), value=1.0).cumprod(-2)


def lambda_returns(
    reward: Tensor, value: Tensor, continuation: Tensor, gamma: Tensor, lmbda: Tensor | float
) -> Tensor:
    r"""The TD-lambda returns ``[..., K, 1]`` of a rollout that may terminate at every step.

    .. math:: G_t = r_t + \gamma d_t \big((1 - \lambda) V_{t+1} + \lambda G_{t+1}\big),
              \qquad G_K = V_K

    Args:
        reward: :math:`r_t`, ``[..., K, 1]``.
        value: value :math:`V_{t+1}` of the state after each step, ``[..., K, 1]``.
        continuation: probability :math:`d_t` that the step does not terminate, ``[..., K, 1]``.
        gamma: discount, a scalar.
        lmbda: weight of the longer returns, between 0 and 1.

    Examples:
        >>> one = torch.ones(2, 1)
        >>> lambda_returns(one, 10 * one, 0.5 * one, torch.tensor(0.9), 1.0).flatten()
        tensor([3.4750, 5.5000])
    """
    following = value[..., -1, :]
    returns = []
    for t in reversed(range(reward.shape[-2])):
        mixed = (1 - lmbda) * value[..., t, :] + lmbda * following
        following = reward[..., t, :] + gamma * continuation[..., t, :] * mixed
        returns.append(following)
    return torch.stack(returns[::-1], -2)


def k_step_bound(
    reward: Tensor, value: Tensor, gamma: Tensor, continuation: Tensor | None = None
) -> Tensor:
    r"""The K-step lower bound of a rollout in the form that ALM maximizes, ``[..., 1]``.

    .. math:: L^K = \sum_{t<K} \gamma^t \big(\textstyle\prod_{i<t} d_i\big) \tilde r_t
              + \gamma^K \big(\textstyle\prod_{i<K} d_i\big) Q(z_K, a_K)

    Args:
        reward: augmented rewards :math:`\tilde r_t` (reward plus weighted log-ratio),
            ``[..., K, 1]``.
        value: value of the last state, ``[..., 1]``.
        gamma: discount, a scalar.
        continuation: probability :math:`d_t` that a step does not terminate, ``[..., K, 1]``; one
            by default.

    Examples:
        >>> k_step_bound(torch.ones(4, 3, 1), torch.zeros(4, 1), torch.tensor(0.5)).flatten()
        tensor([1.7500, 1.7500, 1.7500, 1.7500])
    """
    steps = reward.shape[-2]
    if continuation is not None:
        alive = survival(continuation)
        reward, value = alive[..., :-1, :] * reward, alive[..., -1, :] * value
    return (discounts(gamma, steps) * reward).sum(-2) + gamma**steps * value


def log_return_bound(
    reward: Tensor,
    log_ratio: Tensor,
    value: Tensor,
    gamma: Tensor,
    continuation: Tensor | None = None,
) -> Tensor:
    r"""The K-step lower bound on the log-return, in the form of the theorem, ``[..., 1]``.

    .. math:: \mathcal{L}^K = \sum_{t<K} \gamma^t \big(\textstyle\prod_{i<t} d_i\big)
              \big((1 - \gamma) \log r_t + \rho_t\big)
              + \gamma^K \big(\textstyle\prod_{i<K} d_i\big) \log Q_K,
              \qquad \rho_t = \log e(z_{t+1} \mid s_{t+1}) - \log m(z_{t+1} \mid z_t, a_t)

    Its mean over imagined trajectories is at most
    :math:`\log \mathbb{E}[(1 - \gamma) \sum_t \gamma^t r_t]` over real trajectories, if rewards
    and values are exact. Both sides use :math:`r_t = 1` after a termination. See
    :func:`k_step_bound` for the form used in practice.

    Args:
        reward: positive rewards, ``[..., K, 1]``.
        log_ratio: log-ratio of encoder and model in nats, or the negated divergence
            :math:`KL(m \| e)`, ``[..., K, 1]``.
        value: normalized value :math:`\mathbb{E}[(1 - \gamma) \sum_t \gamma^t r_{K+t}]` of the last
            state and action, ``[..., 1]``.
        gamma: discount, a scalar.
        continuation: probability :math:`d_t` that a step does not terminate, ``[..., K, 1]``; one
            by default.

    Examples:
        >>> r, gamma = torch.full((4, 3, 1), 2.0), torch.tensor(0.5)
        >>> log_return_bound(r, 0 * r, r[:, 0], gamma).exp().flatten()
        tensor([2., 2., 2., 2.])
    """
    augmented = (1 - gamma) * reward.log() + log_ratio
    return k_step_bound(augmented, value.log(), gamma, continuation)


def episode_mask(done: Tensor, valid: Tensor | None = None) -> Tensor:
    """Marks the steps of a window that belong to the episode of its first step, bool ``[B, T]``.

    Args:
        done: true for the last step of an episode, bool ``[B, T]``.
        valid: true for steps with data, bool ``[B, T]``. The mask ends before the first invalid
            step. By default, all steps are valid.

    Examples:
        >>> episode_mask(torch.tensor([[False, True, False]]))
        tensor([[ True,  True, False]])
    """
    inside = torch.cat([torch.ones_like(done[:, :1]), ~done[:, :-1]], dim=1)
    if valid is not None:
        inside = inside & valid
    return inside.int().cumprod(1).bool()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of values ``[*mask.shape, ...]`` over the entries with a true mask.

    Examples:
        >>> masked_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    means = values.reshape(*mask.shape, -1).mean(-1)
    return torch.where(mask, means, 0).sum() / mask.sum().clamp_min(1)


def detached(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The metrics without gradients."""
    return {name: value.detach() for name, value in metrics.items()}

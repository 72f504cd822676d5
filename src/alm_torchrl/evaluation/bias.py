"""The bound on the return, and the bias of values and bound relative to Monte-Carlo returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictSequential
from tensordict.utils import unravel_key
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives.value.functional import reward2go

from alm_torchrl.objectives.alm import ALMLoss


class UnknownReturnsError(ValueError):
    """No return of a rollout is known, because of a time limit or the end of the rollout."""


class Bias(NamedTuple):
    """Normalized biases of the smallest action value and the K-step bound.

    Each has a mean and a standard deviation over states. ``monte_carlo`` is the mean discounted
    return.
    """

    value: Tensor
    value_std: Tensor
    bound: Tensor
    bound_std: Tensor
    monte_carlo: Tensor
    states: Tensor


@torch.no_grad()
def lower_bound(loss: ALMLoss, latent: Tensor, action: Tensor | None = None) -> Tensor:
    r"""Returns the K-step bound that ALM maximizes ``[B, 1]``, along one imagined rollout.

    .. math:: L^K = \sum_{t<K} \gamma^t \left(r(z_t, a_t) + c \cdot \mathrm{logratio}_t\right)
              + \gamma^K \min_i Q_i(z_K, a_K)

    It may exceed the return, because rewards and values are learned and the logarithms of the
    theorem are omitted; :func:`value_bias` measures by how much. See
    :func:`~alm_torchrl.objectives.functional.log_return_bound` for the bound of the theorem.

    The rollout starts with latents ``[B, D]`` and actions ``[B, A]``, by default the actor's.
    """
    return loss.bound(loss.imagine(latent, action))


def steps_to_end(done: Tensor, terminated: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the steps to the end of the episode or rollout, and whether a termination is there.

    The last step has 1 to go. All tensors are ``[..., T, 1]``; the second result is bool.
    """
    ends = (terminated & done).float()
    return reward2go(torch.ones_like(ends), done, 1.0), reward2go(ends, done, 1.0) > 0.5


@torch.no_grad()
def rollout_for_bias(loss: ALMLoss, env: EnvBase, steps: int = 1000) -> TensorDictBase:
    """Plays with the policy whose value the loss estimates: its actor with clipped noise.

    Returns the entries that the loss reads, ``[N, steps]``, from ``N`` environments. A finished
    episode is followed by a new one.
    """
    policy = TensorDictSequential(loss.encoder, loss.actor)
    with set_exploration_type(ExplorationType.RANDOM):
        rollout = env.rollout(steps, policy, break_when_any_done=False, auto_cast_to_device=True)
    rollout = rollout.select(*loss.in_keys)
    return rollout if rollout.ndim == 2 else rollout.unsqueeze(0)


def monte_carlo_returns(
    reward: Tensor, done: Tensor, terminated: Tensor, gamma: float, *, tail: float = 0.03
) -> tuple[Tensor, Tensor]:
    r"""Returns the discounted returns of a rollout, and for which steps they are known.

    A termination ends a return. A time limit or the end of the rollout hides the rest of a return,
    which is then known only if the hidden share of an infinite-horizon return is at most ``tail``:
    :math:`\gamma^n \le` ``tail`` with :math:`n` steps left (349 at a discount of 0.99). Nothing is
    bootstrapped, because that would use the values under test.

    All tensors are ``[..., T, 1]``. The flags ``done`` (any end of an episode) and ``terminated``
    (a terminal state) and the second result are bool.

    Examples:
        >>> reward, never = torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.bool)
        >>> returns, counted = monte_carlo_returns(reward, never, never, 0.5, tail=0.25)
        >>> returns.flatten(), counted.flatten()
        (tensor([1.8750, 1.7500, 1.5000, 1.0000]), tensor([ True,  True,  True, False]))
    """
    remaining, ends = steps_to_end(done, terminated)
    return reward2go(reward, done, gamma), ends | (gamma**remaining <= tail)


def normalized_bias(estimate: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and std of ``error / |mean return|`` (Chen et al., 2021, REDQ)."""
    errors = (estimate - returns) / returns.mean().abs()
    return errors.mean(), errors.std(correction=0)


@torch.no_grad()
def value_bias(loss: ALMLoss, rollout: TensorDictBase, *, tail: float = 0.03) -> Bias:
    """Compares values and bounds with the returns of a rollout; a positive bias is too high.

    See :func:`rollout_for_bias` for the rollout ``[N, T]``, and :func:`monte_carlo_returns` for
    ``tail``.

    Raises:
        UnknownReturnsError: if no return is known.
    """
    keys = loss.tensor_keys
    reward, done, terminated = (
        rollout.get(unravel_key(("next", key))) for key in (keys.reward, keys.done, keys.terminated)
    )
    gamma = float(loss.value_estimator.gamma)
    returns, counted = monte_carlo_returns(reward, done, terminated, gamma, tail=tail)
    if not counted.any():
        raise UnknownReturnsError(
            f"no return is known to within {tail:.0%}: each of the {rollout.shape[-1]} steps is "
            "too close to a time limit or the end of the rollout; play more steps, or raise `tail`"
        )
    rows = counted.squeeze(-1)
    visited, returns = rollout[rows], returns[rows].squeeze(-1)
    latent, action = loss.encode(visited), visited.get(keys.action)
    value = loss.value(latent, action).squeeze(-1)
    bound = lower_bound(loss, latent, action).squeeze(-1)
    return Bias(
        *normalized_bias(value, returns),
        *normalized_bias(bound, returns),
        returns.mean(),
        rows.sum(),
    )

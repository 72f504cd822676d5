"""How far the estimates of the return are from the returns that follow."""

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

from alm_torchrl.evaluation.bound import lower_bound
from alm_torchrl.objectives.alm import ALMLoss

__all__ = [
    "Bias",
    "UnknownReturnsError",
    "monte_carlo_returns",
    "normalized_bias",
    "rollout_for_bias",
    "value_bias",
]


class UnknownReturnsError(ValueError):
    """No return of a rollout is known: all are hidden by a time limit or by the rollout's end."""


class Bias(NamedTuple):
    """What the estimates of a loss are off by, over the states of a rollout."""

    value: Tensor
    """Normalized bias of the smallest action value, a mean over states."""
    value_std: Tensor
    """Its standard deviation over states."""
    bound: Tensor
    """Normalized bias of the K-step bound."""
    bound_std: Tensor
    """Its standard deviation over states."""
    monte_carlo: Tensor
    """Mean discounted return that followed, in units of return."""
    states: Tensor
    """How many states counted."""


@torch.no_grad()
def rollout_for_bias(loss: ALMLoss, env: EnvBase, steps: int = 1000) -> TensorDictBase:
    """Plays with the policy that the loss's values are about: its actor, with its clipped noise.

    Args:
        loss: the objective.
        env: one environment, or several stepped together; an episode that ends is followed by
            another.
        steps: steps of each.

    Returns:
        What the loss reads, ``[N, steps]``.
    """
    policy = TensorDictSequential(loss.encoder, loss.actor)
    with set_exploration_type(ExplorationType.RANDOM):
        rollout = env.rollout(steps, policy, break_when_any_done=False, auto_cast_to_device=True)
    rollout = rollout.select(*loss.in_keys)
    return rollout if rollout.ndim == 2 else rollout.unsqueeze(0)


def monte_carlo_returns(
    reward: Tensor, done: Tensor, terminated: Tensor, gamma: float, *, tail: float = 0.03
) -> tuple[Tensor, Tensor]:
    r"""The discounted returns of a rollout, and for which steps they are known.

    A return ends with a termination. A time limit, or the end of the rollout, only hides the rest
    of it, so that a step counts only if no more than a share ``tail`` of an endless return lies
    beyond: :math:`\gamma^n \le` ``tail`` with :math:`n` steps up to there (349 of them at a
    discount of 0.99). Nothing is bootstrapped, since that would bring in the values in question.

    Args:
        reward: ``[..., T, 1]``.
        done: whether an episode ended with the step, for any reason, bool ``[..., T, 1]``.
        terminated: whether it ended in a terminal state, bool ``[..., T, 1]``.
        gamma: discount.
        tail: largest share that may be missing.

    Returns:
        The returns, and whether each counts, bool; both ``[..., T, 1]``.

    Examples:
        >>> reward, never = torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.bool)
        >>> returns, counted = monte_carlo_returns(reward, never, never, 0.5, tail=0.25)
        >>> returns.flatten(), counted.flatten()
        (tensor([1.8750, 1.7500, 1.5000, 1.0000]), tensor([ True,  True,  True, False]))
    """
    remaining = reward2go(torch.ones_like(reward), done, 1.0)  # also ends where the rollout does
    ends = reward2go((terminated & done).to(reward.dtype), done, 1.0) > 0.5
    return reward2go(reward, done, gamma), ends | (gamma**remaining <= tail)


def normalized_bias(estimate: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and standard deviation of :math:`(\mathrm{estimate} - G) / |\mathrm{mean}\, G|`.

    As Chen et al. (2021, REDQ) plot it: the error of each state over the size of the mean return.

    Args:
        estimate: of the discounted return, ``[N]``.
        returns: the discounted returns :math:`G` that followed, ``[N]``.

    Returns:
        Both over the ``N`` states, scalars.

    Examples:
        >>> normalized_bias(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0]))
        (tensor(0.), tensor(0.5000))
    """
    errors = (estimate - returns) / returns.mean().abs()
    return errors.mean(), errors.std(correction=0)


@torch.no_grad()
def value_bias(loss: ALMLoss, rollout: TensorDictBase, *, tail: float = 0.03) -> Bias:
    """Compares the estimates of a loss with the returns that followed the states of a rollout.

    Args:
        loss: the objective, whose discount is used.
        rollout: what :func:`rollout_for_bias` returns, ``[N, T]``.
        tail: largest share of an endless return that may lie beyond a time limit; see
            :func:`monte_carlo_returns`.

    Returns:
        The normalized biases; positive ones overestimate.

    Raises:
        UnknownReturnsError: if no state is far enough from the end of its episode or of the
            rollout.
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
            "too near to a time limit or the end of the rollout; visit more steps, or raise `tail`"
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

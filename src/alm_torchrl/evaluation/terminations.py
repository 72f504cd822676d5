"""How well a model knows where episodes terminate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor
from torchrl.objectives.value.functional import reward2go

from alm_torchrl.evaluation.bias import steps_to_end
from alm_torchrl.evaluation.diagnostics import calibration
from alm_torchrl.objectives.alm import ALMLoss


class Terminations(NamedTuple):
    """Predicted against real terminations; an entry is NaN if the rollout does not determine it.

    A step is predicted to terminate if its probability is at least one half.
    """

    precision: Tensor
    """Share of predicted terminations that are real."""
    recall: Tensor
    """Share of real terminations that are predicted."""
    calibration_error: Tensor
    """Expected calibration error of the probability, over ten bins."""
    imagined_length: Tensor
    """Mean steps of an imagined episode, counted up to ``steps``."""
    real_length: Tensor
    """Mean steps of a real episode, counted up to ``steps``."""
    imagined_return: Tensor
    """Mean discounted return of an imagined episode over at most ``steps`` steps."""
    real_return: Tensor
    """Mean discounted return of a real episode over at most ``steps`` steps."""
    starting_value: Tensor
    """Mean value of the first step of these episodes, which no number of steps limits."""
    value_near_end: Tensor
    """Mean value of the last ``near`` steps before a termination."""
    return_near_end: Tensor
    """Mean discounted return of these steps."""


@torch.no_grad()
def terminations(
    loss: ALMLoss, rollout: TensorDictBase, *, steps: int = 200, near: int = 15
) -> Terminations:
    """Compares imagined episodes, and values before terminations, with those of a rollout.

    If real and imagined return agree but the value is far above them, the values are too high where
    the policy goes. If only the imagined return is too high, the model is wrong there. Without a
    continuation model, imagined episodes do not terminate.

    Args:
        loss: the loss with its networks.
        rollout: steps ``[N, T]`` of :func:`~alm_torchrl.evaluation.rollout_for_bias`.
        steps: episodes are compared up to this length. Episodes that start later than ``steps``
            before the end of the rollout, or reach a time limit earlier, do not count.
        near: number of steps before a termination in which values are compared with returns.
    """
    keys = loss.tensor_keys
    reward, done, terminated = (
        rollout.get(unravel_key(("next", key))) for key in (keys.reward, keys.done, keys.terminated)
    )
    latent, action = loss.encode(rollout), rollout.get(keys.action)
    ends = torch.zeros_like(reward)
    if loss.continuation_model is not None:
        following = loss.encode(rollout.get("next"))
        ends = (-loss.continuation(latent, action, following)).sigmoid()
    predicted, real = ends >= 0.5, terminated & done
    hits = (predicted & real).sum()

    left, known = steps_to_end(done, terminated)
    starts = torch.cat([torch.ones_like(done[:, :1]), done[:, :-1]], 1)
    starts[:, max(rollout.shape[1] - steps + 1, 0) :] = False
    starts &= known | (left >= steps)
    close = known & (left <= near)
    gamma = float(loss.value_estimator.gamma)
    returns = reward2go(reward, done, gamma)
    later = torch.zeros_like(returns)  # the return after `steps` steps of the same episode
    later[:, :-steps] = torch.where(left[:, :-steps] > steps, returns[:, steps:], 0)
    rows = starts.squeeze(-1)
    length, imagined_return = _imagine(loss, latent[rows], steps)
    return Terminations(
        hits / predicted.sum(),
        hits / real.sum(),
        calibration(ends.flatten(), real.flatten()).error,
        length,
        left[starts].clamp_max(steps).mean(),
        imagined_return,
        (returns - gamma**steps * later)[starts].mean(),
        loss.value(latent[rows], action[rows]).mean(),
        loss.value(latent, action)[close].mean(),
        returns[close].mean(),
    )


def _imagine(loss: ALMLoss, latent: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Returns the mean length and discounted return of imagined episodes from latents ``[B, D]``.

    Both weight step ``t`` by the probability that the episode goes on to it.
    """
    alive = torch.ones_like(latent[:, :1])
    length, returns = torch.zeros_like(alive), torch.zeros_like(alive)
    gamma = float(loss.value_estimator.gamma)
    for t in range(steps):
        action = loss.act(latent)
        length, returns = length + alive, returns + gamma**t * alive * loss.reward(latent, action)
        following, _ = loss.next(latent, action)
        if loss.continuation_model is not None:
            alive = alive * loss.continuation(latent, action, following).sigmoid()
        latent = following
    return length.mean(), returns.mean()

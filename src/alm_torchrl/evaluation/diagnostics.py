"""Diagnostics of a model: its latents, dynamics and classifier."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from alm_torchrl.objectives.alm import ALMLoss
from alm_torchrl.objectives.functional import episode_mask, log_ratio


class Calibration(NamedTuple):
    """How well probabilities agree with frequencies."""

    error: Tensor
    """The expected calibration error, a scalar in [0, 1]."""
    confidence: Tensor
    """Mean probability of each bin, NaN in an empty one, ``[bins]``."""
    frequency: Tensor
    """Share of label 1 in each bin, NaN in an empty one, ``[bins]``."""
    sizes: Tensor
    """Samples in each bin, ``[bins]``."""


def effective_rank(latents: Tensor) -> Tensor:
    r"""The number of directions in which latents vary: exponential entropy of the spectrum.

    .. math:: \exp\Big(-\sum_d p_d \log p_d\Big), \qquad p_d = \sigma_d / \sum_k \sigma_k

    over the singular values of the centered latents (Roy and Vetterli, 2007). It is ``D`` for equal
    variance in all directions, and 1 for variance in one direction.

    Args:
        latents: ``[N, D]``.

    Returns:
        A scalar from 1 to ``D``; 0 if all latents are the same.

    Examples:
        >>> square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> effective_rank(square)
        tensor(2.)
    """
    spectrum = torch.linalg.svdvals(latents - latents.mean(0))
    total = spectrum.sum()
    shares = spectrum / total.clamp_min(torch.finfo(spectrum.dtype).tiny)
    return torch.where(total > 0, torch.special.entr(shares).sum().exp(), 0.0)


def rollout_error(predicted: Tensor, encoded: Tensor, mask: Tensor) -> Tensor:
    r"""The squared error of predicted latents by rollout length, relative to their variance.

    .. math:: \frac{\mathbb{E} \lVert \hat z_t - z_t \rVert^2}{\sum_d \mathrm{Var}(z_{t, d})}

    It is 1 for a model that always predicts the mean (the fraction of variance unexplained).

    Args:
        predicted: latents after 1, 2, ... steps, ``[B, T, D]``.
        encoded: encoded latents of the same steps, ``[B, T, D]``.
        mask: valid steps, bool ``[B, T]``.

    Returns:
        The error after each number of steps, ``[T]``; NaN without valid steps or variance.

    Examples:
        >>> z = torch.tensor([[[1.0]], [[-1.0]]])
        >>> rollout_error(0 * z, z, torch.ones(2, 1, dtype=torch.bool))
        tensor([1.])
    """
    weight = mask.unsqueeze(-1).to(encoded.dtype)
    mean = (weight * encoded).sum(0) / weight.sum(0)
    error = (weight * (predicted - encoded).square()).sum((0, 2))
    return error / (weight * (encoded - mean).square()).sum((0, 2))


def calibration(probability: Tensor, label: Tensor, bins: int = 10) -> Calibration:
    r"""Expected calibration error over bins of equal width.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{N} \, | \mathrm{frequency}_b -
              \mathrm{confidence}_b |

    (Guo et al., 2017, for the probability of class 1.)

    Args:
        probability: probability of label 1, ``[N]``.
        label: bool ``[N]``.
        bins: number of bins.

    Examples:
        >>> calibration(torch.tensor([0.7, 0.7]), torch.tensor([True, False]), bins=2).error
        tensor(0.2000)
    """
    index = (probability * bins).long().clamp_max(bins - 1)
    ones = torch.ones_like(probability)

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(probability[:1]).expand(bins).scatter_add(0, index, values)

    count, confidence, frequency = total(ones), total(probability), total(label * ones)
    error = (frequency - confidence).abs().sum() / count.sum()
    return Calibration(error, confidence / count, frequency / count, count)


def split_into_windows(rollout: TensorDictBase, length: int) -> TensorDictBase:
    """Cuts a rollout ``[N, T]`` into windows ``[N * (T // length), length]`` without overlap."""
    count = rollout.shape[1] // length
    if count < 1:
        raise ValueError(f"a rollout of {rollout.shape[1]} steps holds no window of {length}")
    return rollout[:, : count * length].reshape(-1, length)


@torch.no_grad()
def model_error(loss: ALMLoss, windows: TensorDictBase) -> Tensor:
    """The error of the latent dynamics by rollout length.

    The rollout starts at the encoder's mean for the first observation and follows the means of the
    dynamics along the recorded actions. Each is compared with the target encoder's mean.

    Args:
        loss: the objective.
        windows: see the loss's ``forward``, ``[B, T]`` of any length ``T``.

    Returns:
        :func:`rollout_error` after 1 to ``T`` steps, ``[T]``.
    """
    latent_key, action_key = loss.encoder.dist_sample_keys[-1], loss.actor.dist_sample_keys[-1]
    actions = windows.get(loss.tensor_keys.action)
    latent, predicted = loss.encoder.get_dist(windows[:, 0].select(*loss.encoder.in_keys)).mean, []
    for t in range(windows.shape[1]):
        step = TensorDict({latent_key: latent, action_key: actions[:, t]}, windows.shape[:1])
        latent = loss.dynamics.get_dist(step).mean
        predicted.append(latent)
    encoded = loss.encoding(windows.get("next")).mean
    done = windows.get(unravel_key(("next", loss.tensor_keys.done))).squeeze(-1)
    return rollout_error(torch.stack(predicted, 1), encoded, episode_mask(done))


@torch.no_grad()
def classifier_calibration(
    loss: ALMLoss, transitions: TensorDictBase, bins: int = 10
) -> Calibration:
    """The calibration of the classifier's probabilities.

    The classifier sees every transition twice: with the next latent from the target encoder
    (label 1) and from the latent dynamics (label 0). The transitions ``[N]`` are those of the
    loss's ``forward``.
    """
    latent_key, action_key = loss.encoder.dist_sample_keys[-1], loss.actor.dist_sample_keys[-1]
    action = transitions.get(loss.tensor_keys.action)
    step = TensorDict({latent_key: loss.encode(transitions), action_key: action}, transitions.shape)
    real = loss.encode(transitions.get("next"))
    imagined = loss.dynamics.get_dist(step).sample()
    probabilities = []
    for following in (real, imagined):
        shown = step.copy().set(loss.dynamics.dist_sample_keys[-1], following)
        logits = loss.classifier(shown).get(loss.classifier.out_keys[-1])
        probabilities.append(log_ratio(logits).squeeze(-1).sigmoid())
    label = torch.arange(2, device=action.device).repeat_interleave(len(action)) == 0
    return calibration(torch.cat(probabilities), label, bins)

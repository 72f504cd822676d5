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
    """The calibration error, and mean probability, share of label 1 and size of each bin.

    Mean and share of an empty bin are NaN.
    """

    error: Tensor
    confidence: Tensor
    frequency: Tensor
    sizes: Tensor


def effective_rank(latents: Tensor) -> Tensor:
    r"""Returns the effective number of directions in which latents ``[N, D]`` vary.

    .. math:: \exp\Big(-\sum_d p_d \log p_d\Big), \qquad p_d = \sigma_d / \sum_k \sigma_k

    over the singular values of the centered latents (Roy and Vetterli, 2007). It is ``D`` for equal
    variance in all directions, 1 for variance in one direction, and 0 without variance.

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
    """Returns the error ``[T]`` of latents ``[B, T, D]``; see :func:`model_error`."""
    weight = mask.unsqueeze(-1).to(encoded.dtype)
    mean = (weight * encoded).sum(0) / weight.sum(0)
    error = (weight * (predicted - encoded).square()).sum((0, 2))
    return error / (weight * (encoded - mean).square()).sum((0, 2))


def calibration(probability: Tensor, label: Tensor, bins: int = 10) -> Calibration:
    """Returns the calibration of probabilities ``[N]`` of label 1 over bins of equal width."""
    index = (probability * bins).long().clamp_max(bins - 1)
    ones = torch.ones_like(probability)

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(probability[:1]).expand(bins).scatter_add(0, index, values)

    count, confidence, frequency = total(ones), total(probability), total(label * ones)
    error = (frequency - confidence).abs().sum() / count.sum()
    return Calibration(error, confidence / count, frequency / count, count)


def split_into_windows(rollout: TensorDictBase, length: int) -> TensorDictBase:
    """Splits a rollout ``[N, T]`` into windows ``[N * (T // length), length]`` without overlap."""
    count = rollout.shape[1] // length
    if count < 1:
        raise ValueError(f"a rollout of {rollout.shape[1]} steps is shorter than length={length}")
    return rollout[:, : count * length].reshape(-1, length)


@torch.no_grad()
def model_error(loss: ALMLoss, windows: TensorDictBase) -> Tensor:
    r"""Returns the normalized squared error of the latent dynamics after 1 to ``T`` steps, ``[T]``.

    .. math:: \frac{\mathbb{E} \lVert \hat z_t - z_t \rVert^2}{\sum_d \mathrm{Var}(z_{t, d})}

    :math:`\hat z_t` starts at the encoder's mean for the first observation of a window ``[B, T]``
    and follows the means of the dynamics along the recorded actions; :math:`z_t` are the target
    encoder's means. This fraction of unexplained variance is 1 for a model that always predicts
    the mean, and NaN without valid steps or variance.
    """
    actions = windows.get(loss.tensor_keys.action)
    latent, predicted = loss.encoder.get_dist(windows[:, 0].select(*loss.encoder.in_keys)).mean, []
    for t in range(windows.shape[1]):
        latent = loss.dynamics.get_dist(_step(loss, latent, actions[:, t])).mean
        predicted.append(latent)
    encoded = loss.encoding(windows.get("next")).mean
    done = windows.get(unravel_key(("next", loss.tensor_keys.done))).squeeze(-1)
    return rollout_error(torch.stack(predicted, 1), encoded, episode_mask(done))


@torch.no_grad()
def classifier_calibration(
    loss: ALMLoss, transitions: TensorDictBase, bins: int = 10
) -> Calibration:
    r"""Returns the calibration of the classifier on transitions ``[N]``.

    The classifier reads every transition twice: with a next latent from the target encoder
    (label 1) and with one from the latent dynamics (label 0). Its expected calibration error over
    bins of equal width (Guo et al., 2017) is

    .. math:: \sum_b \frac{n_b}{N} \, | \mathrm{frequency}_b - \mathrm{confidence}_b |
    """
    step = _step(loss, loss.encode(transitions), transitions.get(loss.tensor_keys.action))
    real = loss.encode(transitions.get("next"))
    imagined = loss.dynamics.get_dist(step).sample()
    probabilities = []
    for following in (real, imagined):
        inputs = step.copy().set(loss.dynamics.dist_sample_keys[-1], following)
        logits = loss.classifier(inputs).get(loss.classifier.out_keys[-1])
        probabilities.append(log_ratio(logits).squeeze(-1).sigmoid())
    label = torch.arange(2, device=real.device).repeat_interleave(len(real)) == 0
    return calibration(torch.cat(probabilities), label, bins)


def _step(loss: ALMLoss, latent: Tensor, action: Tensor) -> TensorDict:
    """Returns latents and actions under the keys that the networks read."""
    keys = loss.encoder.dist_sample_keys[-1], loss.actor.dist_sample_keys[-1]
    return TensorDict(dict(zip(keys, (latent, action), strict=True)), latent.shape[:1])

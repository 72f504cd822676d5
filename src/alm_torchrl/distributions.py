"""The distributions of latents and actions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributions as D
from torch.distributions import constraints
from torchrl.modules import IndependentNormal

__all__ = ["ClampedNormal", "DiagonalNormal", "OneHotGroups"]


class DiagonalNormal(IndependentNormal):
    """TorchRL's diagonal Normal ``[..., D]``, with samples that work under ``torch.vmap``.

    Examples:
        >>> def draw(loc):
        ...     return DiagonalNormal(loc, torch.ones(2)).rsample()
        >>> torch.vmap(draw, randomness="different")(torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(loc, scale, validate_args=False)

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws samples ``[*sample_shape, ..., D]`` with a gradient."""
        shape = self._extended_shape(torch.Size(sample_shape))
        loc, scale = self.base_dist.loc, self.base_dist.scale
        return loc + scale * torch.randn(shape, dtype=loc.dtype, device=loc.device)


class ClampedNormal(D.Independent):
    r"""A Normal whose noise is clipped and whose sample is clamped to a box.

    .. math:: a = \mathrm{clamp}(\mu + \mathrm{clip}(\sigma\epsilon, -c, c),\;
              low + \delta,\; high - \delta), \quad \epsilon \sim N(0, I)

    The gradient of the clamp is the identity (straight-through), so actions at a border still
    receive a gradient. This is the "truncated normal" of DrQ-v2 (Yarats et al., 2021). It has
    probability mass at the borders and therefore no density: ``log_prob`` and ``entropy`` raise
    errors. In contrast, :class:`torchrl.modules.TruncatedNormal` renormalizes the density.

    Args:
        loc: center of the noise, ``[..., A]``, in action units.
        scale: standard deviation of the noise before clipping, broadcastable to ``loc``.
        low: lower end of the action range; a float, or a tensor broadcastable to ``[A]``.
        high: upper end of the action range.
        noise_clip: largest absolute noise; no clipping by default. ALM clips at 0.3 in its losses,
            but not in the environment.
        margin: distance :math:`\delta` from the ends of the range, at most a quarter of the range.

    Examples:
        >>> dist = ClampedNormal(torch.tensor([0.9, -2.0]), torch.ones(2), noise_clip=0.3)
        >>> dist.deterministic_sample
        tensor([ 0.9000, -1.0000])
        >>> bool((dist.rsample((1000,))[:, 0] >= 0.6 - 1e-6).all())
        True
    """

    num_params: int = 2

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor | float,
        low: Tensor | float = -1.0,
        high: Tensor | float = 1.0,
        *,
        noise_clip: Tensor | float | None = None,
        margin: float = 1e-6,
    ) -> None:
        if not isinstance(scale, Tensor):
            scale = torch.full_like(loc, scale)
        low, high = _match(low, loc), _match(high, loc)
        kept = (high - low) / 4  # the ends of a narrow range must not cross
        kept = kept.clamp(max=margin) if isinstance(kept, Tensor) else min(kept, margin)
        self._low, self._high = low + kept, high - kept
        self.noise_clip = None if noise_clip is None else _match(noise_clip, loc)
        super().__init__(D.Normal(loc, scale, validate_args=False), 1, validate_args=False)
        self.loc, self.scale = self.base_dist.loc, self.base_dist.scale

    @property
    def support(self) -> constraints.Constraint:
        """The range of the samples."""
        return constraints.independent(constraints.interval(self._low, self._high), 1)

    @property
    def deterministic_sample(self) -> Tensor:
        """The action without noise, clamped like a sample, ``[..., A]``."""
        return self._clamp(self.loc)

    mode = deterministic_sample
    mean = deterministic_sample
    median = deterministic_sample

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws actions ``[*sample_shape, ..., A]`` with a straight-through gradient."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        if self.noise_clip is not None:
            noise = torch.clamp(noise, -self.noise_clip, self.noise_clip)
        return self._clamp(self.loc + noise)

    sample = D.Distribution.sample  # Independent would sample the unclipped Normal

    def log_prob(self, value: Tensor) -> Tensor:
        """Raises an error, because there is no density."""
        raise NotImplementedError("ClampedNormal has no density; use another actor distribution")

    def entropy(self) -> Tensor:
        """Raises an error, because there is no density."""
        raise NotImplementedError("ClampedNormal has no entropy; use another actor distribution")

    def _clamp(self, action: Tensor) -> Tensor:
        clamped = action.detach().clamp(min=self._low).clamp(max=self._high)
        # In this order the sum adds an exact zero and cannot round an action out of the range.
        return clamped + (action - action.detach())


class OneHotGroups(D.Distribution):
    r"""Independent one-hot categoricals, concatenated to one vector.

    A sample ``[..., G * C]`` is one-hot in each of the ``G`` groups. Its gradient is that of the
    probabilities (straight-through: :math:`z + p - \mathrm{sg}(p)`), as in DreamerV2 (Hafner et
    al., 2021, arXiv 2010.02193). Samples use the Gumbel-max trick, which works with
    ``torch.compile``, CUDA graphs and ``torch.vmap``.

    Args:
        logits: unnormalized log-probabilities, ``[..., G, C]``; half precision is converted
            to float32.
        unimix: weight of a uniform categorical in the mixture, which bounds every divergence
            (0.01 in DreamerV3, Hafner et al., 2023, arXiv 2301.04104; 0 in DreamerV2).

    Examples:
        >>> dist = OneHotGroups(torch.zeros(5, 4, 8))
        >>> dist.event_shape, dist.rsample().unflatten(-1, (4, 8)).sum(-1).unique()
        (torch.Size([32]), tensor([1.]))
    """

    num_params: int = 1
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 1)
    has_rsample = True

    def __init__(self, logits: Tensor, unimix: float = 0.0) -> None:
        if not 0 <= unimix < 1:
            raise ValueError(f"unimix must be in [0, 1), got {unimix}")
        log_probs = full_precision(logits).log_softmax(-1)
        if unimix:
            log_probs = ((1 - unimix) * log_probs.exp() + unimix / logits.shape[-1]).log()
        self.log_probs = log_probs
        event = torch.Size([logits.shape[-2] * logits.shape[-1]])
        super().__init__(log_probs.shape[:-2], event, validate_args=False)

    @property
    def probs(self) -> Tensor:
        """The probabilities, ``[..., G, C]``."""
        return self.log_probs.exp()

    @property
    def mean(self) -> Tensor:
        """The probabilities, ``[..., G * C]``."""
        return self.probs.flatten(-2)

    @property
    def mode(self) -> Tensor:
        """The most likely class of each group, one-hot with a straight-through gradient."""
        return self._straight_through(self.log_probs)

    deterministic_sample = mode  # the mean is not one-hot

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws samples ``[*sample_shape, ..., G * C]`` with the gradient of the probabilities."""
        shape = torch.Size(sample_shape) + self.log_probs.shape
        uniform = torch.rand(shape, dtype=self.log_probs.dtype, device=self.log_probs.device)
        gumbel = -(-uniform.log()).log()
        return self._straight_through(self.log_probs + gumbel)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of one-hot groups ``[..., G * C]``, summed over the groups."""
        return (value.unflatten(-1, self.log_probs.shape[-2:]) * self.log_probs).sum((-2, -1))

    def entropy(self) -> Tensor:
        """The entropy in nats, summed over the groups, ``[...]``."""
        return -(self.probs * self.log_probs).sum((-2, -1))

    def _straight_through(self, scores: Tensor) -> Tensor:
        """The class with the largest score in each group, with a straight-through gradient."""
        probs = self.probs
        classes = torch.arange(scores.shape[-1], device=scores.device)
        one_hot = (scores.argmax(-1, keepdim=True) == classes).to(probs.dtype)
        # In this order the sum adds an exact zero, and a sample stays one-hot to the bit.
        return (one_hot + (probs - probs.detach())).flatten(-2)


@D.register_kl(OneHotGroups, OneHotGroups)
def one_hot_kl(p: OneHotGroups, q: OneHotGroups) -> Tensor:
    r"""The KL divergence in nats ``[...]``, summed over groups and classes.

    .. math:: KL(p \| q) = \sum_{g, c} p_{gc} (\log p_{gc} - \log q_{gc})
    """
    return (p.probs * (p.log_probs - q.log_probs)).sum((-2, -1))


def full_precision(x: Tensor) -> Tensor:
    """Converts half precision to float32 and keeps other dtypes."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _match(bound: Tensor | float, like: Tensor) -> Any:
    if isinstance(bound, Tensor):
        return bound.to(device=like.device, dtype=like.dtype)
    return bound

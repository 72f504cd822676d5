"""Output heads that map features to the latent distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F

from alm_torchrl.distributions import DiagonalNormal, OneHotGroups, full_precision
from alm_torchrl.modules.rebuildable import Rebuildable


class LatentHead(Rebuildable):
    """Maps the output of a network to the parameters of a distribution: by default, a Normal."""

    parameter_names: ClassVar[tuple[str, ...]] = ("loc", "scale")
    """Parameters of the distribution; their entries are named ``<latent>_<name>``."""
    distribution_class: ClassVar[type[D.Distribution]] = DiagonalNormal
    """A class with ``rsample``, ``deterministic_sample``, ``entropy`` and a KL divergence."""

    @property
    def distribution_kwargs(self) -> dict[str, Any]:
        """Further arguments of the distribution."""
        return {}

    def network_size(self, latent_dim: int) -> int:
        """Returns the number of network outputs for a latent of size ``latent_dim``."""
        classes = getattr(self, "classes", 1)
        if latent_dim % classes:
            below = max(classes, latent_dim // classes * classes)
            raise ValueError(
                f"latent_dim={latent_dim} is not a multiple of classes={classes}; "
                f"use latent_dim={below} or another number of classes"
            )
        return latent_dim

    def __call__(self, raw: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Maps the network output to the parameters, at least float32."""
        raise NotImplementedError

    @staticmethod
    def _check_size(raw: Tensor, factor: int, name: str) -> None:
        """Raises if the size of the network output is not a multiple of ``factor``."""
        size = raw.shape[-1]
        if size % factor:
            near = max(factor, size // factor * factor)
            raise ValueError(
                f"the network output has size {size}, which is not a multiple of {name}; build the "
                f"network for {near} or {near + factor} outputs"
            )


@dataclass(frozen=True)
class GaussianHead(LatentHead):
    r"""ALM's latent: a diagonal Normal with softly bounded location and scale.

    .. math::
        \mu &= b \tanh(x_\mu / b) \\
        \sigma' &= \sigma_{max} - \mathrm{softplus}(\sigma_{max} - x_\sigma) \\
        \sigma &= \sigma_{min} + \mathrm{softplus}(\sigma' - \sigma_{min})

    The bounds keep the KL divergence between encoder and latent dynamics finite. Being soft, they
    never stop the gradient.

    Args:
        loc_bound: bound :math:`b` of the location.
        scale_min: lower bound of the scale.
        scale_max: upper bound of the scale.

    Examples:
        >>> loc, scale = GaussianHead()(torch.tensor([1e3, -1e3, 1e3, -1e3]))
        >>> loc.tolist(), [round(s, 3) for s in scale.tolist()]
        ([30.0, -30.0], [10.0, 0.1])
    """

    loc_bound: float = 30.0
    scale_min: float = 0.1
    scale_max: float = 10.0

    def __post_init__(self) -> None:
        if self.loc_bound <= 0 or not 0 < self.scale_min < self.scale_max:
            raise ValueError(f"expected loc_bound > 0 and 0 < scale_min < scale_max, got {self}")

    def network_size(self, latent_dim: int) -> int:
        """Returns the outputs for a location and a scale of each entry of the latent."""
        return 2 * latent_dim

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns location and scale, each ``[..., D]``, from ``[..., 2 * D]``."""
        self._check_size(raw, 2, "2 (location and scale)")
        loc, scale = full_precision(raw).chunk(2, dim=-1)
        loc = self.loc_bound * torch.tanh(loc / self.loc_bound)
        scale = self.scale_max - F.softplus(self.scale_max - scale)
        scale = self.scale_min + F.softplus(scale - self.scale_min)
        return loc, scale


@dataclass(frozen=True)
class FixedScaleHead(LatentHead):
    """A Normal around the network output with a fixed scale.

    Args:
        scale: standard deviation of every entry.

    Examples:
        >>> loc, scale = FixedScaleHead(0.5)(torch.ones(2, 4))
        >>> loc.mean(), scale.mean()
        (tensor(1.), tensor(0.5000))
    """

    scale: float = 0.1

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"expected scale > 0, got {self}")

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns location and scale, each ``[..., D]``."""
        loc = self._location(full_precision(raw))
        return loc, torch.full_like(loc, self.scale)

    def _location(self, raw: Tensor) -> Tensor:
        return raw


@dataclass(frozen=True)
class LayerNormHead(FixedScaleHead):
    """A layer-normalized location (mean 0, variance 1 over the latent) with a fixed scale.

    The normalization has no parameters. A sample is the location plus noise.

    Examples:
        >>> loc, _ = LayerNormHead()(torch.randn(2, 16))
        >>> bool(torch.allclose(loc.square().mean(-1), torch.ones(2), atol=1e-3))
        True
    """

    scale: float = 0.5

    def _location(self, raw: Tensor) -> Tensor:
        return F.layer_norm(raw, raw.shape[-1:])


@dataclass(frozen=True)
class SimplicialHead(FixedScaleHead):
    """A location with a softmax over each group of entries, and a fixed scale.

    These are simplicial embeddings (Lavoie et al., 2022, arXiv 2204.00616), as in TD-MPC2 (Hansen
    et al., 2024, arXiv 2310.16828). A sample is the location plus noise.

    Args:
        scale: standard deviation of every entry.
        classes: size of a group, a divisor of the latent size.
        temperature: divisor of the network output before the softmax.

    Examples:
        >>> loc, _ = SimplicialHead(classes=8)(torch.randn(2, 16))
        >>> loc.sum(-1)
        tensor([2.0000, 2.0000])
    """

    scale: float = 0.1
    classes: int = 8
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 2 or self.temperature <= 0:
            raise ValueError(f"expected at least 2 classes and temperature > 0, got {self}")

    def _location(self, raw: Tensor) -> Tensor:
        self._check_size(raw, self.classes, f"classes={self.classes}")
        groups = raw.unflatten(-1, (-1, self.classes)) / self.temperature
        return groups.softmax(-1).flatten(-2)


@dataclass(frozen=True)
class CategoricalHead(LatentHead):
    """Discrete latents: groups of one-hot categoricals with straight-through gradients.

    See :class:`~alm_torchrl.distributions.OneHotGroups`. DreamerV2 uses 32 groups of 32 classes.

    Args:
        classes: number of classes in a group, a divisor of the latent size.
        unimix: weight of a uniform categorical in the mixture.

    Examples:
        >>> CategoricalHead(classes=8)(torch.randn(2, 16)).shape
        torch.Size([2, 2, 8])
    """

    classes: int = 8
    unimix: float = 0.01

    parameter_names: ClassVar[tuple[str, ...]] = ("logits",)
    distribution_class: ClassVar[type[D.Distribution]] = OneHotGroups

    def __post_init__(self) -> None:
        if self.classes < 2 or not 0 <= self.unimix < 1:
            raise ValueError(f"expected at least 2 classes and unimix in [0, 1), got {self}")

    @property
    def distribution_kwargs(self) -> dict[str, Any]:
        """The weight of the uniform categorical."""
        return {"unimix": self.unimix}

    def __call__(self, raw: Tensor) -> Tensor:
        """Returns logits ``[..., G, C]`` from ``[..., G * C]``."""
        self._check_size(raw, self.classes, f"classes={self.classes}")
        return full_precision(raw).unflatten(-1, (-1, self.classes))


DEFAULT_HEAD = GaussianHead()
"""The head of the paper; it is immutable, so all networks can share it."""

"""Output heads that map features to the latent distribution.

Encoder and latent dynamics need the same one: ``LatentDynamics(..., head=encoder.head)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F

from alm_torchrl.distributions import (
    BoundedNormalParamExtractor,
    DiagonalNormal,
    OneHotGroups,
    full_precision,
)
from alm_torchrl.modules.described import described

__all__ = [
    "CategoricalHead",
    "FixedScaleHead",
    "GaussianHead",
    "LatentHead",
    "LayerNormHead",
    "SimplicialHead",
]


@runtime_checkable
class LatentHead(Protocol):
    """Turns the output of a network into the parameters of a distribution over the latent."""

    parameter_names: ClassVar[tuple[str, ...]]
    """Arguments of the distribution, which are written as ``<latent>_<name>``."""
    distribution_class: ClassVar[type[D.Distribution]]
    """Its class, with ``rsample``, ``deterministic_sample``, ``entropy`` and a KL divergence."""

    @property
    def distribution_kwargs(self) -> dict[str, Any]:
        """Further arguments of the distribution."""
        ...

    def network_size(self, latent_dim: int) -> int:
        """Outputs that the network must have for a latent of size ``D``."""
        ...

    def __call__(self, raw: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The parameters, float32 at least, from the network's output."""
        ...


class _Normal:
    """A diagonal Normal."""

    parameter_names: ClassVar[tuple[str, ...]] = ("loc", "scale")
    distribution_class: ClassVar[type[D.Distribution]] = DiagonalNormal

    @property
    def distribution_kwargs(self) -> dict[str, Any]:
        """Nothing more."""
        return {}

    def network_size(self, latent_dim: int) -> int:
        """As many outputs as the latent has entries."""
        return latent_dim


@described
@dataclass(frozen=True)
class GaussianHead(_Normal):
    """ALM's latent: a diagonal Normal with softly bounded location and scale.

    See :class:`~alm_torchrl.distributions.BoundedNormalParamExtractor` for the equations.

    Args:
        loc_bound: bound of the location, in latent units.
        scale_min: lower bound of the scale.
        scale_max: upper bound of the scale.

    Raises:
        ValueError: if the bounds are not ordered or not positive.

    Examples:
        >>> loc, scale = GaussianHead()(torch.zeros(2, 8))
        >>> loc.shape, GaussianHead().network_size(4)
        (torch.Size([2, 4]), 8)
    """

    loc_bound: float = 30.0
    scale_min: float = 0.1
    scale_max: float = 10.0

    def __post_init__(self) -> None:
        self._bounds()

    def network_size(self, latent_dim: int) -> int:
        """Location and scale side by side."""
        return 2 * latent_dim

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale ``[..., D]`` from ``[..., 2 * D]``."""
        return self._bounds()(raw)

    def _bounds(self) -> BoundedNormalParamExtractor:
        return BoundedNormalParamExtractor(self.loc_bound, self.scale_min, self.scale_max)


@described
@dataclass(frozen=True)
class FixedScaleHead(_Normal):
    """A Normal around the network's output, whose scale is not learnt.

    Args:
        scale: standard deviation of every entry, in latent units.

    Raises:
        ValueError: if the scale is not positive.

    Examples:
        >>> loc, scale = FixedScaleHead(0.5)(torch.ones(2, 4))
        >>> loc.mean(), scale.mean()
        (tensor(1.), tensor(0.5000))
    """

    scale: float = 0.1

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale, each ``[..., D]``."""
        loc = self._location(full_precision(raw))
        return loc, torch.full_like(loc, self.scale)

    def _location(self, raw: Tensor) -> Tensor:
        return raw


@described
@dataclass(frozen=True)
class LayerNormHead(FixedScaleHead):
    """A layer-normalized location (mean 0, variance 1 over the latent) with a fixed scale.

    The normalization has no parameters of its own. A sample carries noise around a location on
    that sphere.

    Args:
        scale: standard deviation of every entry, in latent units.

    Raises:
        ValueError: if the scale is not positive.

    Examples:
        >>> loc, _ = LayerNormHead()(torch.randn(2, 16))
        >>> bool(torch.allclose(loc.square().mean(-1), torch.ones(2), atol=1e-3))
        True
    """

    scale: float = 0.5

    def _location(self, raw: Tensor) -> Tensor:
        return F.layer_norm(raw, raw.shape[-1:])


@described
@dataclass(frozen=True)
class SimplicialHead(FixedScaleHead):
    """A location that is a softmax in each group of entries, with a fixed scale.

    Simplicial embeddings (Lavoie et al., 2022, arXiv 2204.00616), as TD-MPC2 uses them (Hansen et
    al., 2024, arXiv 2310.16828). A sample carries noise around a location on the simplices.

    Args:
        scale: standard deviation of every entry, in latent units.
        classes: entries in a group; the latent's size must be a multiple of it.
        temperature: what the network's output is divided by before the softmax.

    Raises:
        ValueError: if an argument is not positive, or the latent's size is no multiple of
            ``classes``.

    Examples:
        >>> loc, _ = SimplicialHead(classes=8)(torch.randn(2, 16))
        >>> loc.unflatten(-1, (2, 8)).sum(-1).shape, loc.sum(-1)
        (torch.Size([2, 2]), tensor([2.0000, 2.0000]))
    """

    scale: float = 0.1
    classes: int = 8
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 2 or self.temperature <= 0:
            raise ValueError(
                "expected at least 2 classes and a positive temperature, got "
                f"classes={self.classes}, temperature={self.temperature}"
            )

    def network_size(self, latent_dim: int) -> int:
        """As many outputs as the latent has entries, if they make whole groups."""
        return _whole_groups(latent_dim, self.classes)

    def _location(self, raw: Tensor) -> Tensor:
        groups = raw.unflatten(-1, (-1, self.classes)) / self.temperature
        return groups.softmax(-1).flatten(-2)


@described
@dataclass(frozen=True)
class CategoricalHead:
    """Discrete latents: groups of one-hot categoricals with straight-through gradients.

    See :class:`~alm_torchrl.distributions.OneHotGroups`; DreamerV2 has 32 groups of 32 classes.

    Args:
        classes: classes in a group; the latent's size must be a multiple of it.
        unimix: share of a uniform categorical that is mixed in.

    Raises:
        ValueError: for less than two classes, a share outside [0, 1), or a latent whose size is no
            multiple of ``classes``.

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
            raise ValueError(
                "expected at least 2 classes and unimix in [0, 1), got "
                f"classes={self.classes}, unimix={self.unimix}"
            )

    @property
    def distribution_kwargs(self) -> dict[str, Any]:
        """The uniform share."""
        return {"unimix": self.unimix}

    def network_size(self, latent_dim: int) -> int:
        """As many logits as the latent has entries, if they make whole groups."""
        return _whole_groups(latent_dim, self.classes)

    def __call__(self, raw: Tensor) -> Tensor:
        """Logits ``[..., G, C]`` from ``[..., G * C]``."""
        return full_precision(raw).unflatten(-1, (-1, self.classes))


def _whole_groups(latent_dim: int, classes: int) -> int:
    if latent_dim % classes:
        below = max(classes, latent_dim // classes * classes)
        raise ValueError(
            f"a latent of size {latent_dim} is not made of groups of {classes}: take latent_dim="
            f"{below}, or another number of classes"
        )
    return latent_dim

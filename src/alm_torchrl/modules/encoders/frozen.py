"""A pretrained module as the base of an encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Composite

from alm_torchrl.modules.encoders.specs import observation_shapes
from alm_torchrl.modules.heads import GaussianHead, LatentHead
from alm_torchrl.modules.latent import LatentModule
from alm_torchrl.modules.networks import mlp

__all__ = ["FrozenEncoder"]


class FrozenEncoder(LatentModule):
    """A pretrained torch module that is not trained, and an MLP on its features that is.

    The module stays in ``eval()`` mode and gets no gradient; encoder and target encoder share its
    weights. An agent with this encoder is loaded by passing the encoder again, because a file
    cannot hold the module's code.

    Args:
        module: from a batch of observations ``[N, ...]`` to features ``[N, ...]``, flattened here.
        shape: shape of one observation, such as ``(3, 64, 64)``. Integers are scaled to [0, 1].
        latent_dim: size ``D`` of the latent.
        hidden_dim: width of the two hidden layers of the MLP.
        in_keys: the one observation to read.
        head: the latent's distribution; :class:`GaussianHead` by default.
        latent_key: where the latent is written, with the distribution's parameters beside it.

    Raises:
        ValueError: if there is more than one observation, or the module cannot read it.

    Examples:
        >>> pretrained = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        >>> encoder = FrozenEncoder(pretrained, (3, 32, 32), latent_dim=8, hidden_dim=16)
        >>> encoder(pixels=torch.rand(2, 5, 3, 32, 32))[-1].shape
        torch.Size([2, 5, 8])
        >>> any(parameter.requires_grad for parameter in pretrained.parameters())
        False
    """

    def __init__(
        self,
        module: nn.Module,
        shape: Sequence[int],
        latent_dim: int = 50,
        hidden_dim: int = 512,
        *,
        in_keys: Sequence[NestedKey] = ("pixels",),
        head: LatentHead | None = None,
        latent_key: NestedKey = "latent",
    ) -> None:
        if len(in_keys) != 1:
            raise ValueError(f"a FrozenEncoder reads one observation, got in_keys={list(in_keys)}")
        head = GaussianHead() if head is None else head
        frozen = _Frozen(module, len(shape))
        first = next(module.parameters(), torch.empty(0))
        try:
            features = frozen(torch.zeros(1, *shape, device=first.device)).shape[-1]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"the module cannot read a batch of observations {(1, *shape)}: {error}"
            ) from error
        top = mlp(features, head.network_size(latent_dim), hidden_dim).to(first.device)
        super().__init__(nn.Sequential(frozen, top), in_keys, head=head, latent_key=latent_key)
        self.latent_dim = latent_dim

    @classmethod
    def from_spec(
        cls,
        spec: Composite,
        *,
        module: nn.Module,
        latent_dim: int = 50,
        hidden_dim: int = 512,
        in_keys: Sequence[NestedKey] | None = None,
        **options: Any,
    ) -> FrozenEncoder:
        """Makes an encoder of an observation of an environment's.

        Args:
            spec: ``env.observation_spec_unbatched``.
            module: the pretrained module.
            latent_dim: size of the latent.
            hidden_dim: width of the MLP.
            in_keys: the observation to read; the only image by default.
            **options: further arguments of the class.

        Returns:
            The encoder.

        Raises:
            ValueError: if there is no such observation.
        """
        ranks = (3,) if in_keys is None else (1, 2, 3)
        shapes = observation_shapes(spec, in_keys, *ranks)
        shape = next(iter(shapes.values()))
        return cls(module, shape, latent_dim, hidden_dim, in_keys=list(shapes), **options)


class _Frozen(nn.Module):
    """Features ``[..., F]`` of observations, without a gradient."""

    def __init__(self, module: nn.Module, observation_ndim: int) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.observation_ndim = observation_ndim
        self.eval()

    def train(self, mode: bool = True) -> _Frozen:  # noqa: ARG002 - stays as it was pretrained
        return super().train(False)

    @torch.no_grad()
    def forward(self, observation: Tensor) -> Tensor:
        if not observation.is_floating_point():
            observation = observation.to(torch.float32) / 255
        shape = observation.shape
        batch = shape[: len(shape) - self.observation_ndim]
        flat = observation.reshape(math.prod(batch), *shape[len(batch) :])
        return self.module(flat).flatten(1).reshape(*batch, -1)

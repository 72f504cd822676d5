"""An encoder on top of a pretrained module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self, Unpack

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn

from alm_torchrl.modules.encoders.base import Encoder
from alm_torchrl.modules.heads import DEFAULT_HEAD, LatentHead
from alm_torchrl.modules.networks import MLPKwargs, as_weights, mlp


class FrozenEncoder(Encoder):
    """A frozen pretrained module with a trained MLP on its features.

    The module stays in ``eval()`` mode and gets no gradient; encoder and target encoder share its
    weights. A saved agent does not describe it: pass the encoder to :meth:`ALMAgent.load`.

    Args:
        module: maps observations ``[N, ...]`` to features ``[N, ...]``, which are flattened.
        shape: shape of one observation, such as ``(3, 64, 64)``. Integers are scaled to [0, 1].
        in_keys: the observation to read, exactly one.
        **mlp_kwargs: further arguments of :func:`mlp`.

    Examples:
        >>> pretrained = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        >>> encoder = FrozenEncoder(pretrained, (3, 32, 32), latent_dim=8)
        >>> encoder(pixels=torch.rand(2, 5, 3, 32, 32))[-1].shape
        torch.Size([2, 5, 8])
    """

    _ranks: ClassVar[tuple[int, ...]] = (3,)
    _ranks_by_name: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def __init__(
        self,
        module: nn.Module,
        shape: Sequence[int],
        latent_dim: int = 50,
        hidden_dim: int = 512,
        *,
        in_keys: Sequence[NestedKey] = ("pixels",),
        head: LatentHead = DEFAULT_HEAD,
        latent_key: NestedKey = "latent",
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        if len(in_keys) != 1:
            raise ValueError(f"FrozenEncoder reads one observation, got in_keys={list(in_keys)}")
        frozen = _Frozen(module, len(shape))
        device = next(module.parameters(), torch.empty(0)).device
        try:
            features = frozen(torch.zeros(1, *shape, device=device)).shape[-1]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"the module cannot read a batch of observations {(1, *shape)}: {error}"
            ) from error
        top = mlp(features, head.network_size(latent_dim), hidden_dim, **mlp_kwargs).to(device)
        network = nn.Sequential(frozen, top)
        super().__init__(network, latent_dim, in_keys, head, latent_key=latent_key)

    @classmethod
    def _from_shapes(  # type: ignore[override]
        cls, shapes: dict[NestedKey, tuple[int, ...]], *, module: nn.Module, **options: Any
    ) -> Self:
        return cls(module, next(iter(shapes.values())), in_keys=list(shapes), **options)


class _Frozen(nn.Module):
    """Maps observations to features ``[..., F]`` without a gradient."""

    def __init__(self, module: nn.Module, observation_ndim: int) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.observation_ndim = observation_ndim
        self.eval()

    def train(self, mode: bool = True) -> _Frozen:  # noqa: ARG002 - always in evaluation mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, observation: Tensor) -> Tensor:
        if not observation.is_floating_point():
            observation = observation.to(torch.float32) / 255
        observation = as_weights(observation, self.module)
        shape = observation.shape
        batch = shape[: len(shape) - self.observation_ndim]
        flat = observation.reshape(math.prod(batch), *shape[len(batch) :])
        return self.module(flat).flatten(1).reshape(*batch, -1)

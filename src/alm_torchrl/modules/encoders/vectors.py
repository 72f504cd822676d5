"""Encoders of vector observations: an MLP, a linear map, and the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, Unpack

from tensordict.utils import NestedKey
from torch import Tensor, nn

from alm_torchrl.modules.encoders.base import Encoder
from alm_torchrl.modules.encoders.normalization import NormalizedInputs, RunningNorm
from alm_torchrl.modules.heads import DEFAULT_HEAD, FixedScaleHead, LatentHead
from alm_torchrl.modules.networks import ConcatSequential, MLPKwargs, as_weights, mlp


class MLPEncoder(Encoder):
    r"""The encoder :math:`e_\phi(z_t \mid s_t)` of the paper: an MLP on vector observations.

    Args:
        observation_dim: total size of the observations.
        in_keys: observations to read, each ``[..., O_i]``; several are concatenated.
        normalize: whether a :class:`RunningNorm` normalizes the observations.
        **mlp_kwargs: further arguments of :func:`mlp`.

    Examples:
        >>> import torch
        >>> MLPEncoder(17)(observation=torch.randn(4, 17))[-1].shape
        torch.Size([4, 50])
    """

    def __init__(
        self,
        observation_dim: int,
        latent_dim: int = 50,
        hidden_dim: int = 512,
        *,
        in_keys: Sequence[NestedKey] = ("observation",),
        head: LatentHead = DEFAULT_HEAD,
        normalize: bool = False,
        latent_key: NestedKey = "latent",
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        size = head.network_size(latent_dim)
        network: nn.Module = _VectorNetwork(*mlp(observation_dim, size, hidden_dim, **mlp_kwargs))
        if normalize:
            network = NormalizedInputs(network, [RunningNorm(observation_dim)])
        super().__init__(network, latent_dim, in_keys, head, latent_key=latent_key)


class LinearEncoder(MLPEncoder):
    r"""One linear layer from the observations to the latent distribution.

    See :class:`MLPEncoder` for further arguments.

    Examples:
        >>> import torch
        >>> LinearEncoder(3, latent_dim=8)(observation=torch.randn(2, 3))[-1].shape
        torch.Size([2, 8])
    """

    def __init__(self, observation_dim: int, latent_dim: int = 50, **options: Any) -> None:
        super().__init__(observation_dim, latent_dim, **options, depth=0)


class IdentityEncoder(Encoder):
    """The observations themselves as the latent, with a fixed scale and no parameters.

    The KL divergence from the dynamics is ``|difference| ** 2 / (2 * scale ** 2)``; ``normalize``
    gives all entries the same weight in it.

    Args:
        observation_dim: total size of the observations, and size of the latent.
        in_keys: observations to read, as for :class:`MLPEncoder`.
        scale: standard deviation of every entry, in units of the (normalized) observation.
        normalize: whether a :class:`RunningNorm` normalizes the observations.

    Examples:
        >>> IdentityEncoder(3).latent_dim
        3
    """

    def __init__(
        self,
        observation_dim: int,
        *,
        in_keys: Sequence[NestedKey] = ("observation",),
        scale: float = 0.1,
        normalize: bool = False,
        latent_key: NestedKey = "latent",
    ) -> None:
        network: nn.Module = ConcatSequential()
        if normalize:
            network = NormalizedInputs(network, [RunningNorm(observation_dim)])
        head = FixedScaleHead(scale)
        super().__init__(network, observation_dim, in_keys, head, latent_key=latent_key)

    @classmethod
    def _from_shapes(cls, shapes: dict[NestedKey, tuple[int, ...]], **options: Any) -> Self:
        for unused in ("latent_dim", "hidden_dim"):
            options.pop(unused)
        return super()._from_shapes(shapes, **options)


class _VectorNetwork(ConcatSequential):
    """A sequence of layers that casts float64 observations."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(*(as_weights(value, self) for value in inputs))

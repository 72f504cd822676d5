"""Encoders of vector observations: an MLP, a linear map, and none at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Composite
from torchrl.modules import MLP

from alm_torchrl.modules.described import described
from alm_torchrl.modules.encoders.normalization import NormalizedInputs, RunningNorm
from alm_torchrl.modules.encoders.specs import joined, observation_shapes
from alm_torchrl.modules.heads import FixedScaleHead, GaussianHead, LatentHead
from alm_torchrl.modules.latent import LatentModule
from alm_torchrl.modules.networks import orthogonal_init

__all__ = ["IdentityEncoder", "LinearEncoder", "MLPEncoder"]


class _VectorEncoder(LatentModule):
    """A network on concatenated vectors, which may be normalized first."""

    def __init__(
        self,
        network: nn.Module,
        observation_dim: int,
        latent_dim: int,
        in_keys: Sequence[NestedKey],
        head: LatentHead,
        normalize: bool,
        latent_key: NestedKey,
    ) -> None:
        if normalize:
            network = NormalizedInputs(network, [RunningNorm(observation_dim)])
        super().__init__(network, in_keys, head=head, latent_key=latent_key)
        self.latent_dim = latent_dim


@described
class MLPEncoder(_VectorEncoder):
    r"""The encoder :math:`e_\phi(z_t \mid s_t)` of the paper: an MLP on vector observations.

    Args:
        observation_dim: total size of the observations at ``in_keys``.
        latent_dim: size ``D`` of the latent.
        hidden_dim: width of the two hidden layers.
        in_keys: the observations to read, each ``[..., O_i]``; several are concatenated.
        head: the latent's distribution; :class:`GaussianHead` by default.
        normalize: whether the observations pass a :class:`RunningNorm` first.
        latent_key: where the latent is written, with the distribution's parameters beside it.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> encoder = MLPEncoder(observation_dim=17)
        >>> td = encoder(TensorDict(observation=torch.randn(4, 17), batch_size=[4]))
        >>> td["latent"].shape, td["latent_scale"].shape
        (torch.Size([4, 50]), torch.Size([4, 50]))
    """

    def __init__(
        self,
        observation_dim: int,
        latent_dim: int = 50,
        hidden_dim: int = 512,
        *,
        in_keys: Sequence[NestedKey] = ("observation",),
        head: LatentHead | None = None,
        normalize: bool = False,
        latent_key: NestedKey = "latent",
    ) -> None:
        head = GaussianHead() if head is None else head
        network = _ObservationMLP(observation_dim, head.network_size(latent_dim), hidden_dim)
        super().__init__(network, observation_dim, latent_dim, in_keys, head, normalize, latent_key)

    @classmethod
    def from_spec(
        cls,
        spec: Composite,
        *,
        latent_dim: int = 50,
        hidden_dim: int = 512,
        in_keys: Sequence[NestedKey] | None = None,
        **options: Any,
    ) -> MLPEncoder:
        """Makes an encoder of an environment's vector observations.

        Args:
            spec: ``env.observation_spec_unbatched``.
            latent_dim: size of the latent.
            hidden_dim: width of the two hidden layers.
            in_keys: the observations to read; all vectors by default.
            **options: further arguments of the class.

        Returns:
            The encoder.

        Raises:
            ValueError: if there is no such observation.
        """
        shapes = observation_shapes(spec, in_keys, 1)
        size = sum(shape[0] for shape in shapes.values())
        return cls(size, latent_dim, hidden_dim, in_keys=list(shapes), **options)


@described
class LinearEncoder(_VectorEncoder):
    r"""One linear layer from the observations to the latent's distribution.

    Args:
        observation_dim: total size of the observations at ``in_keys``.
        latent_dim: size ``D`` of the latent.
        in_keys: the observations to read, each ``[..., O_i]``; several are concatenated.
        head: the latent's distribution; :class:`GaussianHead` by default.
        normalize: whether the observations pass a :class:`RunningNorm` first.
        latent_key: where the latent is written, with the distribution's parameters beside it.

    Examples:
        >>> import torch
        >>> LinearEncoder(3, latent_dim=8)(observation=torch.randn(2, 3))[-1].shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        observation_dim: int,
        latent_dim: int = 50,
        *,
        in_keys: Sequence[NestedKey] = ("observation",),
        head: LatentHead | None = None,
        normalize: bool = False,
        latent_key: NestedKey = "latent",
    ) -> None:
        head = GaussianHead() if head is None else head
        network = _Concatenated(nn.Linear(observation_dim, head.network_size(latent_dim)))
        super().__init__(network, observation_dim, latent_dim, in_keys, head, normalize, latent_key)

    @classmethod
    def from_spec(
        cls,
        spec: Composite,
        *,
        latent_dim: int = 50,
        hidden_dim: int = 512,  # noqa: ARG003 - every encoder is made with the same arguments
        in_keys: Sequence[NestedKey] | None = None,
        **options: Any,
    ) -> LinearEncoder:
        """Makes an encoder of an environment's vector observations.

        Args:
            spec: ``env.observation_spec_unbatched``.
            latent_dim: size of the latent.
            hidden_dim: without use here.
            in_keys: the observations to read; all vectors by default.
            **options: further arguments of the class.

        Returns:
            The encoder.

        Raises:
            ValueError: if there is no such observation.
        """
        shapes = observation_shapes(spec, in_keys, 1)
        size = sum(shape[0] for shape in shapes.values())
        return cls(size, latent_dim, in_keys=list(shapes), **options)


@described
class IdentityEncoder(_VectorEncoder):
    """The observations themselves as the latent, with a fixed scale: nothing is learnt here.

    The latent has the observations' size. With ``normalize`` it is comparable across entries, as
    the divergence to the dynamics, ``|difference| ** 2 / (2 * scale ** 2)``, wants it.

    Args:
        observation_dim: total size of the observations at ``in_keys``, and of the latent.
        in_keys: the observations to read, each ``[..., O_i]``; several are concatenated.
        scale: standard deviation of every entry, in units of the (normalized) observation.
        normalize: whether the observations pass a :class:`RunningNorm` first.
        latent_key: where the latent is written, with the distribution's parameters beside it.

    Examples:
        >>> import torch
        >>> encoder = IdentityEncoder(3)
        >>> sum(1 for _ in encoder.parameters()), encoder.latent_dim
        (0, 3)
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
        super().__init__(
            _Concatenated(nn.Identity()),
            observation_dim,
            observation_dim,
            in_keys,
            FixedScaleHead(scale),
            normalize,
            latent_key,
        )

    @classmethod
    def from_spec(
        cls,
        spec: Composite,
        *,
        latent_dim: int | None = None,  # noqa: ARG003 - every encoder is made with these
        hidden_dim: int = 512,  # noqa: ARG003
        in_keys: Sequence[NestedKey] | None = None,
        **options: Any,
    ) -> IdentityEncoder:
        """Makes an encoder of an environment's vector observations.

        Args:
            spec: ``env.observation_spec_unbatched``.
            latent_dim: without use here: the latent has the observations' size.
            hidden_dim: without use here.
            in_keys: the observations to read; all vectors by default.
            **options: further arguments of the class.

        Returns:
            The encoder.

        Raises:
            ValueError: if there is no such observation.
        """
        shapes = observation_shapes(spec, in_keys, 1)
        return cls(sum(shape[0] for shape in shapes.values()), in_keys=list(shapes), **options)


class _ObservationMLP(MLP):
    """The network of :func:`mlp`, on vectors of any numbers."""

    def __init__(self, in_features: int, out_features: int, hidden_dim: int) -> None:
        cells = [hidden_dim, hidden_dim]
        super().__init__(in_features, out_features, num_cells=cells, activation_class=nn.ELU)
        orthogonal_init(self)

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(joined(*inputs))


class _Concatenated(nn.Module):
    """Runs a layer on its concatenated inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = orthogonal_init(layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(joined(*inputs))

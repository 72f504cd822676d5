"""Encoders: observations to a distribution over the latent."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict.utils import NestedKey

from alm_torchrl.modules.latent import GaussianLatentModule
from alm_torchrl.modules.networks import plain_mlp

__all__ = ["MLPEncoder"]


class MLPEncoder(GaussianLatentModule):
    r"""The encoder :math:`e_\phi(z_t \mid s_t)` of the paper: an MLP on vector observations.

    Args:
        observation_dim: total size of the observations at ``in_keys``.
        latent_dim: size ``D`` of the latent.
        hidden_dim: width of the two hidden layers.
        in_keys: the observations to read, each ``[..., O_i]``; several are concatenated.
        latent_key: where the latent is written, with ``_loc`` and ``_scale`` beside it.

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
        latent_key: NestedKey = "latent",
    ) -> None:
        super().__init__(
            plain_mlp(observation_dim, 2 * latent_dim, hidden_dim), in_keys, latent_key=latent_key
        )

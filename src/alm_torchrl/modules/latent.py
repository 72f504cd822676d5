"""A network whose output is a diagonal Normal over the latent."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from tensordict.utils import NestedKey, unravel_key
from torch import nn

from alm_torchrl.distributions import BoundedNormalParamExtractor, DiagonalNormal

__all__ = ["GaussianLatentModule", "next_key", "suffix_key"]


def suffix_key(key: NestedKey, suffix: str) -> NestedKey:
    """Appends a suffix to the last part of a key.

    Examples:
        >>> suffix_key(("next", "latent"), "_loc")
        ('next', 'latent_loc')
    """
    key = unravel_key(key)
    if isinstance(key, str):
        return key + suffix
    return (*key[:-1], key[-1] + suffix)


def next_key(key: NestedKey) -> NestedKey:
    """The same key under ``"next"``.

    Examples:
        >>> next_key("latent")
        ('next', 'latent')
    """
    return unravel_key(("next", key))


class GaussianLatentModule(ProbabilisticTensorDictSequential):
    r"""Wraps any torch module into a softly bounded diagonal Normal over a latent.

    It writes ``<latent>_loc``, ``<latent>_scale`` and a sample ``<latent>``, each ``[..., D]``.
    The sample is drawn with a reparameterised gradient unless the exploration type asks for the
    mean. Both :class:`MLPEncoder` and :class:`LatentDynamics` are of this class, and so is an
    encoder of your own: give it a module that maps the observations to ``[..., 2 * D]``.

    Args:
        network: a module from the tensors at ``in_keys`` to ``[..., 2 * D]``.
        in_keys: where the network's inputs are read.
        latent_key: where the latent is written.
        bounds: the parameter head; by default ALM's bounds (location within +-30, scale within
            [0.1, 10]).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> encoder = GaussianLatentModule(torch.nn.Linear(3, 8), ["pixels"])
        >>> td = encoder(TensorDict(pixels=torch.randn(2, 3), batch_size=[2]))
        >>> td["latent"].shape
        torch.Size([2, 4])
        >>> encoder.get_dist(td).entropy().shape
        torch.Size([2])
    """

    def __init__(
        self,
        network: nn.Module,
        in_keys: Sequence[NestedKey],
        *,
        latent_key: NestedKey = "latent",
        bounds: BoundedNormalParamExtractor | None = None,
    ) -> None:
        loc, scale = suffix_key(latent_key, "_loc"), suffix_key(latent_key, "_scale")
        raw = suffix_key(latent_key, "_params")
        bounds = BoundedNormalParamExtractor() if bounds is None else bounds
        super().__init__(
            TensorDictModule(network, in_keys=list(in_keys), out_keys=[raw]),
            TensorDictModule(bounds, in_keys=[raw], out_keys=[loc, scale]),
            ProbabilisticTensorDictModule(
                in_keys={"loc": loc, "scale": scale},
                out_keys=[latent_key],
                distribution_class=DiagonalNormal,
                default_interaction_type="random",
            ),
        )

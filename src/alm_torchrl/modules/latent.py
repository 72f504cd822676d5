"""A network whose output is a distribution over the latent."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
)
from tensordict.utils import NestedKey, unravel_key
from torch import nn

from alm_torchrl.data.transitions import tuple_key
from alm_torchrl.modules.heads import DEFAULT_HEAD, LatentHead
from alm_torchrl.modules.networks import TensorModule
from alm_torchrl.modules.rebuildable import Rebuildable


def suffix_key(key: NestedKey, suffix: str) -> NestedKey:
    """Appends a suffix to the last part of a key."""
    *parents, name = tuple_key(key)
    return unravel_key((*parents, name + suffix))


class LatentModule(Rebuildable, ProbabilisticTensorDictSequential):
    r"""Turns any torch module into a distribution over a latent.

    It writes the parameters of the distribution (``<latent>_loc`` and ``<latent>_scale`` of a
    Normal) and a differentiable sample ``<latent>``, each ``[..., D]``. Under a deterministic
    exploration type, the sample is the mean or the mode.

    Args:
        network: maps the entries ``in_keys`` to ``[..., head.network_size(D)]`` (``[..., 2 * D]``
            for the default head) and to the entries ``extra_keys``, if any.
        in_keys: inputs of the network.
        head: the distribution of the latent.
        latent_key: entry of the latent.
        extra_keys: entries of further outputs of the network. Entries under ``"next"`` are memory:
            the policy writes them, and the environment passes them to the next step. Another entry
            may be a loss, which ``auxiliary_losses`` of
            :class:`~alm_torchrl.objectives.ALMLoss` names.

    Examples:
        >>> import torch
        >>> encoder = LatentModule(nn.Linear(3, 16), in_keys=["joints"])
        >>> encoder(joints=torch.randn(2, 3))[-1].shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        network: nn.Module,
        in_keys: Sequence[NestedKey],
        *,
        head: LatentHead = DEFAULT_HEAD,
        latent_key: NestedKey = "latent",
        extra_keys: Sequence[NestedKey] = (),
    ) -> None:
        raw = suffix_key(latent_key, "_params")
        params = {name: suffix_key(latent_key, f"_{name}") for name in head.parameter_names}
        super().__init__(
            TensorModule(network, in_keys=list(in_keys), out_keys=[raw, *extra_keys]),
            TensorModule(head, in_keys=[raw], out_keys=list(params.values())),
            ProbabilisticTensorDictModule(
                in_keys=params,
                out_keys=[latent_key],
                distribution_class=head.distribution_class,
                distribution_kwargs=head.distribution_kwargs,
                default_interaction_type="random",
            ),
        )
        self.head = head

    @property
    def network(self) -> nn.Module:
        """The module before the head."""
        return self[0].module

    def update_statistics(self, tensordict: TensorDictBase) -> None:
        """Calls ``network.update_statistics(*inputs)``, if the network has this method."""
        update = getattr(self.network, "update_statistics", None)
        if update is not None:
            update(*(tensordict.get(key) for key in self[0].in_keys))


def keeps_statistics(encoder: nn.Module) -> bool:
    """Returns whether a layer of the encoder keeps running statistics of its inputs."""
    return any(hasattr(layer, "update_statistics") for layer in list(encoder.modules())[1:])

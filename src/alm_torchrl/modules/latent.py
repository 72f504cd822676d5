"""A network whose output is a distribution over the latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from alm_torchrl.distributions import BoundedNormalParamExtractor
from alm_torchrl.modules.augmentation import without_augmentation
from alm_torchrl.modules.heads import GaussianHead, LatentHead

__all__ = ["GaussianLatentModule", "LatentModule", "keeps_statistics", "next_key", "suffix_key"]


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


class LatentModule(ProbabilisticTensorDictSequential):
    r"""Wraps any torch module into a distribution over a latent, which a head chooses.

    It writes the distribution's parameters (``<latent>_loc`` and ``<latent>_scale`` for a Normal)
    and a sample ``<latent>``, ``[..., D]``. The sample is drawn with a gradient unless the
    exploration type asks for the deterministic one.

    Args:
        network: a module from the tensors at ``in_keys`` to ``[..., head.network_size(D)]``, and
            to the tensors at ``memory_keys`` after it, if there are any.
        in_keys: where the network's inputs are read.
        head: the latent's distribution; :class:`GaussianHead` by default.
        latent_key: where the latent is written.
        memory_keys: where further outputs of the network are written. What stands under
            ``"next"`` is memory, which a policy keeps and the environment hands on.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from alm_torchrl.modules import CategoricalHead
        >>> encoder = LatentModule(nn.Linear(3, 16), ["joints"], head=CategoricalHead(classes=4))
        >>> td = encoder(TensorDict(joints=torch.randn(2, 3), batch_size=[2]))
        >>> td["latent"].shape, td["latent"].detach().sum(-1)
        (torch.Size([2, 16]), tensor([4., 4.]))
    """

    def __init__(
        self,
        network: nn.Module,
        in_keys: Sequence[NestedKey],
        *,
        head: LatentHead | None = None,
        latent_key: NestedKey = "latent",
        memory_keys: Sequence[NestedKey] = (),
    ) -> None:
        head = GaussianHead() if head is None else head
        self._build(network, in_keys, head, head, latent_key, memory_keys)

    def _build(
        self,
        network: nn.Module,
        in_keys: Sequence[NestedKey],
        head: LatentHead,
        extractor: Callable[[Tensor], Any],
        latent_key: NestedKey,
        memory_keys: Sequence[NestedKey] = (),
    ) -> None:
        raw = suffix_key(latent_key, "_params")
        params = {name: suffix_key(latent_key, f"_{name}") for name in head.parameter_names}
        super().__init__(
            TensorDictModule(network, in_keys=list(in_keys), out_keys=[raw, *memory_keys]),
            TensorDictModule(extractor, in_keys=[raw], out_keys=list(params.values())),
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
        """The module from the inputs to what the head reads."""
        return self[0].module

    def acting(self) -> ProbabilisticTensorDictSequential:
        """The same networks as they act, without what belongs to training alone.

        Returns:
            A module that shares every parameter; this one itself where nothing is to be left out.
        """
        network = without_augmentation(self.network)
        if network is self.network:
            return self
        acting = LatentModule.__new__(LatentModule)
        acting._build(
            network,
            self[0].in_keys,
            self.head,
            self[1].module,
            self.dist_sample_keys[-1],
            self[0].out_keys[1:],
        )
        return acting

    def update_statistics(self, tensordict: TensorDictBase) -> None:
        """Updates the running input statistics, if the network keeps any.

        It calls ``network.update_statistics(*inputs)`` where there is such a method. The losses
        never do, so that evaluating one twice gives the same result twice.

        Args:
            tensordict: new observations at :attr:`in_keys`, of any batch size.
        """
        update = getattr(self.network, "update_statistics", None)
        if update is not None:
            update(*(tensordict.get(key) for key in self[0].in_keys))


def keeps_statistics(encoder: nn.Module) -> bool:
    """Whether a layer of an encoder has running statistics that its data moves on.

    Args:
        encoder: such as a :class:`LatentModule`.
    """
    inner = list(encoder.modules())[1:]
    return any(hasattr(module, "update_statistics") for module in inner)


class GaussianLatentModule(LatentModule):
    r"""Wraps any torch module into a softly bounded diagonal Normal over a latent.

    It writes ``<latent>_loc``, ``<latent>_scale`` and a sample ``<latent>``, each ``[..., D]``.
    The sample is drawn with a reparameterized gradient unless the exploration type asks for the
    mean. It is :class:`LatentModule` with a :class:`GaussianHead`: give it a module that maps the
    observations to ``[..., 2 * D]``, and it is an encoder of your own.

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
        bounds = BoundedNormalParamExtractor() if bounds is None else bounds
        head = GaussianHead(bounds.loc_bound, bounds.scale_min, bounds.scale_max)
        self._build(network, in_keys, head, bounds, latent_key)

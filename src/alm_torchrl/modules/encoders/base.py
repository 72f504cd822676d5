"""The base class of encoders, which takes their sizes from an observation spec."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import torch
from tensordict.utils import NestedKey, unravel_key
from torch import nn
from torchrl.data import Composite, TensorSpec

from alm_torchrl.data.transitions import BOOKKEEPING_KEYS
from alm_torchrl.modules.heads import LatentHead
from alm_torchrl.modules.latent import LatentModule


class Encoder(LatentModule):
    """A :class:`LatentModule` on observations, with a latent of size ``latent_dim``."""

    #: Dimensions of the observations that ``from_spec`` reads by default.
    _ranks: ClassVar[tuple[int, ...]] = (1,)
    #: Dimensions of the observations that it can read by name (``in_keys``), if different.
    _ranks_by_name: ClassVar[tuple[int, ...]] = ()
    #: Observations that are part of another one.
    _ignored: ClassVar[tuple[NestedKey, ...]] = ()

    def __init__(
        self,
        network: nn.Module,
        latent_dim: int,
        in_keys: Sequence[NestedKey],
        head: LatentHead,
        **options: Any,
    ) -> None:
        super().__init__(network, in_keys, head=head, **options)
        self.latent_dim = latent_dim

    @classmethod
    def from_spec(
        cls,
        spec: Composite,
        *,
        latent_dim: int = 50,
        hidden_dim: int = 512,
        in_keys: Sequence[NestedKey] | None = None,
        **options: Any,
    ) -> Self:
        """Builds an encoder for the observations of an environment.

        Args:
            spec: ``env.observation_spec_unbatched``.
            latent_dim: size of the latent; ignored by :class:`IdentityEncoder`.
            hidden_dim: width of the hidden layers, if any.
            in_keys: observations to read; by default, all that the encoder can read.
            **options: further arguments of the class.
        """
        ranks = cls._ranks if in_keys is None else cls._ranks_by_name or cls._ranks
        shapes = observation_shapes(spec, in_keys, ranks, ignore=cls._ignored)
        return cls._from_shapes(shapes, latent_dim=latent_dim, hidden_dim=hidden_dim, **options)

    @classmethod
    def _from_shapes(cls, shapes: dict[NestedKey, tuple[int, ...]], **options: Any) -> Self:
        size = sum(shape[-1] for shape in shapes.values())
        return cls(size, in_keys=list(shapes), **options)  # type: ignore[arg-type]


def observation_shapes(
    spec: Composite,
    in_keys: Iterable[NestedKey] | None,
    ranks: tuple[int, ...],
    *,
    ignore: Iterable[NestedKey] = (),
) -> dict[NestedKey, tuple[int, ...]]:
    """Returns the shapes of the observations ``in_keys``; by default, of all with these ranks.

    It warns of observations that are not read, except for ``ignore`` and the bookkeeping entries
    of TorchRL's transforms.
    """
    leaves = {unravel_key(key): leaf for key, leaf in spec.items(True, True)}
    found = {key: tuple(leaf.shape) for key, leaf in leaves.items()}
    others = {*BOOKKEEPING_KEYS, *map(unravel_key, ignore)}
    if in_keys is None:
        readable = [key for key in leaves if key not in others and _is_readable(leaves[key])]
        shapes = {key: found[key] for key in readable if len(found[key]) in ranks}
    else:
        shapes = {key: found.get(key, ()) for key in map(unravel_key, in_keys)}
    wrong = [key for key, shape in shapes.items() if len(shape) not in ranks]
    if wrong or not shapes:
        names, wanted = "".join(f"{key!r} " for key in wrong), " or ".join(map(str, ranks))
        raise ValueError(
            f"no observation {names}of {wanted} dimensions; found {found}; choose another encoder "
            "or key, or add a transform"
        )
    unread = {k: shape for k, shape in found.items() if k not in shapes and k not in others}
    if unread and in_keys is None:
        warnings.warn(
            f"the encoder reads the observations {list(shapes)} and ignores {unread}; choose an "
            "encoder for all of them (such as MultiInputEncoder for images), flatten them "
            "(torchrl.envs.FlattenObservation), or select observations with in_keys",
            stacklevel=3,
        )
    return shapes


def _is_readable(leaf: TensorSpec) -> bool:
    """Returns whether the dtype is real and, for an image, floating-point or uint8."""
    if not isinstance(leaf.dtype, torch.dtype) or leaf.dtype.is_complex:
        return False
    return leaf.ndim < 3 or leaf.dtype.is_floating_point or leaf.dtype == torch.uint8

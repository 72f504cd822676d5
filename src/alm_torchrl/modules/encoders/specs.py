"""Reading an encoder's sizes off an environment's observation spec, and its observations."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.data import Composite, TensorSpec

from alm_torchrl.data.transitions import BOOKKEEPING_KEYS

__all__ = ["joined", "observation_shapes"]


def observation_shapes(
    spec: Composite,
    in_keys: Iterable[NestedKey] | None,
    *ranks: int,
    ignore: Iterable[NestedKey] = (),
    stacklevel: int = 3,
) -> dict[NestedKey, tuple[int, ...]]:
    """The shapes of the observations that an encoder is to read.

    Vectors and matrices may be floating-point numbers, integers, flags or one-hot; images are
    floating-point numbers or bytes.

    Args:
        spec: an observation spec without batch dimensions (``env.observation_spec_unbatched``).
        in_keys: the entries to read; by default all of the given ranks, and a warning names those
            that are left out.
        ranks: numbers of dimensions that the encoder can read, such as 1 for vectors.
        ignore: entries that are no observations. Returns, counts and flags of TorchRL's own
            transforms are none either.
        stacklevel: whose line the warning points to.

    Returns:
        The shape of each, by key.

    Raises:
        ValueError: if an entry is missing or has another rank, or if none fits.
    """
    leaves = {unravel_key(key): leaf for key, leaf in spec.items(True, True)}
    found = {key: tuple(leaf.shape) for key, leaf in leaves.items()}
    wanted = " or ".join(map(str, ranks))
    if in_keys is not None:
        shapes = {key: found.get(key, ()) for key in map(unravel_key, in_keys)}
        wrong = [key for key, shape in shapes.items() if len(shape) not in ranks]
        if wrong:
            raise ValueError(
                f"this encoder reads observations of {wanted} dimensions, which "
                f"{', '.join(map(repr, wrong))} has not: the observation spec has {found}"
            )
        return shapes
    others = {*BOOKKEEPING_KEYS, *map(unravel_key, ignore)}
    shapes = {
        key: found[key]
        for key, leaf in leaves.items()
        if leaf.ndim in ranks and key not in others and _is_readable(leaf)
    }
    if not shapes:
        raise ValueError(
            f"this encoder reads observations of {wanted} dimensions; no entry of the observation "
            f"spec will do, which has {found}: take an encoder for what there is, or a transform "
            "that adds what it reads"
        )
    unread = {k: shape for k, shape in found.items() if k not in shapes and k not in others}
    if unread:
        warnings.warn(
            f"of the observations, {list(shapes)} are read and {unread} are not: take an encoder "
            "for all of them (such as MultiInputEncoder for images), make vectors of them "
            "(torchrl.envs.FlattenObservation), or name what is to be read by in_keys",
            stacklevel=stacklevel,
        )
    return shapes


def joined(*inputs: Tensor) -> Tensor:
    """Concatenates along the last dimension, integers and flags as floating-point numbers.

    Examples:
        >>> joined(torch.tensor([0.5]), torch.tensor([0, 1]), torch.tensor([True]))
        tensor([0.5000, 0.0000, 1.0000, 1.0000])
    """
    parts = [value if value.is_floating_point() else value.float() for value in inputs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _is_readable(leaf: TensorSpec) -> bool:
    """Whether a network can take these numbers; an image is floating-point numbers or bytes."""
    if not isinstance(leaf.dtype, torch.dtype) or leaf.dtype.is_complex:
        return False
    return leaf.ndim < 3 or leaf.dtype.is_floating_point or leaf.dtype == torch.uint8

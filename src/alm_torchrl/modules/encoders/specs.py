"""Reading an encoder's sizes off an environment's observation spec."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tensordict.utils import NestedKey, unravel_key
from torchrl.data import Composite

__all__ = ["observation_shapes"]


def observation_shapes(
    spec: Composite, in_keys: Iterable[NestedKey] | None, *ranks: int
) -> dict[NestedKey, tuple[int, ...]]:
    """The shapes of the observations that an encoder is to read.

    Args:
        spec: an observation spec without batch dimensions (``env.observation_spec_unbatched``).
        in_keys: the entries to read; by default all of the given ranks but the return so far.
        ranks: numbers of dimensions that the encoder can read, such as 1 for vectors.

    Returns:
        The shape of each, by key.

    Raises:
        ValueError: if an entry is missing or has another rank, or if none fits.
    """
    found = {unravel_key(key): tuple(leaf.shape) for key, leaf in spec.items(True, True)}
    if in_keys is None:
        numbers = {
            unravel_key(key)
            for key, leaf in spec.items(True, True)
            if leaf.dtype.is_floating_point or leaf.dtype == torch.uint8
        }
        shapes = {
            key: shape
            for key, shape in found.items()
            if key in numbers and len(shape) in ranks and key != "episode_reward"
        }
    else:
        shapes = {unravel_key(key): found.get(unravel_key(key), ()) for key in in_keys}
    wrong = [key for key, shape in shapes.items() if len(shape) not in ranks]
    if wrong or not shapes:
        wanted = " or ".join(map(str, ranks))
        which = ", ".join(map(repr, wrong)) or "no entry"
        raise ValueError(
            f"this encoder reads observations of {wanted} dimensions; {which} of the observation "
            f"spec will do, which has {found}. Choose them with in_keys=[...], or take an encoder "
            "for what there is"
            if not wrong
            else f"this encoder reads observations of {wanted} dimensions, which {which} has not: "
            f"the observation spec has {found}"
        )
    return shapes

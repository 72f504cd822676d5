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
    shapes = {
        key: found[key]
        for key, leaf in leaves.items()
        if leaf.ndim in ranks
        and (leaf.dtype.is_floating_point or leaf.dtype == torch.uint8)
        and key != "episode_reward"
    }
    if not shapes:
        raise ValueError(
            f"this encoder reads observations of {wanted} dimensions; no entry of the observation "
            f"spec will do, which has {found}: take an encoder for what there is, or a transform "
            "that adds what it reads"
        )
    return shapes

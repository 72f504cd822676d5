"""Entries of a transition in the shape and type that windows and losses read."""

from __future__ import annotations

import torch
from tensordict.utils import NestedKey
from torch import Tensor

__all__ = ["as_column", "as_flag"]


def as_column(value: Tensor, batch_shape: torch.Size) -> Tensor:
    """Gives an entry of one number for each transition ``[...]`` its last dimension, ``[..., 1]``.

    Args:
        value: the entry.
        batch_shape: of the batch, ``[...]``.

    Returns:
        The entry; one of any other shape as it is.
    """
    return value.unsqueeze(-1) if value.shape == batch_shape else value


def as_flag(key: NestedKey, value: Tensor, batch_shape: torch.Size) -> Tensor:
    """Reads a flag that may be stored as ``[...]`` and as zeros and ones of any type.

    Args:
        key: where the flag was found, for the message.
        value: the flag.
        batch_shape: of the batch, ``[...]``.

    Returns:
        The flag, bool ``[..., 1]``.

    Raises:
        ValueError: if it has another shape, or holds other numbers than 0 and 1.

    Examples:
        >>> as_flag("done", torch.tensor([0.0, 1.0]), torch.Size([2]))
        tensor([[False],
                [ True]])
    """
    column = as_column(value, batch_shape)
    if column.shape != (*batch_shape, 1):
        raise ValueError(
            f"entry {key!r} has shape {tuple(value.shape)}; wanted {[*batch_shape, 1]} to go with "
            "the reward and the other entries"
        )
    if column.dtype == torch.bool:
        return column
    if not torch.compiler.is_compiling() and not ((column == 0) | (column == 1)).all():
        raise ValueError(
            f"entry {key!r} of dtype {value.dtype} holds other numbers than 0 and 1; wanted "
            "torch.bool"
        )
    return column != 0

"""Reading and checking the entries of a batch, and writing priorities to it."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_batchedtensor
from tensordict.utils import NestedKey, expand_as_right
from torch import Tensor

from alm_torchrl.data.transitions import as_column, as_flag, next_key


def read_windows(
    tensordict: TensorDictBase,
    keys: Any,
    observations: Sequence[NestedKey],
    steps: int,
    dtype: torch.dtype,
) -> TensorDictBase:
    """Reads and checks windows ``[B, T]``, or transitions ``[B]`` as windows of one step.

    Converts flags to bool and numbers to ``dtype``, and adds missing last dimensions of size 1.
    """
    reward_key = next_key(keys.reward)
    reward = as_column(_read(tensordict, reward_key), tensordict.batch_size)
    shape = reward.shape[:-1]
    if len(shape) not in (1, 2) or reward.shape[-1] != 1:
        raise ValueError(
            f"entry {reward_key!r} has shape {tuple(reward.shape)}; expected [B, T, 1] (windows) "
            "or [B, 1] (transitions)"
        )
    entries = {reward_key: reward.to(dtype)}
    action = as_column(_read(tensordict, keys.action), tensordict.batch_size)
    _check_shape(keys.action, action, (*shape, "..."))
    entries[keys.action] = action.to(dtype)
    for key in observations:
        now, following = _read(tensordict, key), _read(tensordict, next_key(key))
        _check_shape(key, now, (*shape, "..."))
        _check_shape(next_key(key), following, now.shape)
        for name, value in ((key, now), (next_key(key), following)):
            # The encoder converts dtypes other than float64.
            entries[name] = value.to(dtype) if value.dtype == torch.float64 else value
    ended = torch.zeros_like(reward, dtype=torch.bool)
    for key in map(next_key, (keys.terminated, keys.truncated, keys.done)):
        if key == next_key(keys.truncated) and tensordict.get(key, None) is None:
            continue
        entries[key] = as_flag(key, _read(tensordict, key), shape)
        ended = ended | entries[key]
    entries[next_key(keys.done)] = ended
    mask = tensordict.get(keys.validity_mask, None)
    if mask is not None:
        mask = mask.squeeze(-1) if mask.ndim > len(shape) else mask
        _check_shape(keys.validity_mask, mask, shape)
        entries[keys.validity_mask] = as_flag(keys.validity_mask, mask, shape).squeeze(-1)
    windows = TensorDict(entries, batch_size=shape)
    if len(shape) == 1:
        return windows.unsqueeze(1)
    if shape[1] < steps:
        raise ValueError(
            f"the windows are too short: entry {reward_key!r} has shape {(*shape, 1)}, expected "
            f"[B, {steps}, 1]; sample windows of at least `horizon` steps or lower `horizon`"
        )
    return windows[:, :steps]


def read_weights(
    tensordict: TensorDictBase, key: NestedKey, rows: int, dtype: torch.dtype, use: bool | str
) -> Tensor | None:
    """Reads the importance weights ``[B]`` of the first transitions, if the losses use them."""
    weight = _read(tensordict, key) if use is True else tensordict.get(key, None)
    if weight is None or not use:
        return None
    if weight.shape[:1] != (rows,):
        raise ValueError(
            f"entry {key!r} has shape {tuple(weight.shape)}; expected [{rows}] or [{rows}, T]; "
            "give every window the weight of its first transition"
        )
    return weight.reshape(rows, -1)[:, 0].to(dtype)


def write_priority(
    tensordict: TensorDictBase | None, keys: Any, values: Tensor, target: Tensor
) -> None:
    """Writes the largest error of values ``[B, N]`` in the shape of the weights, if there are any.

    All steps of a window get it, so that every reduction over the window returns it.
    """
    weight = None if tensordict is None else tensordict.get(keys.priority_weight, None)
    if tensordict is not None and weight is not None:
        error = (values.detach() - target).abs().amax(-1).to(weight.dtype)
        tensordict.set(keys.priority, expand_as_right(error, weight).clone())


def is_tracing(value: Tensor) -> bool:
    """Returns whether values are not known: under ``torch.compile`` or ``torch.vmap``."""
    return torch.compiler.is_compiling() or is_batchedtensor(value)


def check_order(
    index: Tensor | None, windows: TensorDictBase, key: NestedKey, done: Tensor
) -> None:
    """Raises if transitions ``[N, 1]`` are slices of consecutive steps, one after another.

    A slice ends where the next row is not the next step: by the entry ``"index"`` of TorchRL's
    ``TensorDictReplayBuffer``, or by the observation unless the episode is done. Slices have equal
    lengths. Independent transitions end everywhere, and an episode nowhere.
    """
    if index is not None and len(index) == len(windows):
        ends = (index[1:] - index[:-1]).reshape(len(windows) - 1, -1).abs().sum(-1) != 1
    else:
        now, following = windows.get(key), windows.get(next_key(key))
        ends = (now[1:] != following[:-1]).flatten(1).any(1) & ~done[:-1, 0]
    starts = [end + 1 for end in ends.nonzero().flatten().tolist()]
    length = gcd(len(windows), *starts)
    if len(starts) > 1 and length > 1:
        raise ValueError(
            f"the batch [{len(windows)}] has slices of {length} consecutive steps, and would be "
            f"trained as windows of one step; call `.reshape(-1, {length})` on it"
        )


def _read(tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    value = tensordict.get(key, None)
    if value is None:
        found = sorted(map(str, tensordict.keys(include_nested=True, leaves_only=True)))
        raise KeyError(
            f"entry {key!r} is missing from the batch, which has {', '.join(found)}; rename "
            "it with `ALMLoss.set_keys` or store it in the replay buffer"
        )
    return value


def _check_shape(key: NestedKey, value: Tensor, expected: Sequence[int | str]) -> None:
    """Raises if an entry has another shape; ``"..."`` at the end allows further dimensions."""
    found: Sequence[int | str] = value.shape
    if expected[-1] == "..." and value.ndim >= len(expected):
        found = (*value.shape[: len(expected) - 1], "...")
    if tuple(found) != tuple(expected):
        raise ValueError(
            f"entry {key!r} has shape {tuple(value.shape)}; expected "
            f"[{', '.join(map(str, expected))}]; give all entries the batch size of the reward"
        )


def mask_invalid(value: Tensor, mask: Tensor) -> Tensor:
    """Sets floating-point values to zero where the mask is false."""
    if not value.is_floating_point():
        return value
    return torch.where(mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim)), value, 0)

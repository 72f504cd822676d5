"""The entries of transitions: their keys and shapes, and the ends of episodes."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor

#: Entries of a transition under ``"next"`` that are not observations.
OUTCOME_KEYS = ("reward", "done", "terminated", "truncated")
#: Entries that an environment may also write before a step, but that are not observations.
BOOKKEEPING_KEYS = (*OUTCOME_KEYS, "episode_reward", "step_count", "is_init")

Key = tuple[str, ...]


def tuple_key(key: NestedKey) -> Key:
    """Returns a key as a flat tuple."""
    key = unravel_key(key if isinstance(key, str) else tuple(key))
    return (key,) if isinstance(key, str) else key


def next_key(key: NestedKey) -> NestedKey:
    """Returns the same key under ``"next"``."""
    return unravel_key(("next", key))


def transition_keys(data: TensorDictBase, action_key: NestedKey = "action") -> list[Key]:
    """Returns the keys to store: observations, action, next observations, reward and flags.

    An observation is an entry that exists at the root and under ``"next"``. Other outputs of the
    policy, such as latents, are not stored.
    """
    leaves = {tuple_key(key) for key in data.keys(include_nested=True, leaves_only=True)}
    action = tuple_key(action_key)
    for needed in (action, ("next", "done")):
        if not any(key[: len(needed)] == needed for key in leaves):
            raise KeyError(
                f"the batch for the replay buffer has no {needed}; it has {sorted(leaves)}"
            )
    observations = observation_keys(leaves)
    kept = {*observations, *(("next", *key) for key in observations)}
    kept |= {key for key in leaves if key[0] == "next" and key[-1] in OUTCOME_KEYS}
    return sorted(kept | {key for key in leaves if key[: len(action)] == action})


def observation_keys(keys: Collection[Key]) -> list[Key]:
    """Returns the keys that exist at the root and under ``"next"``, without flags and counts."""
    return [key for key in keys if ("next", *key) in keys and key[-1] not in BOOKKEEPING_KEYS]


def as_column(value: Tensor, batch_shape: torch.Size) -> Tensor:
    """Adds a last dimension to an entry of shape ``batch_shape``; returns others unchanged."""
    return value.unsqueeze(-1) if value.shape == batch_shape else value


def as_flag(key: NestedKey, value: Tensor, batch_shape: torch.Size) -> Tensor:
    """Converts a flag (bool, or zeros and ones) to bool ``[..., 1]``."""
    column = as_column(value, batch_shape)
    if column.shape != (*batch_shape, 1):
        raise ValueError(
            f"entry {key!r} has shape {tuple(value.shape)}; expected {[*batch_shape, 1]}"
        )
    if column.dtype == torch.bool:
        return column
    if not torch.compiler.is_compiling() and not ((column == 0) | (column == 1)).all():
        raise ValueError(
            f"entry {key!r} of dtype {value.dtype} has values other than 0 and 1; use torch.bool"
        )
    return column != 0


def normalize_(data: TensorDictBase, action_key: NestedKey) -> None:
    """Gives flags, reward and action a last dimension, in place; ``"done"`` is any of the flags."""
    outcome, ended = data.get("next"), None
    for name in OUTCOME_KEYS[1:]:
        value = outcome.get(name, None)
        if value is None:
            continue
        flag = as_flag(("next", name), value, data.shape)
        if flag is not value:
            outcome.set(name, flag)
        ended = flag if ended is None else ended | flag
    outcome.set("done", ended)
    for part, key in ((outcome, "reward"), (data, action_key)):
        value = part.get(key, None)
        if isinstance(value, Tensor) and value.shape == data.shape:
            part.set(key, as_column(value, data.shape))


def truncated_flags(outcome: TensorDictBase, last: Tensor) -> dict[str, Tensor]:
    """Returns ``"done"`` and ``"truncated"`` for episodes that end where ``last`` is True."""
    done = outcome.get("done")
    flags = {"done": done | last}
    truncated = outcome.get("truncated", None)
    if truncated is not None:
        flags["truncated"] = truncated | (last & ~done)
    return flags


class DiscontinuityFinder:
    """Finds transitions that do not continue the previous one although no episode ended.

    It compares each observation with the previous next observation. NaN equals NaN.
    """

    def __init__(self) -> None:
        self.keys: list[Key] = []  # the observations to compare
        self._last: dict[Key, Tensor] = {}  # the newest next observations [..., 1, *O]
        self._ended: Tensor | None = None  # the "done" flag of the same transitions, [..., 1]

    def find(self, data: TensorDictBase) -> Tensor | None:
        """Returns a mask of the discontinuous transitions of a batch ``[..., T]``, or ``None``."""
        found = None
        for key in self.keys:
            new, before = data.get(key), self._previous(key, data)
            if not equal(new, before):
                differs = new != before
                if new.is_floating_point():
                    differs &= ~(new.isnan() & before.isnan())
                differs = differs.reshape(*data.shape, -1).any(-1)
                found = differs if found is None else found | differs
        if found is None:
            return None
        found &= ~self.starts(data)
        if not found.any():
            return None
        if self._ended is not None:
            self._ended = self._ended.to(found.device) | found[..., :1]
        return found

    def starts(self, data: TensorDictBase) -> Tensor:
        """Returns which transitions of a batch start an episode, bool ``[..., T]``."""
        ended = data.get(("next", "done")).squeeze(-1)
        first = torch.ones_like(ended[..., :1]) if self._ended is None else self._ended
        return torch.cat([first.to(ended.device), ended[..., :-1]], -1)

    def remember(self, data: TensorDictBase) -> None:
        """Remembers the newest transitions, to compare them with the next batch."""
        time, newest = data.ndim - 1, data.shape[-1] - 1
        outcome = data.get("next")
        self._last = {k: outcome.get(k).narrow(time, newest, 1).clone() for k in self.keys}
        self._ended = outcome.get("done").narrow(time, newest, 1).squeeze(-1).clone()

    def forget(self) -> None:
        """Forgets the newest transitions, so that any batch may follow."""
        self._last, self._ended = {}, None

    def _previous(self, key: Key, data: TensorDictBase) -> Tensor:
        """Returns the next observations one step before those of the batch."""
        time, new = data.ndim - 1, data.get(key)
        last = self._last.get(key, new.narrow(time, 0, 1))
        if last.shape[time + 1 :] != new.shape[time + 1 :]:
            raise ValueError(
                f"entry {key!r} has shape {list(new.shape[time + 1 :])}; expected "
                f"{list(last.shape[time + 1 :])} as in earlier batches"
            )
        last = last.to(new.device)
        if data.shape[-1] > 1:
            following = data.get(("next", *key))
            last = torch.cat([last, following.narrow(time, 0, data.shape[-1] - 1)], time)
        return last.to(new.dtype)


def equal(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors of the same shape, dtype and device are equal."""
    if one.dtype == torch.uint8 and one.device.type == "cpu":  # NumPy is ten times faster
        return np.array_equal(one.numpy(), other.numpy())
    return torch.equal(one, other)

"""Input and network validation for :class:`~alm_torchrl.objectives.ALMLoss`."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from operator import index
from typing import Any, SupportsIndex

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torch import distributions as D

from alm_torchrl.data.transitions import as_column, as_flag

__all__ = [
    "check_latents",
    "check_networks",
    "check_positive",
    "check_whole",
    "explain_sizes",
    "mask_invalid",
    "read_windows",
]


def read_windows(
    tensordict: TensorDictBase,
    keys: Any,
    observations: Sequence[NestedKey],
    steps: int,
    dtype: torch.dtype,
) -> TensorDictBase:
    """Reads and checks a batch.

    Converts flags of zeros and ones to bool and numbers to ``dtype``, and adds a missing last
    dimension of size 1.

    Args:
        tensordict: windows ``[B, T]`` or transitions ``[B]``.
        keys: the ``tensor_keys`` of the loss.
        observations: the ``in_keys`` of the encoder.
        steps: number of steps to read.
        dtype: dtype of the networks.

    Returns:
        The entries, ``[B, steps]`` (``[B, 1]`` from plain transitions).

    Raises:
        KeyError: if an entry is missing.
        ValueError: if an entry has the wrong shape or dtype, or the windows are too short.
    """
    reward_key, done_key, terminated_key, truncated_key = (
        unravel_key(("next", key))
        for key in (keys.reward, keys.done, keys.terminated, keys.truncated)
    )
    reward = as_column(_read(tensordict, reward_key), tensordict.batch_size)
    shape = reward.shape
    if len(shape) not in (2, 3) or shape[-1] != 1:
        raise ValueError(
            f"entry {reward_key!r} has shape {tuple(shape)}; expected [B, T, 1] (windows) or "
            "[B, 1] (transitions)"
        )
    shape = shape[:-1]
    entries = {reward_key: reward.to(dtype)}
    action = as_column(_read(tensordict, keys.action), tensordict.batch_size)
    _check_shape(keys.action, action, (*shape, "..."))
    entries[keys.action] = action.to(dtype)
    for key in observations:
        now, following = _read(tensordict, key), _read(tensordict, unravel_key(("next", key)))
        _check_shape(key, now, (*shape, "..."))
        _check_shape(unravel_key(("next", key)), following, now.shape)
        entries[key] = _as_read(now, dtype)
        entries[unravel_key(("next", key))] = _as_read(following, dtype)
    ended: Tensor | None = None
    for key in (terminated_key, truncated_key, done_key):
        if key == truncated_key and tensordict.get(key, None) is None:
            continue
        entries[key] = as_flag(key, _read(tensordict, key), shape)
        ended = entries[key] if ended is None else ended | entries[key]
    assert ended is not None  # any flag ends an episode
    entries[done_key] = ended
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


def _read(tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    value = tensordict.get(key, None)
    if value is None:
        found = sorted(map(str, tensordict.keys(include_nested=True, leaves_only=True)))
        raise KeyError(
            f"entry {key!r} is missing from the batch, which has {', '.join(found)}; rename "
            "it with `ALMLoss.set_keys` or store it in the replay buffer"
        )
    return value


def _as_read(observation: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts float64 to the dtype of the networks; the encoder handles other dtypes."""
    return observation.to(dtype) if observation.dtype == torch.float64 else observation


def _check_shape(key: NestedKey, value: Tensor, expected: Sequence[int | str]) -> None:
    """Raises if an entry has another shape; a final ``"..."`` allows further dimensions."""
    if expected[-1] == "...":
        matches = value.ndim >= len(expected) and value.shape[: len(expected) - 1] == expected[:-1]
    else:
        matches = value.shape == expected
    if not matches:
        sizes = ", ".join(map(str, expected))
        raise ValueError(
            f"entry {key!r} has shape {tuple(value.shape)}; expected [{sizes}]; give all "
            "entries the batch size of the reward"
        )


def mask_invalid(value: Tensor, mask: Tensor) -> Tensor:
    """Sets floating-point values to zero where the mask is false."""
    if not value.is_floating_point():
        return value
    return torch.where(mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim)), value, 0)


def check_whole(name: str, value: object, *, at_least: int) -> int:
    """Converts a number to ``int``; raises if it is not whole or is too small."""
    if not isinstance(value, SupportsIndex) or index(value) < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, got {value!r}")
    return index(value)


def check_positive(name: str, value: float) -> None:
    """Raises if a number is not positive and finite."""
    if not 0 < value < inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def check_networks(
    encoder: TensorDictModuleBase,
    dynamics: TensorDictModuleBase,
    reward_model: TensorDictModuleBase,
    classifier: TensorDictModuleBase,
    qvalue_network: TensorDictModuleBase,
    actor: TensorDictModuleBase,
    **others: TensorDictModuleBase,
) -> None:
    """Raises if a module has the wrong kind, or reads an entry that no module writes."""
    for name, module in {"encoder": encoder, "dynamics": dynamics, "actor": actor}.items():
        if not isinstance(module, ProbabilisticTensorDictSequential):
            raise ValueError(
                f"{name} must end in a distribution: wrap it in a "
                "ProbabilisticTensorDictSequential (or a LatentModule for a latent), got "
                f"{type(module).__name__}"
            )
    plain = {
        "reward_model": reward_model,
        "classifier": classifier,
        "qvalue_network": qvalue_network,
        **others,
    }
    for name, module in plain.items():
        if not isinstance(module, TensorDictModuleBase):
            raise ValueError(
                f"{name} must read and write a TensorDict: wrap it in a TensorDictModule, got "
                f"{type(module).__name__}"
            )
    latent, action = encoder.dist_sample_keys[-1], actor.dist_sample_keys[-1]
    available = {
        "dynamics": {latent, action},
        "reward_model": {latent, action},
        "classifier": {latent, action, dynamics.dist_sample_keys[-1]},
        "qvalue_network": {latent, action},
        "actor": {latent},
        **{name: {latent, action} for name in others},
    }
    modules = {
        "dynamics": dynamics,
        "reward_model": reward_model,
        "classifier": classifier,
        "qvalue_network": qvalue_network,
        "actor": actor,
        **others,
    }
    for name, module in modules.items():
        missing = {unravel_key(key) for key in module.in_keys} - available[name]
        if missing:
            raise ValueError(
                f"{name} reads {sorted(map(str, missing))}, but the encoder writes {latent!r}, the "
                f"actor {action!r} and the dynamics {dynamics.dist_sample_keys[-1]!r}; give the "
                "modules matching keys"
            )


def explain_sizes(
    error: RuntimeError, name: str, network: TensorDictModuleBase, inputs: TensorDictBase
) -> None:
    """Raises an error with the input shapes if they do not fit the first linear layer."""
    first = next(layer for layer in network.modules() if next(layer.children(), None) is None)
    entries = {key: inputs.get(key) for key in network.in_keys}
    sizes = sum(value.shape[-1] for value in entries.values())
    if not isinstance(first, nn.Linear) or sizes == first.in_features:
        return
    found = ", ".join(f"{key!r} of shape {tuple(v.shape)}" for key, v in entries.items())
    raise ValueError(
        f"{name} cannot read {found}; its first layer expects last sizes "
        f"that add up to {first.in_features}; build it for these inputs"
    ) from error


def check_latents(prior: D.Distribution, target: D.Distribution) -> None:
    """Raises if dynamics and encoder have latents of different shapes."""
    if prior.batch_shape + prior.event_shape != target.batch_shape + target.event_shape:
        raise ValueError(
            f"the dynamics writes latents of shape {tuple(prior.batch_shape + prior.event_shape)}, "
            f"the encoder of shape {tuple(target.batch_shape + target.event_shape)}; build both "
            "with the same `latent_dim`"
        )

"""Input and network validation for :class:`~alm_torchrl.objectives.ALMLoss`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, SupportsIndex, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torch import distributions as D

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


def check_whole(name: str, value: object, *, at_least: int) -> int:
    """Converts a number to ``int``; raises if it is not whole or too small."""
    if not isinstance(value, SupportsIndex) or index(value) < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, got {value!r}")
    return index(value)


def check_choices(options: dict[str, str], literals: dict[str, Any]) -> None:
    """Raises if an option is not one of the choices of its ``Literal``."""
    for name, value in options.items():
        choices = get_args(literals[name])
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")


def check_networks(networks: dict[str, Any]) -> None:
    """Raises if a module has the wrong type, or reads an entry that no module writes."""
    for name, module in networks.items():
        kind: type = TensorDictModuleBase
        remedy = "read and write a TensorDict: wrap it in a TensorDictModule"
        if name in ("encoder", "dynamics", "actor"):
            kind = ProbabilisticTensorDictSequential
            remedy = (
                "end in a distribution: wrap it in a ProbabilisticTensorDictSequential (or a "
                "LatentModule for a latent)"
            )
        if not isinstance(module, kind):
            raise ValueError(f"{name} must {remedy}, got {type(module).__name__}")
    latent, action, following = (
        networks[name].dist_sample_keys[-1] for name in ("encoder", "actor", "dynamics")
    )
    readable = {"actor": {latent}, "classifier": {latent, action, following}}
    for name, module in networks.items():
        missing = {*map(unravel_key, module.in_keys)} - readable.get(name, {latent, action})
        if missing and name != "encoder":
            raise ValueError(
                f"{name} reads {sorted(map(str, missing))}, but the encoder writes {latent!r}, the "
                f"actor {action!r} and the dynamics {following!r}; give the modules matching keys"
            )


def explain_inputs(
    error: RuntimeError, name: str, network: TensorDictModuleBase, inputs: TensorDictBase
) -> None:
    """Raises a clearer error if the inputs do not fit the first linear layer."""
    first = next(layer for layer in network.modules() if not any(layer.children()))
    if not isinstance(first, nn.Linear):
        return
    entries = {key: inputs.get(key) for key in network.in_keys}
    for key, value in entries.items():
        if value.dtype == torch.float64 != first.weight.dtype:
            raise ValueError(
                f"{name} cannot read {key!r} of dtype torch.float64, because its weights have "
                f"{first.weight.dtype}; convert the output of the network that writes {key!r}"
            ) from error
    sizes = sum(value.shape[-1] for value in entries.values())
    if sizes == first.in_features:
        return
    found = ", ".join(f"{key!r} of shape {tuple(v.shape)}" for key, v in entries.items())
    raise ValueError(
        f"{name} cannot read {found}; its first layer expects last sizes "
        f"that add up to {first.in_features}; build it for these inputs"
    ) from error


def split_losses(
    losses: Mapping[str, nn.Module | NestedKey] | None, encoder: TensorDictModuleBase
) -> tuple[nn.ModuleDict, dict[str, NestedKey]]:
    """Returns the modules, and the entries of the encoder; raises if it does not write one."""
    modules, entries = nn.ModuleDict(), {}
    for name, loss in (losses or {}).items():
        if isinstance(loss, nn.Module):
            modules[name] = loss
            continue
        written = [unravel_key(key) for key in encoder.out_keys]
        if not isinstance(loss, (str, tuple)) or unravel_key(loss) not in written:
            raise ValueError(
                f"auxiliary loss {name!r} is neither a module nor an entry that the encoder "
                f"writes, got {loss!r}; the encoder writes {', '.join(map(repr, written))}"
            )
        entries[name] = unravel_key(loss)
    return modules, entries


def check_latents(prior: D.Distribution, target: D.Distribution) -> None:
    """Raises if dynamics and encoder have latents of different shapes."""
    written, encoded = (tuple(dist.batch_shape + dist.event_shape) for dist in (prior, target))
    if written != encoded:
        raise ValueError(
            f"the dynamics writes latents of shape {written}, the encoder of shape {encoded}; "
            "build both with the same `latent_dim`"
        )

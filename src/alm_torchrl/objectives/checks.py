"""Option and network validation for :class:`~alm_torchrl.objectives.ALMLoss`."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from operator import index
from typing import Any, SupportsIndex, get_args

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import distributions as D
from torch import nn


def check_whole(name: str, value: object, *, at_least: int) -> int:
    """Converts a number to ``int``; raises if it is not whole or too small."""
    if not isinstance(value, SupportsIndex) or index(value) < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, got {value!r}")
    return index(value)


def check_level(level: float) -> None:
    """Raises if the level of the consistency is not positive and finite."""
    if not 0 < level < inf:
        raise ValueError(f"consistency_level must be a positive finite number, got {level!r}")


def check_choices(options: dict[str, Any], literals: dict[str, Any]) -> None:
    """Raises if an option is not one of the choices of its ``Literal``."""
    for name, value in options.items():
        choices = get_args(literals[name])
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}")


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
    transition = {latent, action, following}
    readable = {
        "actor": {latent},
        "classifier": transition,
        "continuation_model": transition,
    }
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


def refuse_estimator_options(**options: object) -> None:
    """Raises if an option of the value estimator is given."""
    if given := [name for name, value in options.items() if value is not None]:
        call = ", ".join(f"{name}=..." for name in given)
        raise TypeError(f"ALMLoss does not accept {call}; call loss.make_value_estimator({call})")

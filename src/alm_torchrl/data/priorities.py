"""Prioritized sampling of the first transitions of windows."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torchrl.data import PrioritizedSampler

#: Exponents of Schaul et al. (2016), arXiv 1511.05952, and TorchRL's ``eps``.
DEFAULTS = {"alpha": 0.6, "beta": 0.4, "eps": 1e-8}
_TREES = ("_sum_tree", "_min_tree")


def prioritized_sampler(
    options: bool | Mapping[str, float], capacity: int, device: torch.device, per_env: bool
) -> PrioritizedSampler:
    """Creates TorchRL's sampler; see ``prioritized`` of :func:`make_replay_buffer`.

    Raises:
        ValueError: if an option is unknown or out of range, or with ``per_env``.
        RuntimeError: if TorchRL's C++ extension does not load.
    """
    if per_env:
        raise ValueError("prioritized=... and per_env=True cannot be combined: choose one of them")
    chosen: dict[str, Any] = {**DEFAULTS, **(options if isinstance(options, Mapping) else {})}
    if unknown := chosen.keys() - DEFAULTS.keys():
        raise ValueError(f"prioritized has no {sorted(unknown)}; its options are {list(DEFAULTS)}")
    for name, value in chosen.items():
        number = isinstance(value, int | float) and 0 <= value < math.inf
        if not number or (name == "eps" and not value):
            least = "greater than 0" if name == "eps" else "of at least 0"
            raise ValueError(f"{name} of prioritized must be a number {least}, not {value!r}")
    try:
        importlib.import_module("torchrl._torchrl")
    except ImportError as error:
        raise RuntimeError(
            "prioritized replay needs TorchRL's C++ extension, which does not load with torch "
            f"{version('torch')} and torchrl {version('torchrl')}: install a pair that works, such "
            "as torch 2.14.1 and torchrl 0.14.1 (see the installation page)"
        ) from error
    return PrioritizedSampler(capacity, **chosen, device=device)


def read_priorities(sampler: PrioritizedSampler, index: Tensor) -> dict[str, Any]:
    """Returns the sampler's state, with the priorities of the transitions ``index`` ``[M]``."""
    state = sampler.state_dict()
    for tree in _TREES:
        state[tree] = torch.as_tensor(state[tree][index])
    state["_max_priority"] = [float(value) for value in state["_max_priority"]]
    return state


def write_priorities(sampler: PrioritizedSampler, index: Tensor, state: dict[str, Any]) -> None:
    """Restores the newest priorities of :func:`read_priorities`, oldest first, at ``index``."""
    trees = {tree: sampler.state_dict()[tree] for tree in _TREES}
    for tree, values in trees.items():
        values[index] = state[tree][-len(index) :]
    maximum = tuple(state["_max_priority"])
    sampler.load_state_dict({**state, **trees, "_max_priority": maximum})

"""Conversion of Gymnasium spaces that TorchRL does not support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def with_supported_spaces(env: Any) -> Any:
    """Converts observations that TorchRL does not support, and actions that are not a vector.

    Discrete observations that do not start at 0 are shifted, binary and discrete matrices become
    vectors, float16 becomes float32, and the parts of a Tuple are named "0", "1" and so on. Scalar
    and matrix actions, and a Dict or Tuple of boxes, become one float32 vector.
    """
    import gymnasium
    from gymnasium import spaces

    action: Any = env.action_space
    is_vector = isinstance(action, spaces.Box) and len(action.shape) == 1
    if _is_continuous(action) and not (is_vector and action.dtype != np.float16):
        flat: Any = spaces.flatten_space(action)
        low, high = flat.low.astype(np.float32), flat.high.astype(np.float32)
        env = gymnasium.wrappers.TransformAction(
            env,
            lambda value: spaces.unflatten(action, value),
            spaces.Box(low, high, dtype=np.float32),
        )
    space, convert = _supported(env.observation_space)
    if space == env.observation_space:
        return env
    return gymnasium.wrappers.TransformObservation(env, convert, space)


def _supported(space: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Returns a supported space, and the function that converts a value to it."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        items = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        parts = {key: _supported(part) for key, part in items}
        return spaces.Dict({str(key): part for key, (part, _) in parts.items()}), lambda values: {
            str(key): convert(values[key]) for key, (_, convert) in parts.items()
        }
    if isinstance(space, spaces.Discrete) and space.start != 0:
        return spaces.Discrete(space.n), lambda value: value - space.start
    if isinstance(space, spaces.MultiDiscrete) and (space.nvec.ndim > 1 or space.start.any()):
        return spaces.MultiDiscrete(space.nvec.ravel()), lambda v: (v - space.start).ravel()
    if isinstance(space, spaces.MultiBinary) and len(space.shape) > 1:
        return spaces.MultiBinary(int(np.prod(space.shape))), np.ravel
    if isinstance(space, spaces.Box) and space.dtype == np.float16:
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        return spaces.Box(low, high, dtype=np.float32), lambda value: value.astype(np.float32)
    return space, lambda value: value


def _is_continuous(space: Any) -> bool:
    """Returns whether a space consists of floating-point boxes only."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return all(map(_is_continuous, space.values()))
    if isinstance(space, spaces.Tuple):
        return all(map(_is_continuous, space))
    return isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)

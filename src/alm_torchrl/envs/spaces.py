"""Gymnasium's spaces, as TorchRL and ALM read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__: list[str] = []


def with_readable_spaces(env: Any) -> Any:
    """Converts the observations and actions of an environment that are not read as they are."""
    return _with_plain_observation(_with_vector_action(env))


def _with_plain_observation(env: Any) -> Any:
    """Converts the observations that TorchRL cannot read.

    Numbers that do not begin at 0 are shifted, binary and discrete matrices become vectors, half
    precision becomes float32, and the parts of a Tuple get the names "0", "1" and so on.
    """
    import gymnasium

    space, convert = _plain(env.observation_space)
    if space == env.observation_space:
        return env
    return gymnasium.wrappers.TransformObservation(env, convert, space)


def _plain(space: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A space that TorchRL reads, and what brings a value of the other into it."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        items = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        parts = {key: _plain(part) for key, part in items}
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


def _with_vector_action(env: Any) -> Any:
    """Flattens the action, if it is made of boxes that are not one float32 or float64 vector.

    Scalars, matrices, half precision, and a Dict or Tuple of boxes become one float32 vector.
    """
    import gymnasium
    from gymnasium import spaces

    space = env.action_space
    if isinstance(space, spaces.Box) and len(space.shape) == 1 and space.dtype != np.float16:
        return env
    if not _is_continuous(space):
        return env
    flat: Any = spaces.flatten_space(space)
    low, high = flat.low.astype(np.float32), flat.high.astype(np.float32)
    vector = spaces.Box(low, high, dtype=np.float32)
    return gymnasium.wrappers.TransformAction(
        env, lambda action: spaces.unflatten(space, action), vector
    )


def _is_continuous(space: Any) -> bool:
    """Whether a space is made of boxes of floating-point numbers alone."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return all(map(_is_continuous, space.values()))
    if isinstance(space, spaces.Tuple):
        return all(map(_is_continuous, space))
    return isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)

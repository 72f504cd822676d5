"""The random generators of environments: read, and put back where they were."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchrl.envs import EnvBase, GymWrapper, SerialEnv, TransformedEnv
from torchrl.envs.libs.dm_control import DMControlWrapper

from alm_torchrl.envs.transforms import Distractors, transforms_of

__all__ = ["random_states", "set_random_states"]


def random_states(env: EnvBase) -> list[str]:
    """The states of the random generators that the next episodes are drawn from.

    Args:
        env: an environment, such as :func:`make_env` makes; or a collector with environments in
            processes of their own, of which nothing is known.

    Returns:
        For each Gymnasium or DeepMind Control environment in it that lives in this process, its
        generator's state as JSON, followed by that of its :class:`Distractors`; nothing for others,
        such as Gymnasium's vector environments, or if the environment is closed.
    """
    return [json.dumps(_state(g), default=np.ndarray.tolist) for g in _generators(env)]


def set_random_states(env: EnvBase, states: Sequence[str]) -> None:
    """Gives the random generators of an environment back the states that they had.

    Without states, the environment is seeded from torch's generator; so is first an environment
    whose own generators are not known, such as an :class:`~torchrl.envs.EnvBase` of the user's.

    Args:
        env: an environment like that of :func:`random_states`.
        states: what that returned.

    Raises:
        ValueError: if there are not as many states as environments.
    """
    if states and isinstance(env, EnvBase) and env.is_closed:
        env.reset()  # which makes those that are stepped together
    if not states or _any_unknown(env):
        env.set_seed(int(torch.randint(2**31 - 1, ())))
    if not states:
        return
    generators = _generators(env)
    if len(generators) != len(states):
        raise ValueError(f"{len(states)} states of generators for {len(generators)} generators")
    for generator, state in zip(generators, states, strict=True):
        _set_state(generator, json.loads(state))


def _generators(env: EnvBase) -> list[Any]:
    if isinstance(env, TransformedEnv):
        noises = [t.np_random for t in transforms_of(env) if isinstance(t, Distractors)]
        return [*_generators(env.base_env), *noises]
    if isinstance(env, SerialEnv):
        return [one for part in _parts(env) for one in _generators(part)]
    if not isinstance(env, EnvBase) or env.is_closed:
        return []
    if isinstance(env, GymWrapper):
        return [] if env.batch_size else [env._env.unwrapped.np_random]
    return [env._env.task.random] if isinstance(env, DMControlWrapper) else []


def _parts(env: SerialEnv) -> list[EnvBase]:
    """The environments in it; none before they are made or once it is closed."""
    parts: list[EnvBase] = vars(env).get("_envs", [])  # as an attribute, they would be asked for it
    return parts


def _any_unknown(env: EnvBase) -> bool:
    if isinstance(env, TransformedEnv):
        return _any_unknown(env.base_env)
    if isinstance(env, SerialEnv):
        return any(_any_unknown(part) for part in _parts(env))
    # Gymnasium's vector environments keep their generators in processes of their own
    return not isinstance(env, (GymWrapper, DMControlWrapper)) or bool(env.batch_size)


def _state(generator: np.random.Generator | np.random.RandomState) -> dict[str, Any]:
    if isinstance(generator, np.random.RandomState):  # dm_control has the older kind
        return generator.get_state(legacy=False)
    return dict(generator.bit_generator.state)


def _set_state(
    generator: np.random.Generator | np.random.RandomState, state: dict[str, Any]
) -> None:
    if isinstance(generator, np.random.RandomState):
        state["state"]["key"] = np.array(state["state"]["key"], dtype=np.uint32)
        generator.set_state(state)
    else:
        generator.bit_generator.state = state

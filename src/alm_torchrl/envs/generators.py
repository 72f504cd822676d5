"""States of the random generators of environments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchrl.envs import EnvBase, GymWrapper, SerialEnv, TransformedEnv
from torchrl.envs.libs.dm_control import DMControlWrapper

from alm_torchrl.envs.transforms import Distractors, transforms_of

Generator = np.random.Generator | np.random.RandomState


def random_states(env: EnvBase) -> list[str]:
    """Returns the states of the random generators of an environment, as JSON.

    They are those of the Gymnasium and DeepMind Control environments in this process, and of their
    :class:`Distractors`. Vector environments of Gymnasium, closed environments and collectors with
    workers have none.
    """
    return [json.dumps(_state(g), default=np.ndarray.tolist) for g in _generators(env)]


def set_random_states(env: EnvBase, states: Sequence[str]) -> None:
    """Restores the random generators of an environment.

    Environments with unknown generators, such as a custom :class:`~torchrl.envs.EnvBase`, are
    seeded from torch's generator, and so is any environment if there are no states.

    Raises:
        ValueError: if the number of states is wrong.
    """
    if states and isinstance(env, EnvBase) and env.is_closed:
        env.reset()  # creates the environments of a SerialEnv
    if not states or _any_unknown(env):
        env.set_seed(int(torch.randint(2**31 - 1, ())))
    if not states:
        return
    generators = _generators(env)
    if len(generators) != len(states):
        raise ValueError(f"{len(states)} states for {len(generators)} random generators")
    for generator, state in zip(generators, states, strict=True):
        _set_state(generator, json.loads(state))


def _generators(env: EnvBase) -> list[Generator]:
    if isinstance(env, TransformedEnv):
        noises = [t.np_random for t in transforms_of(env) if isinstance(t, Distractors)]
        return [*_generators(env.base_env), *noises]
    if isinstance(env, SerialEnv):
        return [generator for part in _parts(env) for generator in _generators(part)]
    if not isinstance(env, EnvBase) or env.is_closed:
        return []
    if isinstance(env, GymWrapper):
        return [] if env.batch_size else [env._env.unwrapped.np_random]
    return [env._env.task.random] if isinstance(env, DMControlWrapper) else []


def _parts(env: SerialEnv) -> list[EnvBase]:
    """Returns its environments; none before they are created or after they are closed."""
    parts: list[EnvBase] = vars(env).get("_envs", [])  # SerialEnv forwards attributes to them
    return parts


def _any_unknown(env: EnvBase) -> bool:
    if isinstance(env, TransformedEnv):
        return _any_unknown(env.base_env)
    if isinstance(env, SerialEnv):
        return any(_any_unknown(part) for part in _parts(env))
    # Gymnasium's vector environments have their generators in other processes.
    return not isinstance(env, (GymWrapper, DMControlWrapper)) or bool(env.batch_size)


def _state(generator: Generator) -> dict[str, Any]:
    if isinstance(generator, np.random.RandomState):  # used by dm_control
        return generator.get_state(legacy=False)
    return dict(generator.bit_generator.state)


def _set_state(generator: Generator, state: dict[str, Any]) -> None:
    if isinstance(generator, np.random.RandomState):
        state["state"]["key"] = np.array(state["state"]["key"], dtype=np.uint32)
        generator.set_state(state)
    else:
        generator.bit_generator.state = state

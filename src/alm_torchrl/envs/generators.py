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

    It knows the generators of Gymnasium and DeepMind Control environments in this process, and of
    their :class:`Distractors`. The result is empty for vector environments of Gymnasium, closed
    environments and collectors with workers.
    """
    known = [generator for generator in _generators(env) if generator is not None]
    return [json.dumps(_state(generator), default=np.ndarray.tolist) for generator in known]


def set_random_states(env: EnvBase, states: Sequence[str]) -> None:
    """Restores the random generators of an environment; raises if the number of states is wrong.

    If there are no states, or generators are unknown (as in a custom
    :class:`~torchrl.envs.EnvBase`), it seeds the environment from torch's generator.
    """
    if states and isinstance(env, EnvBase) and env.is_closed:
        env.reset()  # creates the environments of a SerialEnv
    if not states or None in _generators(env):
        env.set_seed(int(torch.randint(2**31 - 1, ())))
    if not states:
        return
    generators = [generator for generator in _generators(env) if generator is not None]
    if len(generators) != len(states):
        raise ValueError(f"{len(states)} states for {len(generators)} random generators")
    for generator, state in zip(generators, states, strict=True):
        _set_state(generator, json.loads(state))


def _generators(env: EnvBase) -> list[Generator | None]:
    """Returns the generators, and None for each environment with unknown generators."""
    if isinstance(env, TransformedEnv):
        noises = [t.np_random for t in transforms_of(env) if isinstance(t, Distractors)]
        return [*_generators(env.base_env), *noises]
    if isinstance(env, SerialEnv):  # not env._envs: it would forward a missing attribute
        return [one for part in vars(env).get("_envs", []) for one in _generators(part)]
    if not isinstance(env, (GymWrapper, DMControlWrapper)) or env.batch_size:
        return [None]
    if env.is_closed:
        return []
    return [env._env.unwrapped.np_random if isinstance(env, GymWrapper) else env._env.task.random]


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

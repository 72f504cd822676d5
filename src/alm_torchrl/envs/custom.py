"""Environments of one's own: a class or a function, or where to import it from."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torchrl.envs import EnvBase

from alm_torchrl.envs.gymnasium import GymnasiumEnv, with_own_context
from alm_torchrl.envs.spaces import with_readable_spaces

__all__: list[str] = []

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_import_path(task: str) -> bool:
    """Whether this is ``package.module:attribute`` rather than a Gymnasium id."""
    return _PATH.fullmatch(task) is not None


def import_factory(path: str) -> Callable[..., Any]:
    """Imports what makes an environment.

    Args:
        path: ``package.module:attribute``.

    Returns:
        The class or function.

    Raises:
        ValueError: if there is no such module or attribute, or it cannot be called.
    """
    name, _, attribute = path.partition(":")
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks one of its own
        raise ValueError(
            f"{path}: there is no module {error.name!r} to import; put the folder it lies in on "
            "PYTHONPATH"
        ) from None
    try:
        factory = reduce(getattr, attribute.split("."), module)
    except AttributeError:
        raise ValueError(f"{path}: the module {name!r} has no {attribute!r}") from None
    if not callable(factory):
        raise ValueError(
            f"{path} is a {type(factory).__name__}: name a class, or a function that makes the "
            "environment, since several are needed"
        )
    return factory


def make_custom(
    factory: Callable[..., Any],
    kwargs: dict[str, Any],
    *,
    name: str,
    action_repeat: int,
    device: torch.device | str,
) -> EnvBase:
    """One environment of the user's.

    Args:
        factory: a class or function that returns an :class:`~torchrl.envs.EnvBase` or a
            ``gymnasium.Env``.
        kwargs: its arguments.
        name: what messages call it.
        action_repeat: steps with each action, for a ``gymnasium.Env``.
        device: where the tensors live.

    Returns:
        The environment, without transforms.

    Raises:
        ValueError: if that is no environment, or one that ``action_repeat`` is not for.
    """
    env = factory(**kwargs)
    if isinstance(env, EnvBase):
        if env.batch_size:
            raise ValueError(
                f"{name} makes a batch of environments {list(env.batch_size)}: let it make one, "
                "and choose their number by num_envs"
            )
        if action_repeat > 1:
            raise ValueError(
                f"action_repeat={action_repeat}: {name} makes a {type(env).__name__}, which is an "
                "EnvBase and repeats actions in its own _step"
            )
        return env.to(device)
    if find_spec("gymnasium") is not None:
        import gymnasium

        if isinstance(env, gymnasium.Env):
            env = with_readable_spaces(with_own_context(env))
            return GymnasiumEnv(env, frame_skip=action_repeat, device=device)
    raise ValueError(
        f"{name} makes a {type(env).__name__}, which is neither a torchrl.envs.EnvBase nor a "
        "gymnasium.Env"
    )

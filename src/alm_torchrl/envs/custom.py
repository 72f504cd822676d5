"""Custom environments: a class, a function, or an import path."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from typing import Any

from torchrl.envs import EnvBase

from alm_torchrl.envs.gymnasium import wrap

#: The form ``package.module:attribute``.
IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def import_factory(path: str) -> Callable[..., Any]:
    """Imports the class or function at ``package.module:attribute``."""
    name, _, attribute = path.partition(":")
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, but one of its imports does not
        message = f"{path}: there is no module {error.name!r}; add its folder to PYTHONPATH"
        raise ValueError(message) from None
    try:
        factory = reduce(getattr, attribute.split("."), module)
    except AttributeError:
        raise ValueError(f"{path}: the module {name!r} has no {attribute!r}") from None
    if not callable(factory):
        raise ValueError(
            f"{path} is a {type(factory).__name__}: give the path of a class or a function that "
            "creates the environment"
        )
    return factory


def make_custom(
    factory: Callable[..., Any], name: str, kwargs: dict[str, Any], **wrapper: Any
) -> EnvBase:
    """Creates one custom environment, without transforms."""
    env = factory(**kwargs)
    if isinstance(env, EnvBase):
        if env.batch_size:
            raise ValueError(
                f"{name} creates a batch of environments {list(env.batch_size)}: create only one "
                "and use num_envs, or pass the batch itself to make_collector"
            )
        if wrapper["frame_skip"] > 1:
            raise ValueError(
                f"action_repeat={wrapper['frame_skip']} does not apply to {name}: an EnvBase "
                "repeats actions in its own _step"
            )
        return env.to(wrapper["device"])
    gymnasium = sys.modules.get("gymnasium")
    if gymnasium is not None and isinstance(env, gymnasium.Env):
        return wrap(env, **wrapper)
    raise ValueError(
        f"{name} creates a {type(env).__name__}, which is neither a torchrl.envs.EnvBase nor a "
        "gymnasium.Env"
    )

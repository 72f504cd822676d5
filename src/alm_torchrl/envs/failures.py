"""Errors of environments, and the names of environments in messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tensordict import TensorDictBase
from torchrl.envs import EnvBase, GymWrapper, TransformedEnv

from alm_torchrl.files import one_line


class EnvironmentFailedError(RuntimeError):
    """An environment raised an exception, or returned non-finite values (which are not stored)."""


@contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Converts exceptions to an :class:`EnvironmentFailedError` that starts with ``what``."""
    try:
        yield
    except EnvironmentFailedError:
        raise
    except Exception as error:
        raise EnvironmentFailedError(f"{what}: {one_line(error)}") from error


def check_finite(
    data: TensorDictBase, where: str, kind: type[Exception] = FloatingPointError
) -> None:
    """Raises an error of type ``kind`` if an entry has a non-finite number."""
    for key, leaf in data.items(include_nested=True, leaves_only=True):
        if leaf.is_floating_point() and not leaf.isfinite().all():
            raise kind(
                f"non-finite value in {key!r} {where}: the simulation may have diverged, or the "
                "action range may be too large"
            )


def env_name(env: EnvBase) -> str:
    """Returns the task of an environment, or its class."""
    while isinstance(env, TransformedEnv):
        if "task_name" in vars(env):
            return env.task_name
        env = env.base_env
    spec = env._env.spec if isinstance(env, GymWrapper) else None
    return getattr(spec, "id", type(env).__name__)

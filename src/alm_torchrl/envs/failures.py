"""What is raised when an environment fails, and what messages call an environment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torchrl.envs import EnvBase, GymWrapper, TransformedEnv

from alm_torchrl.files import one_line

__all__ = ["EnvironmentFailedError", "env_name", "failing_as"]


class EnvironmentFailedError(RuntimeError):
    """An environment raised, or returned what is not finite; nothing of it was stored."""


@contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Raises what fails inside as an :class:`EnvironmentFailedError` of one line.

    Args:
        what: what failed, the beginning of the message.
    """
    try:
        yield
    except EnvironmentFailedError:
        raise
    except Exception as error:
        raise EnvironmentFailedError(f"{what}: {one_line(error)}") from error


def env_name(env: EnvBase) -> str:
    """What messages call an environment: its task, or its class.

    Args:
        env: such as :func:`make_env` makes.

    Examples:
        >>> from alm_torchrl.envs import make_env
        >>> env_name(make_env("Pendulum-v1"))
        'Pendulum-v1'
    """
    while isinstance(env, TransformedEnv):
        if "task_name" in vars(env):
            return env.task_name
        env = env.base_env
    spec = env._env.spec if isinstance(env, GymWrapper) else None
    return getattr(spec, "id", type(env).__name__)

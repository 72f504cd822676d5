"""Returns of whole episodes."""

from __future__ import annotations

import warnings

import torch
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type, step_mdp

from alm_torchrl.envs.failures import check_finite, env_name

_PIECE = 100  # steps per rollout
_MAX_STEPS = 100_000


@torch.no_grad()
def evaluate_policy(
    env: EnvBase,
    policy: TensorDictModuleBase,
    episodes: int = 5,
    *,
    max_steps: int | None = None,
    exploration_type: ExplorationType = ExplorationType.DETERMINISTIC,
    reward_key: NestedKey | None = None,
) -> Tensor:
    """Returns the undiscounted returns of a policy, ``[episodes]``.

    Args:
        env: an environment or a batch of environments, each of which plays one episode at a time.
            Do not pass the environment of a collector.
        policy: the policy, such as :meth:`alm_torchrl.agent.ALMAgent.policy`.
        episodes: number of episodes.
        max_steps: steps after which an episode is cut, with a warning; 100,000 by default.
        exploration_type: how the policy chooses actions; the mean action by default.
        reward_key: reward under ``"next"`` to sum. By default, the return is ``"episode_reward"``
            if the environment has it, and otherwise the sum of ``"reward"``. Environments of
            :func:`~alm_torchrl.envs.make_env` have it, without the effect of ``transforms``.

    Raises:
        ValueError: if ``episodes`` or ``max_steps`` is less than 1, or the environment is closed.
        FloatingPointError: if an episode has a non-finite value.

    Examples:
        >>> from torchrl.testing.mocking_classes import CountingEnv
        >>> from torchrl.modules import RandomPolicy
        >>> env = CountingEnv(max_steps=4)
        >>> evaluate_policy(env, RandomPolicy(env.action_spec), episodes=2).shape
        torch.Size([2])
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    limit = _MAX_STEPS if max_steps is None else max_steps
    if limit < 1:
        raise ValueError(f"max_steps must be at least 1, or None, got {max_steps}")
    returns: list[Tensor] = []
    with set_exploration_type(exploration_type):
        while sum(r.numel() for r in returns) < episodes:
            played = _play(env, policy, limit, reward_key)
            returns.append(played.reshape(-1).cpu())
    return torch.cat(returns)[:episodes]


def _play(
    env: EnvBase, policy: TensorDictModuleBase, max_steps: int, reward_key: NestedKey | None
) -> Tensor:
    """Plays an episode in each environment, in pieces to limit memory; returns the returns."""
    batched = bool(env.batch_size)
    try:
        start = env.reset()
    except Exception as error:
        if not env.is_closed:
            raise
        raise ValueError(
            f"the environment is closed ({type(error).__name__}): a collector closes its "
            "environments, so evaluate in another one"
        ) from error
    keeps_return = reward_key is None and "episode_reward" in start.keys()  # noqa: SIM118
    key = "episode_reward" if keeps_return else reward_key or "reward"
    values: list[Tensor] = []
    dones: list[Tensor] = []
    for first in range(0, max_steps, _PIECE):
        if first and batched:
            start = env.maybe_reset(start)
        rollout = env.rollout(
            min(_PIECE, max_steps - first),
            policy,
            auto_reset=False,
            tensordict=start,
            break_when_any_done=not batched,
            auto_cast_to_device=True,
        )
        check_finite(rollout, f"of {env_name(env)}")
        values.append(rollout[unravel_key(("next", key))].squeeze(-1))
        dones.append(rollout["next", "done"].squeeze(-1))
        if torch.cat(dones, -1).any(-1).all():
            break
        start = step_mdp(rollout[..., -1])
    else:
        warnings.warn(
            f"episodes were cut after {max_steps} steps, so their returns are partial: give the "
            "environment a time limit, or raise max_steps (evaluation.max_steps of the recipe)",
            stacklevel=4,  # past this function, evaluate_policy, and torch.no_grad
        )
    done, value = torch.cat(dones, -1), torch.cat(values, -1)
    first_episode = (done.cumsum(-1) - done.int()) == 0
    if keeps_return:
        return value.gather(-1, first_episode.sum(-1, keepdim=True) - 1).squeeze(-1)
    return (value * first_episode).sum(-1)

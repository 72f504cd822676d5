"""Episodes that the policy imagines, as training data for the policy and values."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn

from alm_torchrl.objectives.checks import check_whole

__all__ = ["ImaginedReplay"]

_KEPT_REFILLS = 10


class ImaginedReplay(nn.Module):
    """Adds steps of imagined episodes to batches, for the losses of the policy and values.

    Recorded observations come from older policies. In imagined episodes, the policy and values
    train on latents that the current policy reaches, similar to the distribution rollouts of Kubo
    et al. (2025, "Double Horizon Model-Based Policy Optimization"). The values learn the
    lambda-returns of these episodes.

    Every ``refill``-th batch plays new episodes with :meth:`ALMLoss.imagine_episodes`, with as many
    steps as ``refill`` batches have rows, but at most one rollout from each window. The steps of
    the last ten refills are kept, also in a state dict. In
    :class:`~alm_torchrl.training.ALMTrainer`, register it as an operation:
    ``trainer.register_op("process_optim_batch", imagined)``.

    Args:
        loss: the objective, or a :class:`~alm_torchrl.training.StackedLoss`.
        steps: imagined steps after a recorded observation.
        refill: number of batches between refills.

    Raises:
        ValueError: if a number is not whole or below 1.

    Examples:
        >>> from alm_torchrl import ALMAgent, ALMLoss, make_env, make_replay_buffer
        >>> env = make_env("Pendulum-v1", seed=0)
        >>> agent = ALMAgent.from_env(env, hidden_dim=16, dynamics_hidden_dim=16)
        >>> loss, replay_buffer = ALMLoss(**agent.networks()), make_replay_buffer(100, batch_size=8)
        >>> indices = replay_buffer.extend(env.rollout(50))
        >>> imagined = ImaginedReplay(loss, steps=10)
        >>> windows = imagined(replay_buffer.sample())
        >>> windows["imagined", "value_target"].shape
        torch.Size([8, 3, 1])
        >>> losses = loss(windows)
    """

    loss: Any

    def __init__(self, loss: nn.Module, steps: int, *, refill: int = 20) -> None:
        super().__init__()
        self.__dict__["loss"] = loss  # an nn.Module, but not part of this one
        self.steps = check_whole("steps", steps, at_least=1)
        self.refill = check_whole("refill", refill, at_least=1)
        self._calls = 0
        self._kept: TensorDictBase | None = None

    def forward(self, windows: TensorDictBase) -> TensorDictBase:
        """Adds the entry ``"imagined"`` to windows ``[B, T]``, or ``[S, B, T]`` of ``S`` seeds."""
        if self._calls % self.refill == 0:
            self._play(windows)
        self._calls += 1
        assert self._kept is not None
        rows = torch.randint(len(self._kept), windows.shape[-2:-1], device=self._kept.device)
        steps = self._kept[rows]
        if windows.ndim == 3:
            steps = steps.transpose(0, 1)
        return windows.copy().set("imagined", steps.unsqueeze(-1).expand(windows.shape))

    def _play(self, windows: TensorDictBase) -> None:
        """Adds imagined episodes that start in these windows, and forgets the oldest."""
        rows = max(self.refill * windows.shape[-2] // self.steps, 1)
        starts = windows[..., :rows, :]
        episodes = self.loss.imagine_episodes(starts, self.steps).flatten(-2, -1)
        if episodes.ndim == 2:  # the seeds follow the steps, so that all forget alike
            episodes = episodes.transpose(0, 1)
        kept = [] if self._kept is None else [self._kept]
        self._kept = torch.cat([*kept, episodes])[-_KEPT_REFILLS * len(episodes) :]

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the number of calls and the steps, for a state dict."""
        steps = {} if self._kept is None else self._kept.to_dict()
        return {"calls": self._calls, "steps": steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`get_extra_state` returned."""
        self._calls, steps = state["calls"], state["steps"]
        if not steps:
            self._kept = None
            return
        lead = steps["value_target"].shape[:-1]
        device = next(self.loss.parameters()).device
        self._kept = TensorDict(steps, batch_size=lead).to(device)

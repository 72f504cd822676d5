"""Aligned Latent Models as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.objectives import SoftUpdate

from alm_torchrl.agent import ALMAgent
from alm_torchrl.evaluation import evaluate_policy
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training.experience import Experience

__all__ = ["ALMModule"]


class ALMModule(L.LightningModule):
    """One update for every batch of experience, and an evaluation as the validation step.

    All five losses are minimised by one backward pass and one optimiser with a parameter group
    for each of :meth:`ALMLoss.parameter_groups`; the norm of each group's gradient is clipped
    apart, and a norm that is not finite stops the run before it does damage. The target networks
    follow after every update.

    Put the agent on its device before the loss is built, so that acting and losses keep sharing
    the noise schedule.

    Args:
        agent: the components and the acting policy.
        loss: the objective built on the agent's networks.
        experience: where batches come from.
        eval_env: environments to evaluate in, apart from those that are learnt from.
        learning_rates: one rate, or one for each parameter group by name.
        max_grad_norm: largest gradient norm of a group.
        target_tau: weight of the new value in the targets' moving average.
        eval_episodes: episodes of an evaluation.
        log_every: updates between two entries in the loggers.

    Raises:
        ValueError: if the loss was not built on the agent, or a learning rate names no group.
    """

    def __init__(
        self,
        agent: ALMAgent,
        loss: ALMLoss,
        experience: Experience,
        eval_env: EnvBase,
        *,
        learning_rates: float | Mapping[str, float] = 1e-4,
        max_grad_norm: float = 100.0,
        target_tau: float = 0.005,
        eval_episodes: int = 5,
        log_every: int = 100,
    ) -> None:
        super().__init__()
        self.agent = agent
        self.loss = loss
        self.experience = experience
        self.eval_env = eval_env
        self.learning_rates = learning_rates
        self.max_grad_norm = max_grad_norm
        self.eval_episodes = eval_episodes
        self.log_every = log_every
        self.target_update = SoftUpdate(loss, tau=target_tau)
        self._check_sharing()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the four parameter groups."""
        groups = self.loss.parameter_groups()
        rates = self.learning_rates
        if not isinstance(rates, Mapping):
            rates = dict.fromkeys(groups, rates)
        if rates.keys() != groups.keys():
            raise ValueError(f"learning_rates names {sorted(rates)}, wanted {sorted(groups)}")
        return torch.optim.Adam(
            [{"name": n, "params": p, "lr": rates[n]} for n, p in groups.items()], fused=True
        )

    def train_dataloader(self) -> Experience:
        """The experience, which is iterated in this process."""
        return self.experience

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> Tensor:
        """The sum of the five losses."""
        losses = self.loss(batch)
        if batch_idx % self.log_every == 0:
            self._log_metrics({f"train/{k}": v for k, v in losses.detach().items()})
        return torch.stack([losses[key] for key in self.loss.out_keys]).sum()

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any
    ) -> None:
        """Clips each group apart; a norm that is not finite raises ``FloatingPointError``."""
        for group in optimizer.param_groups:
            norm = nn.utils.clip_grad_norm_(group["params"], self.max_grad_norm)
            if not norm.isfinite():
                raise FloatingPointError(
                    f"the gradient norm of the {group['name']!r} loss is {norm.item()} at update "
                    f"{self.global_step} (environment step {self.experience.steps}); nothing was "
                    "changed by this update. Look for non-finite observations or rewards, or lower "
                    "its learning rate"
                )

    def on_train_batch_end(self, *_: Any) -> None:
        """Moves the target networks."""
        self.target_update.step()

    def val_dataloader(self) -> list[int]:
        """One evaluation."""
        return [0]

    def validation_step(self, *_: Any) -> Tensor:
        """Plays whole episodes with the mean action and returns their returns, ``[episodes]``.

        In full precision, as the collector acts, whatever the losses are computed in.
        """
        with torch.autocast(self.device.type, enabled=False):
            returns = evaluate_policy(self.eval_env, self.agent.policy(), self.eval_episodes)
        metrics = {"eval/return": returns.mean(), "eval/return_std": returns.std(correction=0)}
        self.log("return", returns.mean(), prog_bar=True, logger=False, batch_size=1)
        self._log_metrics(metrics)
        return returns

    def _log_metrics(self, metrics: dict[str, Tensor]) -> None:
        """Writes to the loggers, with the authors' step counter as the x-axis."""
        values = {name: float(value) for name, value in metrics.items()}
        values["frames"] = self.experience.frames
        values["noise_scale"] = float(self.agent.noise.scale)
        if self.experience.episode_returns:
            recent = list(self.experience.episode_returns)[-10:]
            values["train/episode_return"] = sum(recent) / len(recent)
        for logger in self.loggers:
            logger.log_metrics(values, step=self.experience.steps)

    def _check_sharing(self) -> None:
        trained = {p.data_ptr() for p in self.loss.parameters()}
        trained |= {b.data_ptr() for b in self.loss.actor_params.buffers()}
        acting = [*self.agent.encoder.parameters(), *self.agent.actor.parameters()]
        if not {t.data_ptr() for t in (*acting, self.agent.noise.scale)} <= trained:
            raise ValueError(
                "the loss does not share the agent's networks and noise schedule: move the agent "
                "to its device first, then build ALMLoss(**agent.networks())"
            )

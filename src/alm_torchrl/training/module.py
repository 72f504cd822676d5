"""Aligned Latent Models as a LightningModule."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchrl.envs import EnvBase
from torchrl.objectives import SoftUpdate

from alm_torchrl.agent import ALMAgent
from alm_torchrl.envs.failures import env_name, failing_as
from alm_torchrl.evaluation import evaluate_policy
from alm_torchrl.modules import plain_numbers
from alm_torchrl.modules.latent import keeps_statistics
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training.compilation import worth_compiling
from alm_torchrl.training.experience import ExperienceStream
from alm_torchrl.training.processes import rank_seed
from alm_torchrl.training.seeds import StackedAgent, StackedLoss, StackedSoftUpdate
from alm_torchrl.training.update import CapturedUpdate, Update, make_optimizer

__all__ = ["ALMModule"]


class ALMModule(L.LightningModule):
    """One update for every batch of experience, and an evaluation as the validation step.

    All five losses are minimized by one backward pass and one optimizer with a parameter group
    for each of :meth:`ALMLoss.parameter_groups`; the norm of each group's gradient is clipped
    apart, and a norm that is not finite stops the run before it does damage. The target networks
    follow after every update. See :class:`~alm_torchrl.training.Update`.

    Put the agent on its device before the loss is built, so that acting and losses keep sharing
    the noise schedule.

    Args:
        agent: the components and the acting policy; of several seeds, a
            :class:`~alm_torchrl.training.StackedAgent`.
        loss: the objective built on the agent's networks; of several seeds, a
            :class:`~alm_torchrl.training.StackedLoss`.
        experience: where batches come from.
        eval_env: environments to evaluate in, apart from those that are learnt from; for several
            seeds, ``eval_episodes`` of them for each.
        learning_rates: one rate, or one for each parameter group by name.
        max_grad_norm: largest gradient norm of a group.
        target_tau: weight of the new value in the targets' moving average.
        eval_episodes: episodes of an evaluation, for each seed.
        eval_max_steps: steps after which such an episode is cut off; see
            :func:`~alm_torchrl.evaluation.evaluate_policy`.
        ema_decay: decay of a moving average over the updates of all weights of the agent, which is
            evaluated and saved in place of the newest weights; 0 for these, as the authors do.
            What is learnt, and what acts to learn from, is the same with and without it.
        log_every: updates between two entries in the loggers.
        compile: ``"never"``; ``"always"`` compiles the losses, and captures the update as a CUDA
            graph on a GPU; ``"auto"`` does so where :func:`worth_compiling` says that it pays, and
            goes on without, and warns, if it fails.

    Raises:
        ValueError: if the loss was not built on the agent, a learning rate names no group, the
            mode of compilation is another, the decay is not at least 0 and below 1, or nothing is
            evaluated.

    In a trainer of several processes (Lightning's ``ddp``), each has an agent, a loss, experience
    and random numbers of its own, and the gradients are averaged over them. Only rank 0 evaluates.
    """

    def __init__(
        self,
        agent: ALMAgent | StackedAgent,
        loss: ALMLoss | StackedLoss,
        experience: ExperienceStream,
        eval_env: EnvBase,
        *,
        learning_rates: float | Mapping[str, float] = 1e-4,
        max_grad_norm: float = 100.0,
        target_tau: float = 0.005,
        eval_episodes: int = 5,
        eval_max_steps: int | None = None,
        ema_decay: float = 0.0,
        log_every: int = 100,
        compile: str = "never",  # noqa: A002 - the name of the recipe's option
    ) -> None:
        super().__init__()
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {ema_decay}")
        if eval_episodes < 1 or (eval_max_steps is not None and eval_max_steps < 1):
            raise ValueError(
                f"eval_episodes={eval_episodes} and eval_max_steps={eval_max_steps} must be at "
                "least 1"
            )
        self.agent = agent
        self.loss = loss
        self.experience = experience
        self.__dict__["eval_env"] = eval_env  # a module for TorchRL, but no part of what is learnt
        if isinstance(learning_rates, Mapping):
            learning_rates = dict(learning_rates)
        self.learning_rates: float | Mapping[str, float] = plain_numbers(learning_rates)
        self.max_grad_norm = max_grad_norm
        self.eval_episodes = eval_episodes
        self.eval_max_steps = eval_max_steps
        self.ema_decay = ema_decay
        self.average = copy.deepcopy(agent).requires_grad_(False) if ema_decay else None
        self.compile_mode = compile
        self.compiles = worth_compiling(compile, len(experience), next(loss.parameters()).device)
        self.automatic_optimization = False
        self.log_every = log_every
        #: Whether all state has been restored: nothing of the run is written before.
        self.restored = False
        stacked = isinstance(loss, StackedLoss)
        self.target_update = (StackedSoftUpdate if stacked else SoftUpdate)(loss, tau=target_tau)
        self._check_sharing()

    @property
    def agents(self) -> list[ALMAgent]:
        """The agent that is learnt, or that of every seed."""
        return _agents(self.agent)

    @property
    def evaluated(self) -> ALMAgent | StackedAgent:
        """What is evaluated: the average of the weights, if one is kept, or the newest."""
        return self.agent if self.average is None else self.average

    @property
    def evaluated_agents(self) -> list[ALMAgent]:
        """The agent that is evaluated and saved, or that of every seed."""
        return _agents(self.evaluated)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the four parameter groups."""
        return make_optimizer(self.loss, self.learning_rates)

    def train_dataloader(self) -> ExperienceStream:
        """The experience, which is iterated in this process."""
        return self.experience

    def on_fit_start(self) -> None:
        """Has each process of a run draw for itself, since Lightning seeds all of them alike.

        Raises:
            MisconfigurationException: for an encoder that keeps running statistics, in a run of
                several processes.
        """
        if self.trainer.world_size > 1 and keeps_statistics(self.agents[0].encoder):
            raise MisconfigurationException(
                "an encoder that keeps running statistics is trained in one process, since each "
                "would have its own: take run.devices=1, or build it with normalize=False"
            )
        if self.global_rank > 0:
            torch.manual_seed(rank_seed(torch.initial_seed(), self.global_rank))

    def on_train_start(self) -> None:
        """Builds the update, now that the optimizer, the device and the precision are known."""
        optimizer = self.trainer.optimizers[0]
        rates = self.learning_rates
        for group in optimizer.param_groups:  # a checkpoint has brought those of the run before
            group["lr"] = rates[group["name"]] if isinstance(rates, Mapping) else rates
        update = Update(
            self.loss,
            optimizer,
            self.target_update,
            max_grad_norm=self.max_grad_norm,
            precision=self.trainer.precision,
            compiled=self.compiles,
            strict=self.compile_mode != "auto",
            backward=self.manual_backward,
        )
        alone = self.trainer.world_size == 1  # no graph holds what processes say to each other
        captured = alone and self.device.type == "cuda" and self.compile_mode != "never"
        self._update = CapturedUpdate(update) if captured else update
        self.restored = True

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> None:
        """One update. The host waits for a GPU when there is something to log, and no sooner.

        Raises:
            FloatingPointError: if the norm of a gradient is not finite.
        """
        metrics = TensorDict()
        # As a closure, after which there is no gradient left to step on, so that Lightning counts
        # a step that may be part of a graph.
        optimizer = cast("LightningOptimizer", self.optimizers())
        optimizer.step(closure=lambda: metrics.update(self._update(batch)))
        if self.average is not None:
            _move(self.average, self.agent, self.ema_decay)
        logging = batch_idx % self.log_every == 0
        if logging or self.device.type == "cpu":
            self.check()
        if logging:
            self._log_metrics({f"train/{k}": v for k, v in metrics.items()})

    def on_validation_start(self) -> None:
        """Finds out whether the updates so far were sound, before anything is kept of them."""
        self.check()

    def check(self) -> None:
        """Waits for the updates so far, and finds out whether they were sound.

        Raises:
            FloatingPointError: if the norm of a gradient was not finite.
        """
        try:
            self._update.check()
        except FloatingPointError as error:
            step, update = self.experience.steps, self.global_step - 1
            raise FloatingPointError(
                f"at update {update} (environment step {step}): {error}"
            ) from None

    def val_dataloader(self) -> list[int]:
        """One evaluation."""
        return [0]

    def validation_step(self, *_: Any) -> Tensor:
        """Plays whole episodes with the mean action: their returns, ``[seeds, episodes]``.

        In full precision, as the collector acts, whatever the losses are computed in. Of several
        processes the first plays, and tells the others.

        Raises:
            EnvironmentFailedError: if the environment raises, or returns what is not finite.
        """
        returns = self._evaluate() if self.trainer.is_global_zero else None
        returns = self.trainer.strategy.broadcast(returns)
        assert returns is not None
        returns = returns.to(self.device)
        metrics = {"eval/return": returns.mean(), "eval/return_std": returns.std(correction=0)}
        self.log(
            "return", returns.mean(), prog_bar=True, logger=False, batch_size=1, sync_dist=True
        )
        self._log_metrics(metrics)
        return returns

    def _evaluate(self) -> Tensor:
        seeds = len(self.agents)
        policy = self.evaluated.policy()
        failing = failing_as(
            f"the evaluation in {env_name(self.eval_env)} failed after frame "
            f"{self.experience.frames}"
        )
        with failing, torch.autocast(self.device.type, enabled=False):
            returns = evaluate_policy(
                self.eval_env,
                policy,
                seeds * self.eval_episodes,
                max_steps=self.eval_max_steps,
            )
        return returns.reshape(seeds, -1).cpu()

    def _log_metrics(self, metrics: dict[str, Tensor]) -> None:
        """Writes means over seeds to the loggers; the authors' step counter is the x-axis."""
        metrics["noise_scale"] = self.agent.noise.scale
        numbers = torch.stack([value.float().mean() for value in metrics.values()]).tolist()
        values = dict(zip(metrics, numbers, strict=True))
        values["frames"] = self.experience.frames
        if self.experience.episode_returns:
            recent = list(self.experience.episode_returns)[-10:]
            values["train/episode_return"] = sum(recent) / len(recent)
        if self.experience.policy_staleness is not None:
            values["train/policy_staleness"] = self.experience.policy_staleness
        for logger in self.loggers:
            logger.log_metrics(values, step=self.experience.steps)

    def _check_sharing(self) -> None:
        losses = self.loss.losses if isinstance(self.loss, StackedLoss) else [self.loss]
        for agent, loss in zip(self.agents, losses, strict=True):
            trained = {t.data_ptr() for t in (*loss.parameters(), *loss.actor_params.buffers())}
            acting = [*agent.encoder.parameters(), *agent.actor.parameters(), agent.noise.scale]
            if not {t.data_ptr() for t in acting} <= trained:
                raise ValueError(
                    "the loss does not share the agent's networks and noise schedule: move the "
                    "agent to its device first, then build ALMLoss(**agent.networks())"
                )


def _agents(agent: ALMAgent | StackedAgent) -> list[ALMAgent]:
    if isinstance(agent, StackedAgent):
        return [cast("ALMAgent", one) for one in agent.agents]
    return [agent]


@torch.no_grad()
def _move(average: nn.Module, newest: nn.Module, decay: float) -> None:
    """Moves the average of parameters towards the newest; buffers are copied.

    As torch's ``AveragedModel``, which waits for the device at every update.
    """
    move = get_ema_multi_avg_fn(decay)
    move(list(average.parameters()), list(newest.parameters()), None)
    torch._foreach_copy_(list(average.buffers()), list(newest.buffers()))

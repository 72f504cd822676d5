"""Aligned Latent Models as a LightningModule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchrl.envs import EnvBase

from alm_torchrl.agent import ALMAgent
from alm_torchrl.envs.failures import env_name, failing_as
from alm_torchrl.evaluation import evaluate_policy
from alm_torchrl.modules import plain_numbers
from alm_torchrl.modules.latent import keeps_statistics
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.objectives.imagined import ImaginedReplay
from alm_torchrl.training.experience import ExperienceStream
from alm_torchrl.training.runtime import choose_precision, rank_seed, worth_compiling
from alm_torchrl.training.seeds import StackedAgent, StackedLoss, TargetUpdate, agents_of, losses_of
from alm_torchrl.training.update import CapturedUpdate, Update, make_optimizer


class ALMModule(L.LightningModule):
    """Makes one :class:`Update` per batch of experience, and evaluates in the validation step.

    Move the agent to its device before you build the loss, so that acting and losses share the
    noise schedule. With several processes (Lightning's ``ddp``), each has its own agent, loss,
    experience and random numbers. Gradients are averaged, and only rank 0 evaluates.

    Args:
        agent: the agent, or a :class:`StackedAgent` for several seeds.
        loss: the objective built on the agent's networks, or a :class:`StackedLoss`.
        experience: source of the batches.
        eval_env: environments for evaluation, not those of the collector; ``eval_episodes`` for
            each seed if there are several seeds.
        learning_rates: see :func:`make_optimizer`.
        optimizer: see :func:`make_optimizer`.
        schedule: makes a learning-rate scheduler, which steps after every update. A resumed run
            then keeps the rates of its checkpoint, and no CUDA graph is captured.
        max_grad_norm: largest gradient norm of a parameter group.
        target_tau: weight of the newest weights in the moving average of the targets.
        imagined_steps: see :class:`~alm_torchrl.objectives.ImaginedReplay`; 0 for none.
        eval_episodes: episodes per evaluation and seed.
        eval_max_steps: see :func:`~alm_torchrl.evaluation.evaluate_policy`.
        ema_decay: decay of a moving average of the weights, which is evaluated and saved instead
            of the newest weights; 0 disables it, as the authors do. It does not affect training.
        log_every: updates between two log entries.
        precision: ``"32-true"``, ``"bf16-mixed"``, or ``"auto"`` for bfloat16 on suitable hardware.
        compile: ``"never"``; ``"always"`` compiles the losses, and captures the update as a CUDA
            graph on a GPU; ``"auto"`` does the same on a GPU or for at least 10,000 updates, but
            warns instead of failing.
    """

    def __init__(
        self,
        agent: ALMAgent | StackedAgent,
        loss: ALMLoss | StackedLoss,
        experience: ExperienceStream,
        eval_env: EnvBase,
        *,
        learning_rates: float | Mapping[str, float] = 1e-4,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
        max_grad_norm: float = 100.0,
        target_tau: float = 0.005,
        imagined_steps: int = 0,
        eval_episodes: int = 5,
        eval_max_steps: int | None = None,
        ema_decay: float = 0.0,
        log_every: int = 100,
        precision: str = "32-true",
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
        self.agent, self.loss, self.experience = agent, loss, experience
        self.__dict__["eval_env"] = eval_env  # an nn.Module, but not part of the model
        rates = dict(learning_rates) if isinstance(learning_rates, Mapping) else learning_rates
        self.learning_rates: float | dict[str, float] = plain_numbers(rates)
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.max_grad_norm = max_grad_norm
        self.imagined = ImaginedReplay(loss, imagined_steps) if imagined_steps else None
        self.eval_episodes, self.eval_max_steps = eval_episodes, eval_max_steps
        self.ema_decay = ema_decay
        self.average = copy.deepcopy(agent).requires_grad_(False) if ema_decay else None
        device = next(loss.parameters()).device
        self.precision = choose_precision(precision, device)
        self.compile_mode = compile
        self.compiles = worth_compiling(compile, len(experience), device)
        self.automatic_optimization = False
        self.log_every = log_every
        self.restored = False  # all state is restored; before that, the run writes nothing
        self.target_update = TargetUpdate(loss, tau=target_tau)
        self._check_sharing()

    @property
    def agents(self) -> list[ALMAgent]:
        """The agent of each seed."""
        return agents_of(self.agent)

    @property
    def evaluated_agents(self) -> list[ALMAgent]:
        """The agent of each seed to evaluate and save, with averaged weights if there are any."""
        return agents_of(self.average or self.agent)

    def configure_optimizers(self) -> Any:
        """Makes the optimizer and its schedule, if any."""
        optimizer = make_optimizer(self.loss, self.learning_rates, self.make_optimizer)
        if self.make_schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_schedule(optimizer)}

    def train_dataloader(self) -> ExperienceStream:
        """Returns the experience, which this process iterates."""
        return self.experience

    def on_fit_start(self) -> None:
        """Seeds each process differently; Lightning gives all the same seed."""
        if self.trainer.world_size > 1 and keeps_statistics(self.agents[0].encoder):
            raise MisconfigurationException(
                "an encoder with running statistics trains in one process, because each process "
                "would keep its own: set run.devices=1, or build it with normalize=False"
            )
        if self.global_rank > 0:
            torch.manual_seed(rank_seed(torch.initial_seed(), self.global_rank))

    def on_train_start(self) -> None:
        """Builds the update, which needs the optimizer and the device."""
        optimizer = self.trainer.optimizers[0]
        rates = self.learning_rates
        if self.make_schedule is None:  # the rates may have changed since the checkpoint
            for group in optimizer.param_groups:
                group["lr"] = rates[group["name"]] if isinstance(rates, dict) else rates
        update = Update(
            self.loss,
            optimizer,
            self.target_update,
            max_grad_norm=self.max_grad_norm,
            precision=self.precision,
            compiled=self.compiles,
            strict=self.compile_mode != "auto",
            backward=self.manual_backward,
        )
        # A graph can contain neither communication between processes nor a change of the rate.
        fixed = self.trainer.world_size == 1 and self.make_schedule is None
        captured = fixed and self.device.type == "cuda" and self.compile_mode != "never"
        self._update = CapturedUpdate(update) if captured else update
        self.restored = True

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> None:
        """Makes one update, and waits for a GPU only when a log entry is due."""
        if self.imagined is not None:
            batch = self.imagined(batch)
        metrics = TensorDict()
        # Lightning counts steps by calls of the optimizer. The closure leaves no gradients, so the
        # optimizer's own step does nothing.
        optimizer = cast("LightningOptimizer", self.optimizers())
        optimizer.step(closure=lambda: metrics.update(self._update(batch)))
        if self.make_schedule is not None:
            cast("LRScheduler", self.lr_schedulers()).step()
        if self.average is not None:
            self._update_average(self.average)
        logging = batch_idx % self.log_every == 0
        if logging or self.device.type == "cpu":
            self.check()
        if logging:
            self._log_metrics({f"train/{k}": v for k, v in metrics.items()})

    def on_validation_start(self) -> None:
        """Checks the updates so far, before any result is saved."""
        self.check()

    def check(self) -> None:
        """Waits for the device and raises if a gradient norm was not finite."""
        try:
            self._update.check()
        except FloatingPointError as error:
            where = f"update {self.global_step - 1} (environment step {self.experience.steps})"
            raise FloatingPointError(f"at {where}: {error}") from None

    def val_dataloader(self) -> list[int]:
        """Returns one batch, because an evaluation is one step."""
        return [0]

    def validation_step(self, *_: Any) -> Tensor:
        """Plays episodes on rank 0, with the mean action; returns ``[seeds, episodes]``."""
        returns: Tensor | None = None
        if self.trainer.is_global_zero:
            seeds, policy = len(self.agents), (self.average or self.agent).policy()
            where, frames = env_name(self.eval_env), self.experience.frames
            with failing_as(f"the evaluation in {where} failed after frame {frames}"):
                returns = evaluate_policy(
                    self.eval_env, policy, seeds * self.eval_episodes, max_steps=self.eval_max_steps
                )
            returns = returns.reshape(seeds, -1).cpu()
        returns = self.trainer.strategy.broadcast(returns)
        assert returns is not None
        returns = returns.to(self.device)
        mean = returns.mean()
        self.log("return", mean, prog_bar=True, logger=False, batch_size=1, sync_dist=True)
        self._log_metrics({"eval/return": mean, "eval/return_std": returns.std(correction=0)})
        return returns

    @torch.no_grad()
    def _update_average(self, average: nn.Module) -> None:
        """Averages parameters and copies buffers; torch's ``AveragedModel`` would synchronize."""
        update = get_ema_multi_avg_fn(self.ema_decay)
        update(list(average.parameters()), list(self.agent.parameters()), None)
        torch._foreach_copy_(list(average.buffers()), list(self.agent.buffers()))

    def _log_metrics(self, metrics: dict[str, Tensor]) -> None:
        """Logs means over seeds; the x-axis is the environment step after the warm-up."""
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
        for agent, loss in zip(self.agents, losses_of(self.loss), strict=True):
            trained = {t.data_ptr() for t in (*loss.parameters(), *loss.actor_params.buffers())}
            acting = [*agent.encoder.parameters(), *agent.actor.parameters(), agent.noise.scale]
            if not {t.data_ptr() for t in acting} <= trained:
                raise ValueError(
                    "the loss does not share the agent's networks and noise schedule: move the "
                    "agent to its device first, then build ALMLoss(**agent.networks())"
                )

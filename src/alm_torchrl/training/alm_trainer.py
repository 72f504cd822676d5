"""TorchRL's Trainer for Aligned Latent Models."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.collectors import BaseCollector
from torchrl.data import PrioritizedSampler, ReplayBuffer
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.trainers import OptimizationStepper, Trainer, UpdateWeights

from alm_torchrl.data.transitions import next_key
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training.update import Update, make_optimizer


class ALMTrainer(Trainer):
    """A TorchRL trainer for :class:`~alm_torchrl.objectives.ALMLoss`.

    It stores each batch of the collector in the replay buffer, and updates the input statistics of
    the encoder, if any. After the collector's ``init_random_frames``, it makes
    ``optim_steps_per_batch`` updates per batch (see :class:`Update`), advances the action noise of
    the loss's actor by the collected frames, and sends the weights to the collector.

    A saved trainer contains the loss, the optimizer, the replay buffer and the noise.
    ``load_from_file`` of a trainer built in the same way restores them; the environments start new
    episodes.

    Args:
        collector: see :func:`alm_torchrl.data.make_collector`; ``train`` closes it at the end.
        total_frames: frames to collect, with the random frames.
        loss_module: the objective; it shares its networks with the policy of the collector.
        replay_buffer: see :func:`alm_torchrl.data.make_replay_buffer`.
        optimizer: see :func:`make_optimizer`, which makes the default.
        target_net_updater: ``SoftUpdate(loss_module, tau=0.005)`` by default.
        optim_steps_per_batch: updates per batch of the collector. The paper makes one per frame.
        clip_norm: largest gradient norm of each group of :meth:`ALMLoss.parameter_groups`.
        **trainer_options: further arguments of TorchRL's ``Trainer``, such as ``logger``, ``seed``,
            ``checkpoint`` and ``save_trainer_file``; not ``async_collection`` and
            ``learner_backend``, which learn from a buffer that the collector fills.

    Raises:
        ValueError: if the collector acts with other networks than those of the loss.
        FloatingPointError: by ``train``, if a gradient is not finite.

    Examples:
        >>> from alm_torchrl import ALMAgent, make_collector, make_env, make_replay_buffer
        >>> env = make_env("Pendulum-v1", seed=0)
        >>> agent = ALMAgent.from_env(env, hidden_dim=16, dynamics_hidden_dim=16)
        >>> trainer = ALMTrainer(
        ...     collector=make_collector(env, agent.policy(), init_random_frames=20),
        ...     total_frames=25,
        ...     loss_module=ALMLoss(**agent.networks()),
        ...     replay_buffer=make_replay_buffer(100, batch_size=8),
        ...     progress_bar=False,
        ... )
        >>> trainer.train()
        >>> agent.noise.step_count  # frames after the random ones
        tensor(5)
    """

    def __init__(
        self,
        *,
        collector: BaseCollector,
        total_frames: int,
        loss_module: ALMLoss,
        replay_buffer: ReplayBuffer,
        optimizer: torch.optim.Optimizer | None = None,
        target_net_updater: TargetNetUpdater | None = None,
        optim_steps_per_batch: int = 1,
        clip_norm: float = 100.0,
        **trainer_options: Any,
    ) -> None:
        _check_sharing(collector, loss_module)
        optimizer = optimizer or make_optimizer(loss_module)
        target_net_updater = target_net_updater or SoftUpdate(loss_module, tau=0.005)
        update = Update(loss_module, optimizer, target_net_updater, max_grad_norm=clip_norm)
        super().__init__(
            collector=collector,
            total_frames=total_frames,
            loss_module=loss_module,
            replay_buffer=replay_buffer,
            optimizer=optimizer,
            optimization_stepper=_UpdateStepper(update),
            target_net_updater=target_net_updater,
            optim_steps_per_batch=optim_steps_per_batch,
            clip_norm=clip_norm,
            frame_skip=1,
            **trainer_options,
        )
        self.register_module("replay_buffer", replay_buffer)
        self.register_op("batch_process", self._store)
        self.register_op("process_optim_batch", lambda _: replay_buffer.sample())
        self.register_op("post_steps", update.check)
        self._noise: Any = getattr(loss_module.actor, "noise", None)
        if self._noise is not None:
            self.register_op("post_steps", self._advance_noise)
        self.register_op("setup", collector.update_policy_weights_)  # a checkpoint may be loaded
        UpdateWeights(collector, 1).register(self)  # after the noise, which is one of the weights
        self.register_op("pre_steps_log", self._log_batch)

    def _store(self, batch: TensorDictBase) -> None:
        self._batch_frames = batch.numel()
        self.replay_buffer.extend(batch)
        encoder = self.loss_module.encoder
        if hasattr(encoder, "update_statistics"):
            encoder.update_statistics(batch)

    def _advance_noise(self) -> None:
        """Advances after the updates of a batch, so that they use the noise that acted in it."""
        frames = self.collected_frames - self.collector.init_random_frames
        self._noise.advance(max(0, min(frames, self._batch_frames)))

    def _log_batch(self, batch: TensorDictBase) -> dict[str, Any]:
        keys = self.loss_module.tensor_keys
        logged = {"reward": batch.get(next_key(keys.reward)).mean().item(), "log_pbar": True}
        if self._noise is not None:
            logged["noise_scale"] = self._noise.scale.item()
        returns = batch.get(("next", "episode_reward"), None)
        ended = batch.get(next_key(keys.done))
        if returns is not None and ended.any():
            logged["episode_return"] = returns[ended].mean().item()
        return logged


class _UpdateStepper(OptimizationStepper):
    """Makes one :class:`Update`, and updates the priorities of a prioritized replay buffer."""

    def __init__(self, update: Update) -> None:
        self.update = update

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        metrics = self.update(sub_batch)
        if isinstance(trainer.replay_buffer.sampler, PrioritizedSampler):
            self.update.check()  # names the loss, where a priority would only be not finite
            trainer.replay_buffer.update_tensordict_priority(sub_batch)
        return metrics


def _check_sharing(collector: BaseCollector, loss: ALMLoss) -> None:
    """Raises if the collector has a policy on the device of the loss, but not that of the loss."""
    policy = getattr(collector, "policy", None)
    acting, trained = (
        {(t.device, t.data_ptr()) for t in (*net.parameters(), *net.buffers())}
        for net in (policy if isinstance(policy, nn.Module) else nn.Module(), loss.actor_params)
    )
    if {d for d, _ in acting} & {d for d, _ in trained} and not trained <= acting:
        raise ValueError(
            "the policy of the collector does not share the actor and the noise of loss_module: "
            "move the agent to its device first, then build ALMLoss(**agent.networks()), and "
            "collect with agent.policy()"
        )

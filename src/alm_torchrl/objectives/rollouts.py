"""Batch preparation and latent rollouts shared by the loss terms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor
from torch import distributions as D

from alm_torchrl.objectives.checks import check_latents, mask_invalid, read_windows
from alm_torchrl.objectives.components import ComponentLoss
from alm_torchrl.objectives.functional import (
    episode_mask,
    k_step_bound,
    kl_divergence,
    lambda_returns,
    log_ratio,
    squared_distance,
)

__all__ = ["Batch", "RolloutLoss"]


class Batch(NamedTuple):
    """A checked batch of windows with the target encoder's view of it."""

    windows: TensorDictBase
    """The entries of ``ALMLoss.in_keys``, ``[B, T]``."""
    mask: Tensor
    """Which steps of a window belong to the episode of its first, bool ``[B, T]``."""
    current: TensorDictBase
    """Target-encoder distribution parameters of the first observation, ``[B]``."""
    following: TensorDictBase
    """Target-encoder distribution parameters of the next observations, ``[B, T]``."""


class RolloutLoss(ComponentLoss):
    """A loss that follows the latent dynamics along recorded actions, and the actor inside it."""

    tensor_keys: Any
    horizon: int
    bootstrap_terminated: bool
    consistency: str
    latent_target: str
    consistency_coeff: Tensor
    start_steps: int

    # ------------------------------------------------------------------------------ input

    def _prepare(self, tensordict: TensorDictBase, steps: int) -> Batch:
        """Checks the input and encodes its observations with the target encoder, in one pass."""
        if not torch.compiler.is_compiling():
            self._check_sharing()
        dtype = next(self.qvalue_network_params.parameters()).dtype
        windows = read_windows(tensordict, self.tensor_keys, self.encoder.in_keys, steps, dtype)
        done = windows.get(unravel_key(("next", self.tensor_keys.done))).squeeze(-1)
        mask = episode_mask(done, windows.get(self.tensor_keys.validity_mask, None))
        # What lies past the episode's end may be anything, NaN included, which no product with a
        # mask would take out of the gradient.
        windows = windows.apply(lambda value: mask_invalid(value, mask))
        observations = self.encoder.in_keys
        current = windows[:, :1].select(*observations)
        following = windows.get("next").select(*observations)
        encoded = self._encode(torch.cat([current, following], 1))
        return Batch(windows, mask, encoded[:, 0], encoded[:, 1:])

    @torch.no_grad()
    def _encode(self, observations: TensorDictBase) -> TensorDictBase:
        """Parameters of the target encoder's distributions."""
        averaged = self.latent_target == "moving_average"
        params = self.target_encoder_params if averaged else self.encoder_params.detach()
        return self._dist_params("encoder", observations, params)

    # ------------------------------------------------------------------- parts of the model

    def encoding(self, observations: TensorDictBase) -> D.Distribution:
        """The target encoder's distribution over the latent, without a gradient.

        Args:
            observations: the encoder's entries, batch shape ``[...]``.

        Returns:
            The distribution, batch shape ``[...]``.
        """
        parameters = self._encode(observations.select(*self.encoder.in_keys))
        return self.encoder.build_dist_from_params(parameters)

    def encode(self, observations: TensorDictBase) -> Tensor:
        """A latent drawn from :meth:`encoding`, ``[..., D]``."""
        return self._draw(self.encoding(observations))

    def value(self, latent: Tensor, action: Tensor) -> Tensor:
        """The smallest of the action values, without a gradient to their networks.

        Args:
            latent: ``[..., D]``.
            action: ``[..., A]``.

        Returns:
            In units of return, ``[..., 1]``.
        """
        return self._value(latent, action, self.qvalue_network_params.detach())

    # ------------------------------------------------------------------------ the rollouts

    def world_model_rollout(self, tensordict: TensorDictBase) -> TensorDictBase:
        r"""Runs the latent dynamics along the recorded actions of each window.

        From :math:`z_0 \sim e(s_0)`, every step draws :math:`z_{t+1} \sim m(z_t, a_t)` and
        compares the dynamics with the target encoder's view of what was observed.

        Args:
            tensordict: as for :meth:`ALMLoss.forward`.

        Returns:
            ``kl`` (:math:`KL(m \| e)`, whatever the loss holds), ``consistency`` (the term in the
            loss) and ``reward``, each ``[B, T, 1]`` and meaningful where the window is valid,
            ``value`` ``[B, 1]`` of the last latent reached, ``latent`` ``[B, T, D]`` and entropies.
        """
        return self._world_model_rollout(self._prepare(tensordict, steps=self.horizon))

    def _world_model_rollout(self, batch: Batch) -> TensorDictBase:
        actions = batch.windows.get(self.tensor_keys.action)
        posterior = self._distribution("encoder", batch.windows[:, 0], self.encoder_params)
        latent = self._draw(posterior)
        latents, priors = [latent], []
        for t in range(actions.shape[1]):
            prior = self._dist_params(
                "dynamics", self._step(latent, actions[:, t]), self.dynamics_params
            )
            priors.append(prior)
            following = self._draw(self.dynamics.build_dist_from_params(prior))
            latent = torch.where(batch.mask[:, t, None], following, latent)
            latents.append(latent)
        prior = self.dynamics.build_dist_from_params(torch.stack(priors, 1))
        target = self._target_distribution(batch)
        check_latents(prior, target)
        step = self._step(torch.stack(latents[:-1], 1), actions)
        kl = kl_divergence(prior, target).unsqueeze(-1)
        following = torch.stack(latents[1:], 1)
        return TensorDict(
            {
                "latent": step.get(self._latent_key),
                "kl": kl,
                "consistency": self._consistency(kl, prior, target, step, following),
                "reward": self._output("reward_model", step, self.reward_model_params.detach()),
                "value": self._final_value(batch, latent),
                "prior_entropy": prior.entropy().detach(),
                "posterior_entropy": posterior.entropy().detach(),
            },
            batch_size=actions.shape[:1],
        )

    def _target_distribution(self, batch: Batch) -> D.Distribution:
        """What the dynamics should predict: the next observations' latents, ``[B, T]``."""
        parameters = batch.following
        if self.latent_target == "online":
            observations = batch.windows.get("next").select(*self.encoder.in_keys)
            parameters = self._dist_params("encoder", observations, self.encoder_params)
        return self.encoder.build_dist_from_params(parameters)

    def _consistency(
        self,
        kl: Tensor,
        prior: D.Distribution,
        target: D.Distribution,
        step: TensorDictBase,
        following: Tensor,
    ) -> Tensor:
        """How far the dynamics is from the target, by the loss's own measure, ``[B, T, 1]``."""
        if self.consistency == "reverse_kl":
            return kl
        if self.consistency == "forward_kl":
            return kl_divergence(target, prior).unsqueeze(-1)
        if self.consistency == "squared_distance":
            return squared_distance(prior, target).unsqueeze(-1)
        step = step.copy().set(self._next_latent_key, following)
        return -log_ratio(self._output("classifier", step, self.classifier_params.detach()))

    def _final_value(self, batch: Batch, latent: Tensor) -> Tensor:
        """The value of the last latent reached, ``[B, 1]``; a terminal state has none."""
        value = self._value(latent, self._act(latent.detach()), self.qvalue_network_params.detach())
        if self.bootstrap_terminated:
            return value
        ends = batch.windows.get(unravel_key(("next", self.tensor_keys.terminated)))
        ended = (ends.squeeze(-1) & batch.mask).any(-1, keepdim=True)
        return torch.where(ended, torch.zeros_like(value), value)

    def roll_on(self, latent: Tensor) -> Tensor:
        r"""Moves latents on by up to ``start_steps`` imagined steps of the actor, without gradient.

        The number of steps of each row is uniform in :math:`\{0, \dots, N\}`. A row whose
        episode is expected to terminate stays where it is.

        Args:
            latent: where to start, ``[B, D]``.

        Returns:
            The latents reached, ``[B, D]``.
        """
        steps = torch.randint(self.start_steps + 1, latent.shape[:1], device=latent.device)
        moving = torch.ones_like(steps, dtype=torch.bool)
        with torch.no_grad():
            for t in range(self.start_steps):
                step = self._step(latent, self._act(latent))
                moving = moving & (steps > t)
                if self.continuation_model is not None:
                    moving = moving & (self._continuation(step).squeeze(-1) > 0.5)
                following = self._draw(self._distribution("dynamics", step, self.dynamics_params))
                latent = torch.where(moving.unsqueeze(-1), following, latent)
        return latent

    def _continuation(self, step: TensorDictBase) -> Tensor:
        """The probability that a step does not terminate, ``[..., 1]``."""
        params = self.continuation_model_params.detach()
        return self._output("continuation_model", step, params).sigmoid()

    def imagine(
        self,
        latent: Tensor,
        action: Tensor | None = None,
        *,
        values: TensorDictBase | None = None,
    ) -> TensorDictBase:
        r"""Rolls the actor out in the latent dynamics.

        Actions are drawn on detached latents, and detached again where they enter the values, so
        that a gradient reaches the actor through the dynamics, the rewards and the log-ratios.

        Args:
            latent: where to start, ``[B, D]``.
            action: the first action ``[B, A]``; drawn from the actor by default.
            values: parameters of the action values; the newest by default.

        Returns:
            ``latent``, ``action``, ``reward``, ``log_ratio`` and, under ``"next"``, ``latent``,
            ``action`` and ``value``, all ``[B, K, ...]``; with a continuation model also
            ``continuation``, the probability that a step does not terminate.
        """
        latents, actions = [latent], []
        for t in range(self.horizon):
            if t > 0 or action is None:
                action = self._draw(self._policy(latent.detach(), self.actor_params))
            actions.append(action)
            step = self._step(latent, action)
            latent = self._draw(self._distribution("dynamics", step, self.dynamics_params.detach()))
            latents.append(latent)
        actions.append(self._act(latent.detach()))
        current = self._step(torch.stack(latents[:-1], 1), torch.stack(actions[:-1], 1))
        following = torch.stack(latents[1:], 1)
        following_action = torch.stack(actions[1:], 1).detach()
        current.set(self._next_latent_key, following.detach())
        logits = self._output("classifier", current, self.classifier_params.detach())
        values = self.qvalue_network_params.detach() if values is None else values
        rollout = TensorDict(
            {
                "latent": current.get(self._latent_key),
                "action": current.get(self._action_key),
                "reward": self._output("reward_model", current, self.reward_model_params.detach()),
                "log_ratio": log_ratio(logits),
                "next": {
                    "latent": following,
                    "action": following_action,
                    "value": self._value(following, following_action, values),
                },
            },
            batch_size=following.shape[:2],
        )
        if self.continuation_model is not None:
            rollout["continuation"] = self._continuation(current)
        return rollout

    # ------------------------------------------------------------- what a rollout is worth

    def lambda_return(self, rollout: TensorDictBase) -> Tensor:
        r"""The return of an imagined rollout by the loss's value estimator.

        The reward of a step is :math:`r(z_t, a_t) + c \cdot \mathrm{logratio}_t`. Nothing ends
        inside a rollout, unless a continuation model says so: see
        :func:`~alm_torchrl.objectives.functional.lambda_returns`.

        Args:
            rollout: what :meth:`imagine` returns, ``[B, K]``.

        Returns:
            The returns, ``[B, K, 1]``.
        """
        return self._returns(rollout, self._augmented_reward(rollout))

    def _returns(self, rollout: TensorDictBase, reward: Tensor) -> Tensor:
        value, estimator = rollout["next", "value"], self.value_estimator
        if self.continuation_model is not None:
            lmbda = getattr(estimator, "lmbda", 0.0)  # TD0 has none
            return lambda_returns(reward, value, rollout["continuation"], estimator.gamma, lmbda)
        never = torch.zeros_like(reward, dtype=torch.bool)
        outcome = {"reward": reward, "done": never, "terminated": never}
        steps = TensorDict({"next": outcome}, batch_size=rollout.batch_size)
        return estimator.value_estimate(steps, next_value=value)

    def bound(self, rollout: TensorDictBase) -> Tensor:
        r"""The K-step bound of an imagined rollout, with the value at its end alone.

        It is the first of :meth:`lambda_return`'s returns at :math:`\lambda = 1`.

        Args:
            rollout: what :meth:`imagine` returns, ``[B, K]``.

        Returns:
            The bound, ``[B, 1]``; see
            :func:`~alm_torchrl.objectives.functional.k_step_bound`.
        """
        value, gamma = rollout["next", "value"][:, -1], self.value_estimator.gamma
        reward = self._augmented_reward(rollout)
        return k_step_bound(reward, value, gamma, rollout.get("continuation", None))

    def _augmented_reward(self, rollout: TensorDictBase) -> Tensor:
        """Reward and weighted log-ratio of every step, ``[B, K, 1]``."""
        return rollout["reward"] + self.consistency_coeff * rollout["log_ratio"]

"""Rollouts in the latent space."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator

from alm_torchrl.data.transitions import next_key
from alm_torchrl.objectives.checks import check_latents
from alm_torchrl.objectives.functional import (
    episode_mask,
    k_step_bound,
    kl_divergence,
    lambda_returns,
    log_ratio,
    squared_distance,
    td_target,
)
from alm_torchrl.objectives.latent_networks import LatentNetworks
from alm_torchrl.objectives.options import CHOICES
from alm_torchrl.objectives.parameters import check_shared, summary
from alm_torchrl.objectives.windows import (
    check_order,
    is_tracing,
    mask_invalid,
    read_weights,
    read_windows,
)

__all__ = ["Batch", "LatentModelLoss"]


class Batch(NamedTuple):
    """A checked batch of windows with its encodings, shared by the losses."""

    windows: TensorDictBase
    """The entries of ``ALMLoss.in_keys``, ``[B, T]``."""
    mask: Tensor
    """True for steps in the episode of the window's first step, bool ``[B, T]``."""
    current: TensorDictBase
    """Target-encoder distribution parameters of the first observation, ``[B]``."""
    following: TensorDictBase
    """Target-encoder distribution parameters of the next observations, ``[B, T]``."""
    rollout: TensorDictBase | None = None
    """The result of :meth:`LatentModelLoss.world_model_rollout`, if already computed."""
    weight: Tensor | None = None
    """Importance weights of the losses, ``[B]``, if any."""
    imagined: TensorDictBase | None = None
    """Steps of imagined episodes, ``[B]``, on which values and actor train, if any."""
    source: TensorDictBase | None = None
    """The TensorDict that was read."""

    def on_imagined(self) -> Batch:
        """Returns the batch without mask, if it has imagined steps."""
        if self.imagined is None:
            return self
        return self._replace(mask=torch.ones_like(self.mask))


class LatentModelLoss(LatentNetworks):
    """The rollouts of :class:`ALMLoss`, without its losses."""

    default_value_estimator = ValueEstimators.TDLambda

    tensor_keys: Any
    horizon: int
    bootstrap_terminated: bool
    consistency: str
    teacher_forcing: bool
    consistency_coeff: Tensor
    auxiliary_losses: nn.ModuleDict
    _order_checked = False

    def __repr__(self) -> str:
        """Returns networks and options, but not the layers."""
        estimator = self.value_estimator
        numbers = {name: getattr(estimator, name, None) for name in ("gamma", "lmbda")}
        numbers = {"consistency_coeff": self.consistency_coeff, **numbers}
        lines = [summary(name, getattr(self, name)) for name in self._names]
        lines += [summary(f"auxiliary {n}", module) for n, module in self.auxiliary_losses.items()]
        lines += [", ".join(f"{name}={getattr(self, name)}" for name in ("horizon", *CHOICES))]
        lines += [", ".join(f"{name}={v:.4g}" for name, v in numbers.items() if v is not None)]
        lines += [f"value_estimator: {type(estimator).__name__}"]
        lines += [f"out_keys: {', '.join(self.out_keys)}"]
        return "\n  ".join((f"{type(self).__name__}(", *lines)) + "\n)"

    def _first_transition(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A latent sampled for the first observation, and the recorded action."""
        latent = self._draw(self.encoder.build_dist_from_params(batch.current))
        return latent, batch.windows.get(self.tensor_keys.action)[:, 0]

    def _outcome(self, batch: Batch, name: Literal["reward", "terminated"]) -> Tensor:
        """An entry under ``"next"`` of the first transition, ``[B, 1]``."""
        return batch.windows.get(next_key(getattr(self.tensor_keys, name)))[:, 0]

    def _counted(self, batch: Batch) -> Tensor:
        """The windows in the world-model loss, bool ``[B]``."""
        return batch.mask[:, -1] if self.short_windows == "drop" else batch.mask[:, 0]

    def _reduce(self, loss: Tensor, batch: Batch, mask: Tensor | None = None) -> Tensor:
        mask = batch.mask[:, 0] if mask is None else mask
        if batch.weight is not None:  # without any window, TorchRL would divide by zero
            loss, mask = torch.where(mask, loss, 0), mask | ~mask.any()
        masks = TensorDict({self.tensor_keys.validity_mask: mask})
        return self._reduce_loss(loss, masks, weights=batch.weight)

    def _starts(self, batch: Batch) -> Tensor:
        """The latents of imagined episodes or of the first observations, ``[B, D]``."""
        if batch.imagined is not None:
            return batch.imagined["latent"]
        return self._draw(self.encoder.build_dist_from_params(batch.current))

    def prepare(self, tensordict: TensorDictBase | Batch, steps: int = 1) -> Batch:
        """Checks a batch and encodes its observations with the target encoder.

        It reads ``steps`` steps of windows ``[B, T]``, or transitions ``[B]``, with the entries
        ``in_keys``, and returns a prepared batch unchanged.
        """
        if isinstance(tensordict, Batch):
            return tensordict
        if not torch.compiler.is_compiling():
            check_shared(self._shared)
        dtype = next(self.qvalue_network_params.parameters()).dtype
        windows = read_windows(tensordict, self.tensor_keys, self.encoder.in_keys, steps, dtype)
        keys, use = self.tensor_keys, self.use_prioritized_weights
        weight = read_weights(tensordict, keys.priority_weight, len(windows), dtype, use)
        done = windows.get(next_key(keys.done)).squeeze(-1)
        if windows.shape[1] < steps and not self._order_checked and not is_tracing(done):
            check_order(tensordict.get("index", None), windows, self.encoder.in_keys[0], done)
            self._order_checked = True
        mask = episode_mask(done, windows.get(keys.validity_mask, None))
        # Entries after the episode may be NaN; masking only the loss would give NaN gradients.
        windows = windows.apply(lambda value: mask_invalid(value, mask))
        entries = (windows[:, :1], windows.get("next"))
        encoded = self._encode(torch.cat([e.select(*self.encoder.in_keys) for e in entries], 1))
        imagined = tensordict.get(keys.imagined, None)
        if imagined is not None:
            if weight is not None:
                raise ValueError(
                    "imagined steps have no importance weights and priorities: sample uniformly, "
                    "or train without ImaginedReplay"
                )
            imagined = imagined.reshape(len(windows), -1)[:, 0]
        encodings = encoded[:, 0], encoded[:, 1:]
        return Batch(windows, mask, *encodings, None, weight, imagined, tensordict)

    def world_model_rollout(self, tensordict: TensorDictBase | Batch) -> TensorDictBase:
        r"""Runs the latent dynamics along the recorded actions of each window.

        From :math:`z_0 \sim e(s_0)`, every step samples :math:`z_{t+1} \sim m(z_t, a_t)` and
        compares the dynamics with the target encoder's distribution. With ``teacher_forcing``, the
        following step starts at a target latent of the recorded observation instead.

        Returns:
            ``kl`` (:math:`KL(m \| e)`), ``consistency`` (the distance in the loss) and ``reward``,
            each ``[B, T, 1]`` without a mask; ``latent`` ``[B, T, D]``; ``value`` ``[B, 1]`` of the
            last latent; entropies; and the auxiliary losses that the encoder writes, by their keys
            in :attr:`ALMLoss.out_keys`.
        """
        batch = self.prepare(tensordict, steps=self.horizon)
        if batch.rollout is not None:
            return batch.rollout
        actions = batch.windows.get(self.tensor_keys.action)
        encoded = self._run("encoder", batch.windows[:, 0], self.encoder_params)
        posterior = self.encoder.build_dist_from_params(encoded)
        latents, starts, priors = [self._draw(posterior)], [], []
        for t in range(actions.shape[1]):
            start = latents[-1]
            if self.teacher_forcing and t > 0:
                recorded = batch.following[:, t - 1]
                start = self._draw(self.encoder.build_dist_from_params(recorded))
            starts.append(start)
            following, prior = self.next(start, actions[:, t], self.dynamics_params)
            priors.append(prior)
            latents.append(torch.where(batch.mask[:, t, None], following, latents[-1]))
        prior = self.dynamics.build_dist_from_params(torch.stack(priors, 1))
        parameters = batch.following
        if self.latent_target == "online":
            observations = batch.windows.get("next").select(*self.encoder.in_keys)
            parameters = self._run("encoder", observations, self.encoder_params)
        target = self.encoder.build_dist_from_params(parameters)
        check_latents(prior, target)
        latent, following = torch.stack(starts, 1), torch.stack(latents[1:], 1)
        kl = kl_divergence(prior, target).unsqueeze(-1)
        consistency = kl
        if self.consistency == "forward_kl":
            consistency = kl_divergence(target, prior).unsqueeze(-1)
        elif self.consistency == "squared_distance":
            consistency = squared_distance(prior, target).unsqueeze(-1)
        elif self.consistency == "classifier":
            consistency = -log_ratio(self.classify(latent, actions, following))
        return TensorDict(
            {
                "latent": latent,
                "kl": kl,
                "consistency": consistency,
                "reward": self.reward(latent, actions),
                "value": self._final_value(batch, latents[-1]),
                "prior_entropy": prior.entropy().detach(),
                "posterior_entropy": posterior.entropy().detach(),
                **{f"loss_{name}": encoded.get(key) for name, key in self._encoder_losses.items()},
            },
            batch_size=actions.shape[:1],
        )

    def _final_value(self, batch: Batch, latent: Tensor) -> Tensor:
        """The value of the last latent, ``[B, 1]``; zero after a terminal state."""
        value = self.value(latent, self.act(latent.detach()))
        if self.bootstrap_terminated:
            return value
        ends = batch.windows.get(next_key(self.tensor_keys.terminated)).squeeze(-1)
        return torch.where((ends & batch.mask).any(-1, keepdim=True), 0, value)

    @torch.no_grad()
    def _td_target(self, batch: Batch) -> Tensor:
        """Returns the one-step value target of the first transitions, ``[B, 1]``."""
        following = self._draw(self.encoder.build_dist_from_params(batch.following[:, 0]))
        params = self.target_qvalue_network_params
        next_value = self.value(following, self.act(following), params)
        reward, ended = self._outcome(batch, "reward"), self._outcome(batch, "terminated")
        return td_target(reward, ended, next_value, self.value_estimator.gamma)

    @torch.no_grad()
    def imagine_episodes(self, tensordict: TensorDictBase | Batch, steps: int) -> TensorDictBase:
        """Plays the actor in the latent dynamics, from the first observations of windows.

        An imagined episode ends with the probability of the continuation model. Another one then
        starts at the first observation of a random window.

        Returns:
            ``latent``, ``action`` and ``value_target``, the lambda-return with the target action
            values, each ``[B, steps, ...]``.
        """
        batch = self.prepare(tensordict)
        starts = self._draw(self.encoder.build_dist_from_params(batch.current))
        latent, action = starts, self.act(starts)
        episodes = []
        for _ in range(steps):
            following, _ = self.next(latent, action)
            after = {"latent": following, "action": self.act(following)}
            step: dict[str, Any] = {"latent": latent, "action": action, "next": after}
            latent, action = after["latent"], after["action"]
            if self.continuation_model is not None:
                logit = self.continuation(step["latent"], step["action"], following)
                continues = torch.rand_like(logit) < logit.sigmoid()
                step["continuation"] = continues.to(logit.dtype)
                other = starts[torch.randint(len(starts), (len(starts),), device=starts.device)]
                latent = torch.where(continues, latent, other)
                action = torch.where(continues, action, self.act(other))
            episodes.append(TensorDict(step, batch_size=starts.shape[:1]))
        rollout = TensorDict.maybe_dense_stack(episodes, 1)
        rollout["reward"] = self.reward(rollout["latent"], rollout["action"])
        following, action = rollout["next", "latent"], rollout["next", "action"]
        params = self.target_qvalue_network_params
        rollout["next", "value"] = self.value(following, action, params)
        rollout["value_target"] = self.lambda_return(rollout)
        return rollout.select("latent", "action", "value_target")

    def imagine(
        self,
        latent: Tensor,
        action: Tensor | None = None,
        *,
        values: TensorDictBase | None = None,
        with_log_ratio: bool = True,
    ) -> TensorDictBase:
        r"""Rolls out the actor in the latent dynamics.

        The actor reads detached latents, and the values read detached actions. The gradient reaches
        the actor through the dynamics, the rewards and the log-ratios.

        Args:
            latent: first latents, ``[B, D]``.
            action: the first action ``[B, A]``; sampled from the actor by default.
            values: parameters of the action values; by default those that are trained.
            with_log_ratio: whether to run the classifier.

        Returns:
            ``latent``, ``action``, ``reward``, ``log_ratio`` and, under ``"next"``, ``latent``,
            ``action`` and ``value``, all ``[B, K, ...]``; with a continuation model also
            ``continuation``, the probability that a step does not terminate.
        """
        latents, actions = [latent], []
        for t in range(self.horizon):
            if t > 0 or action is None:
                action = self.act(latent.detach(), self.actor_params)
            actions.append(action)
            latent, _ = self.next(latent, action)
            latents.append(latent)
        actions.append(self.act(latent.detach()))
        current, current_action = torch.stack(latents[:-1], 1), torch.stack(actions[:-1], 1)
        following, following_action = torch.stack(latents[1:], 1), torch.stack(actions[1:], 1)
        following_action = following_action.detach()
        rollout = TensorDict(
            {
                "latent": current,
                "action": current_action,
                "reward": self.reward(current, current_action),
                "next": {
                    "latent": following,
                    "action": following_action,
                    "value": self.value(following, following_action, values),
                },
            },
            batch_size=following.shape[:2],
        )
        if with_log_ratio:
            logits = self.classify(current, current_action, following.detach())
            rollout["log_ratio"] = log_ratio(logits)
        if self.continuation_model is not None:
            logit = self.continuation(current, current_action, following)
            rollout["continuation"] = logit.sigmoid()
        return rollout

    def lambda_return(self, rollout: TensorDictBase) -> Tensor:
        r"""The returns ``[B, K, 1]`` of an imagined rollout by the loss's value estimator.

        The reward of a step is :math:`r(z_t, a_t) + c \cdot \mathrm{logratio}_t`, without the
        log-ratio if the rollout has none. With a continuation model, see
        :func:`~alm_torchrl.objectives.functional.lambda_returns`.
        """
        reward = self._augmented_reward(rollout)
        value, estimator = rollout["next", "value"], self.value_estimator
        if self.continuation_model is not None:
            lmbda = getattr(estimator, "lmbda", 0.0)  # TD0 has no lmbda
            return lambda_returns(reward, value, rollout["continuation"], estimator.gamma, lmbda)
        never = torch.zeros_like(reward, dtype=torch.bool)
        outcome = {"reward": reward, "done": never, "terminated": never}
        steps = TensorDict({"next": outcome}, batch_size=rollout.batch_size)
        return estimator.value_estimate(steps, next_value=value)

    def bound(self, rollout: TensorDictBase) -> Tensor:
        r"""The K-step bound ``[B, 1]``: the first return of a rollout at :math:`\lambda = 1`.

        See :func:`~alm_torchrl.objectives.functional.k_step_bound`.
        """
        value, gamma = rollout["next", "value"][:, -1], self.value_estimator.gamma
        continuation = rollout.get("continuation", None)
        return k_step_bound(self._augmented_reward(rollout), value, gamma, continuation)

    def _augmented_reward(self, rollout: TensorDictBase) -> Tensor:
        """Returns reward plus weighted log-ratio of every step, ``[B, K, 1]``."""
        if "log_ratio" not in rollout:
            return rollout["reward"]
        return rollout["reward"] + self.consistency_coeff * rollout["log_ratio"]

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams: object
    ) -> Self:
        """Sets the estimator of imagined returns and the discount of all losses.

        The estimator may be ``ValueEstimators.TDLambda`` (the default), ``TD0``, ``TD1``, or a
        value estimator of TorchRL; its options are ``gamma`` and ``lmbda``.
        """
        value_type, hyperparams = self._prepare_value_estimator_kwargs(value_type, **hyperparams)
        if value_type is None:  # the user passed an estimator
            return self
        if "lmbda" in hyperparams:
            # TorchRL's vectorized form returns wrong values under torch.compile.
            hyperparams.setdefault("vectorized", False)
        # A discount on the CPU would be copied to a GPU, or become a constant of a CUDA graph.
        hyperparams.setdefault("device", self._default_device)
        dispatch_value_estimator(
            self,
            value_type,
            supported=(ValueEstimators.TDLambda, ValueEstimators.TD0, ValueEstimators.TD1),
            value_network=None,
            **hyperparams,
        )
        if self.value_type is ValueEstimators.TD1:  # always vectorized there
            return self.make_value_estimator(ValueEstimators.TDLambda, lmbda=1.0, **hyperparams)
        # Otherwise its first use sets the keys, and the second call of a compiled loss recompiles.
        self.value_estimator.set_keys()
        return self

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """Does nothing: the estimator reads imagined rollouts, whose keys are fixed."""

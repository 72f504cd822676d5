"""The objective of Aligned Latent Models as one TorchRL loss module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    dispatch,
)
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator

from alm_torchrl.objectives.checks import check_choice, check_positive, check_whole
from alm_torchrl.objectives.functional import discounts, log_ratio, survival, td_target
from alm_torchrl.objectives.latent_model import Batch, LatentModelLoss

__all__ = ["ALMLoss"]

LOSS_KEYS = ("loss_world_model", "loss_reward", "loss_classifier", "loss_value", "loss_actor")
#: How far the dynamics is from the encoder, in the world-model loss.
Consistency = Literal["reverse_kl", "forward_kl", "squared_distance", "classifier"]
#: Which parameters encode what the dynamics should predict, and what all other terms start from.
LatentTarget = Literal["moving_average", "stop_gradient", "online"]
#: What the actor maximizes.
ActorObjective = Literal["lambda_returns", "bound", "value"]

_CHOICES = {
    "reduction": ("none", "mean", "sum"),
    "short_windows": ("mask", "drop"),
    "consistency": get_args(Consistency),
    "latent_target": get_args(LatentTarget),
    "actor_objective": get_args(ActorObjective),
}


class ALMLoss(LatentModelLoss):
    r"""The objective of Aligned Latent Models (Ghugare et al., ICLR 2023, arXiv 2209.08466).

    Encoder, latent dynamics and policy maximize one lower bound on the return; reward model,
    transition classifier and action values are fitted as well. One call returns all losses. Each
    gives a gradient only to its own networks, so one backward pass and one optimizer suffice:

    ================== ========================================= ==================================
    loss               trains                                    lets gradients pass through
    ================== ========================================= ==================================
    loss_world_model   encoder, latent dynamics                  reward, action values
    loss_reward        reward                                    \-
    loss_classifier    classifier                                \-
    loss_value         action values                             \-
    loss_actor         actor                                     latent dynamics, reward,
                                                                 classifier, action values,
                                                                 continuation
    loss_continuation  continuation (optional)                   \-
    ================== ========================================= ==================================

    The input is a batch of windows ``[B, T]`` (see
    :func:`alm_torchrl.data.make_replay_buffer`). The world-model loss reads the whole window; the
    others read only its first transition, which must be drawn uniformly. A plain batch of
    transitions ``[B]`` counts as windows of one step, at any horizon. Steps past an episode's end,
    or where ``"validity_mask"`` is false, contribute nothing.

    Deviations from the authors' implementation, each with the option that restores theirs:

    * A window that ends in a terminal state has no value term: ``bootstrap_terminated=True``.
    * A window cut short by an episode's end counts with the steps it has:
      ``short_windows="drop"``.
    * One batch serves all terms; theirs samples windows and transitions separately: call the
      per-term methods with separate batches.
    * All terms are evaluated before the optimizer steps: step after each per-term method.

    Args:
        encoder: observations to a distribution over the latent, such as
            :class:`~alm_torchrl.modules.MLPEncoder`.
        dynamics: latent and action to a distribution over the next latent, such as
            :class:`~alm_torchrl.modules.LatentDynamics`.
        reward_model: latent and action to a reward ``[..., 1]``.
        classifier: latent, action and next latent to two logits ``[..., 2]``, class 1 for a next
            latent encoded from a real observation.
        qvalue_network: latent and action to ``N`` action values ``[..., N]``, whose minimum is
            used.
        actor: latent to a distribution over the action, with the noise that the losses should
            see, such as :class:`~alm_torchrl.modules.Actor`.
        continuation_model: latent and action to the logit ``[..., 1]`` of the probability that the
            step does not terminate, such as :class:`~alm_torchrl.modules.ContinuationModel`.
            Imagined episodes then end, too. None by default: nothing ends in imagination.

    Keyword Args:
        horizon (int): steps ``K`` imagined for the actor, and the length of the windows.
        consistency_coeff (float): weight ``c`` of the log-ratio in the actor's reward; may be
            assigned during training.
        reduction (str): ``"mean"`` or ``"sum"`` over the batch, or ``"none"`` for losses ``[B]``.
        bootstrap_terminated (bool): whether a window keeps its value term after a terminal state.
        short_windows (str): ``"mask"`` keeps the steps that a window cut short has; ``"drop"``
            leaves such windows out of the world-model loss.
        reward_term (bool): whether the world-model loss holds the rewards.
        value_term (bool): whether it holds the value at the window's end.
        consistency (str): its measure of how far the dynamics :math:`m` is from the encoder
            :math:`e`: ``"reverse_kl"`` :math:`KL(m \| e)`, ``"forward_kl"`` :math:`KL(e \| m)`,
            ``"squared_distance"`` of the two means, or ``"classifier"``, the negated log-ratio of
            the latents drawn from :math:`m`.
        consistency_level (float): if given, this term gets a learnt weight in place of 1, a
            Lagrange multiplier that holds its mean over steps at this level (nats, or squared
            latent units); it brings ``loss_multiplier`` and a parameter group ``multiplier``.
        latent_target (str): which encoder the dynamics is held against, and latents of the other
            losses come from: the ``"moving_average"`` of its weights, or the encoder itself with a
            ``"stop_gradient"``, or ``"online"``, where the consistency term trains both sides.
        actor_objective (str): ``"lambda_returns"`` of every imagined step, the K-step ``"bound"``
            alone, or the ``"value"`` of the first latent and action, without the model.
        value_expansion (bool): whether the value targets hold the imagined return of ``horizon``
            steps from the next latent, in place of the value there.
        start_steps (int): the actor's rollouts start after up to this many imagined steps, in
            place of at encoded observations; see :meth:`roll_on`.

        auxiliary_losses (dict): further losses by name. Each module gets the windows ``[B, T]``
            with the latents of the trained encoder (first step) and dynamics (later steps), and
            ``"validity_mask"``; it returns a scalar or ``[B]``, which becomes ``loss_<name>``.

    The options from ``reward_term`` to ``actor_objective`` are for ablations; the later ones and
    ``continuation_model`` are not part of the paper. :meth:`make_value_estimator` sets discount
    and lambda of the imagined returns (0.99 and 0.95 by default). Update the targets with
    ``torchrl.objectives.SoftUpdate(loss, tau=0.005)``; build it before loading a checkpoint.

    Raises:
        ValueError: for modules of the wrong kind or with keys that do not match, and for unknown
            settings.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate
        >>> from alm_torchrl.modules import *
        >>> loss = ALMLoss(
        ...     encoder=MLPEncoder(observation_dim=5, latent_dim=4, hidden_dim=8),
        ...     dynamics=LatentDynamics(latent_dim=4, action_dim=2, hidden_dim=8),
        ...     reward_model=RewardModel(latent_dim=4, action_dim=2, hidden_dim=8),
        ...     classifier=TransitionClassifier(latent_dim=4, action_dim=2, hidden_dim=8),
        ...     qvalue_network=QValueEnsemble(latent_dim=4, action_dim=2, hidden_dim=8),
        ...     actor=Actor(latent_dim=4, low=[-1, -1], high=[1, 1], hidden_dim=8),
        ... )
        >>> target_update = SoftUpdate(loss, tau=0.005)
        >>> flag = torch.zeros(6, 3, 1, dtype=torch.bool)
        >>> windows = TensorDict(
        ...     observation=torch.randn(6, 3, 5),
        ...     action=torch.rand(6, 3, 2),
        ...     next=TensorDict(
        ...         observation=torch.randn(6, 3, 5),
        ...         reward=torch.randn(6, 3, 1),
        ...         done=flag,
        ...         terminated=flag,
        ...     ),
        ...     batch_size=[6, 3],
        ... )
        >>> losses = loss(windows)
        >>> sum(losses[key] for key in losses.keys() if key.startswith("loss_")).backward()
        >>> target_update.step()
    """

    @dataclass
    class _AcceptedKeys:
        """The keys that :meth:`ALMLoss.set_keys` configures.

        ``reward`` and the flags are read under ``"next"``; each flag ends an episode.
        ``truncated`` and ``validity_mask``, the steps that hold data ``[B, T]``, are optional.
        """

        action: NestedKey = "action"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        truncated: NestedKey = "truncated"
        validity_mask: NestedKey = "validity_mask"

    auxiliary_losses: nn.ModuleDict
    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TDLambda
    _schedulable_buffers = frozenset({"consistency_coeff"})
    _loss_mask_key = "validity_mask"

    def __init__(
        self,
        encoder: ProbabilisticTensorDictSequential,
        dynamics: ProbabilisticTensorDictSequential,
        reward_model: TensorDictModule,
        classifier: TensorDictModule,
        qvalue_network: TensorDictModule,
        actor: ProbabilisticTensorDictSequential,
        continuation_model: TensorDictModule | None = None,
        *,
        horizon: int = 3,
        consistency_coeff: float = 0.1,
        reduction: Literal["none", "mean", "sum"] = "mean",
        bootstrap_terminated: bool = False,
        short_windows: Literal["mask", "drop"] = "mask",
        reward_term: bool = True,
        value_term: bool = True,
        consistency: Consistency = "reverse_kl",
        consistency_level: float | None = None,
        latent_target: LatentTarget = "moving_average",
        actor_objective: ActorObjective = "lambda_returns",
        value_expansion: bool = False,
        start_steps: int = 0,
        auxiliary_losses: Mapping[str, nn.Module] | None = None,
    ) -> None:
        averaged = ("encoder",) if latent_target == "moving_average" else ()
        super().__init__(
            {
                "encoder": encoder,
                "dynamics": dynamics,
                "reward_model": reward_model,
                "classifier": classifier,
                "qvalue_network": qvalue_network,
                "actor": actor,
                "continuation_model": continuation_model,
            },
            averaged=(*averaged, "qvalue_network"),
        )
        self.horizon = check_whole("horizon", horizon, at_least=1)
        self.reduction = reduction
        self.bootstrap_terminated = bootstrap_terminated
        self.short_windows = short_windows
        self.reward_term = reward_term
        self.value_term = value_term
        self.consistency = consistency
        self.latent_target = latent_target
        self.actor_objective = actor_objective
        self.value_expansion = value_expansion
        self.start_steps = check_whole("start_steps", start_steps, at_least=0)
        self.consistency_level = consistency_level
        self.register_coeff_buffer("consistency_coeff", float(consistency_coeff))
        if consistency_level is not None:
            check_positive("consistency_level", consistency_level)
            self.log_multiplier = nn.Parameter(next(self.parameters()).new_zeros(()))
        self.auxiliary_losses = nn.ModuleDict(auxiliary_losses or {})
        self._check_options()
        self.set_keys(action=self._action_key)
        self.make_value_estimator()

    def _check_options(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if len(set(self.out_keys)) < len(self.out_keys):
            raise ValueError(f"auxiliary_losses has the name of another loss: {self.out_keys}")

    # ---------------------------------------------------------------- keys and estimators

    @property
    def in_keys(self) -> list[NestedKey]:
        """The observations, the action, and the outcome under ``"next"``."""
        keys = self.tensor_keys
        outcome = [*self.encoder.in_keys, keys.reward, keys.done, keys.terminated]
        return [*self.encoder.in_keys, keys.action, *(unravel_key(("next", k)) for k in outcome)]

    @property
    def out_keys(self) -> list[str]:
        """The five losses, and those of the optional parts."""
        keys = list(LOSS_KEYS)
        if self.continuation_model is not None:
            keys.append("loss_continuation")
        if self.consistency_level is not None:
            keys.append("loss_multiplier")
        return keys + [f"loss_{name}" for name in self.auxiliary_losses]

    def set_keys(self, **kwargs: NestedKey | None) -> None:
        """Renames the entries read from the batch; see :class:`ALMLoss._AcceptedKeys`.

        ``None`` restores a default. The networks keep the keys that they were built with.
        """
        if kwargs.get("action", self._action_key) is None:
            kwargs["action"] = self._action_key
        super().set_keys(**kwargs)
        self.loss_mask_key = self.tensor_keys.validity_mask

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams: object
    ) -> ALMLoss:
        """Sets the estimator of imagined returns and the discount of all losses.

        Args:
            value_type: ``ValueEstimators.TDLambda`` (the default), ``TD0`` or ``TD1``, or a value
                estimator of TorchRL.
            **hyperparams: such as ``gamma`` (0.99 by default) and ``lmbda`` (0.95).
        """
        value_type, hyperparams = self._prepare_value_estimator_kwargs(value_type, **hyperparams)
        if value_type is None:
            return self
        if "lmbda" in hyperparams:
            # TorchRL's vectorized form is silently wrong under torch.compile.
            hyperparams.setdefault("vectorized", False)
        dispatch_value_estimator(
            self,
            value_type,
            supported=(ValueEstimators.TDLambda, ValueEstimators.TD0, ValueEstimators.TD1),
            value_network=None,
            **hyperparams,
        )
        if self.value_type is ValueEstimators.TD1:  # always vectorized there
            return self.make_value_estimator(ValueEstimators.TDLambda, lmbda=1.0, **hyperparams)
        return self

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters by the losses that move them.

        The gradient norm of each group is clipped separately; each may have its learning rate.

        Returns:
            ``world_model`` (encoder, dynamics and auxiliary losses), ``reward`` (reward model and
            classifier), ``value`` and ``actor``; optionally ``continuation`` and ``multiplier``.
        """
        members = {
            "world_model": (self.encoder_params, self.dynamics_params, self.auxiliary_losses),
            "reward": (self.reward_model_params, self.classifier_params),
            "value": (self.qvalue_network_params,),
            "actor": (self.actor_params,),
        }
        if self.continuation_model is not None:
            members["continuation"] = (self.continuation_model_params,)
        groups = {
            name: [p for params in group for p in params.parameters() if p.requires_grad]
            for name, group in members.items()
        }
        if self.consistency_level is not None:
            groups["multiplier"] = [self.log_multiplier]
        return groups

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """Does nothing: the estimator reads imagined rollouts, whose keys are the loss's own."""

    # ------------------------------------------------------------------------- the losses

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """All losses and their metrics from one batch.

        Args:
            tensordict: windows ``[B, T]`` with ``T >= horizon``, or transitions ``[B]``, holding
                :attr:`in_keys`. It is not changed.

        Returns:
            The losses, scalars (``[B]`` with ``reduction="none"``), and detached scalar metrics.
        """
        batch = self.prepare(tensordict, steps=self.horizon)
        batch = batch._replace(rollout=self.world_model_rollout(batch))
        terms = {
            "loss_world_model": self.world_model_loss(batch),
            "loss_reward": self.reward_loss(batch),
            "loss_classifier": self.classifier_loss(batch),
            "loss_value": self.value_loss(batch),
            "loss_actor": self.actor_loss(batch),
        }
        if self.continuation_model is not None:
            terms["loss_continuation"] = self.continuation_loss(batch)
        if self.consistency_level is not None:
            terms["loss_multiplier"] = self.multiplier_loss(batch)
        for name in self.auxiliary_losses:
            terms[f"loss_{name}"] = self.auxiliary_loss(batch, name)
        out: dict[str, Tensor] = {}
        for name, (loss, metrics) in terms.items():
            out |= {name: loss, **metrics}
        return TensorDict(out)

    def world_model_loss(
        self, tensordict: TensorDictBase | Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The world-model loss; see :meth:`world_model_rollout` for its terms.

        Like every loss term, it takes the windows of :meth:`forward`, or a batch from
        :meth:`prepare`, and returns the loss and its metrics. :meth:`forward` calls the public
        terms, so that a subclass may override them.
        """
        batch = self.prepare(tensordict, steps=self.horizon)
        rollout = self.world_model_rollout(batch)
        steps = rollout["consistency"]
        if self.consistency_level is not None:
            steps = self.log_multiplier.detach().exp() * steps
        if self.reward_term:
            steps = steps - rollout["reward"]
        loss = (steps.squeeze(-1) * batch.mask).sum(-1)
        if self.value_term:
            loss = loss - rollout["value"].squeeze(-1)
        metrics = {
            "kl": _masked_mean(rollout["kl"], batch.mask),
            "prior_entropy": _masked_mean(rollout["prior_entropy"], batch.mask),
            "posterior_entropy": _masked_mean(rollout["posterior_entropy"], batch.mask[:, 0]),
            "latent_spread": rollout["latent"].std(0, correction=0).mean(),
        }
        if self.consistency != "reverse_kl":
            metrics["consistency"] = _masked_mean(rollout["consistency"], batch.mask)
        return self._reduce(loss, self._counted(batch)), _detached(metrics)

    def multiplier_loss(
        self, tensordict: TensorDictBase | Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""The dual of the constraint that the consistency term stays below its level.

        .. math:: -\log \beta \sum_t \big(\mathrm{sg}[\mathrm{consistency}_t] -
                  \mathrm{level}\big)

        The multiplier :math:`\beta`, which weighs the term in the world-model loss, grows while
        the term is above its level and shrinks while it is below.
        """
        if self.consistency_level is None:
            raise ValueError("the loss has no multiplier; give ALMLoss a consistency_level")
        batch = self.prepare(tensordict, steps=self.horizon)
        excess = self.world_model_rollout(batch)["consistency"].detach() - self.consistency_level
        loss = -self.log_multiplier * (excess.squeeze(-1) * batch.mask).sum(-1)
        metrics = {"multiplier": self.log_multiplier.exp()}
        return self._reduce(loss, self._counted(batch)), _detached(metrics)

    def auxiliary_loss(
        self, tensordict: TensorDictBase | Batch, name: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the auxiliary module ``name``, without metrics."""
        batch = self.prepare(tensordict, steps=self.horizon)
        module, windows = self.auxiliary_losses[name], batch.windows.copy()
        windows.set(self._latent_key, self.world_model_rollout(batch)["latent"])
        windows.set(self.tensor_keys.validity_mask, batch.mask)
        loss = module(windows)
        if isinstance(loss, TensorDictBase):
            loss = loss.get(cast("TensorDictModule", module).out_keys[-1])
        if loss.shape not in ((), batch.mask.shape[:1]):
            raise ValueError(
                f"auxiliary loss {name!r} has shape {tuple(loss.shape)}; return a scalar or one "
                f"loss per window, {tuple(batch.mask.shape[:1])}"
            )
        return (self._reduce(loss, batch.mask[:, 0]) if loss.ndim else loss), {}

    def reward_loss(self, tensordict: TensorDictBase | Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared error of the reward model, on the first transition of each window."""
        batch = self.prepare(tensordict)
        predicted = self.reward(*self._first_transition(batch), self.reward_model_params)
        loss = F.mse_loss(predicted, self._outcome(batch, "reward"), reduction="none").squeeze(-1)
        return self._reduce(loss, batch.mask[:, 0]), {}

    def continuation_loss(
        self, tensordict: TensorDictBase | Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy of the continuation model, on the first transition of each window.

        A terminal state ends an episode; a time limit does not.
        """
        batch = self.prepare(tensordict)
        params = getattr(self, "continuation_model_params", None)
        logit = self.continuation(*self._first_transition(batch), params)
        continues = (~self._outcome(batch, "terminated")).to(logit.dtype)
        loss = F.binary_cross_entropy_with_logits(logit, continues, reduction="none").squeeze(-1)
        return self._reduce(loss, batch.mask[:, 0]), {}

    def classifier_loss(
        self, tensordict: TensorDictBase | Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy of the classifier, on the first transition of each window.

        The rows of :meth:`generated_rows` get a next latent drawn from the dynamics (class 0).
        """
        batch = self.prepare(tensordict)
        latent, action = self._first_transition(batch)
        generated = self.generated_rows(self._step(latent, action))
        with torch.no_grad():
            imagined, _ = self.next(latent, action)
        encoded = self._draw(self.encoder.build_dist_from_params(batch.following[:, 0]))
        following = torch.where(generated.unsqueeze(-1), imagined, encoded)
        logits = self.classify(latent, action, following, self.classifier_params)
        labels = (~generated).long()
        loss = F.cross_entropy(logits, labels, reduction="none")
        correct = (log_ratio(logits).squeeze(-1) > 0) == labels.bool()
        metrics = {"classifier_accuracy": _masked_mean(correct.to(loss.dtype), batch.mask[:, 0])}
        return self._reduce(loss, batch.mask[:, 0]), metrics

    def generated_rows(self, tensordict: TensorDictBase) -> Tensor:
        """The rows for which the classifier sees an imagined next latent: a random half.

        Args:
            tensordict: latents and actions of the first transitions, ``[B]``.

        Returns:
            bool ``[B]``. A subclass may override it.
        """
        rows = tensordict.shape[0]
        return torch.randperm(rows, device=tensordict.get(self._latent_key).device) < rows // 2

    def value_loss(self, tensordict: TensorDictBase | Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The squared temporal-difference error, on the first transition of each window.

        The loss is a mean over the action values of the ensemble.
        """
        batch = self.prepare(tensordict)
        latent, action = self._first_transition(batch)
        params = self.target_qvalue_network_params
        with torch.no_grad():
            following = self._draw(self.encoder.build_dist_from_params(batch.following[:, 0]))
            if self.value_expansion:
                rollout = self.imagine(following, values=params, with_log_ratio=False)
                next_value = self.lambda_return(rollout)[:, 0]
            else:
                next_value = self.value(following, self.act(following), params)
            reward, ended = self._outcome(batch, "reward"), self._outcome(batch, "terminated")
            target = td_target(reward, ended, next_value, self.value_estimator.gamma)
        values = self.action_values(latent, action, self.qvalue_network_params)
        loss = (values - target).square().mean(-1)
        mask = batch.mask[:, 0]
        metrics = {
            "q_value": _masked_mean(values, mask),
            "target_value": _masked_mean(target, mask),
        }
        return self._reduce(loss, mask), _detached(metrics)

    def actor_loss(self, tensordict: TensorDictBase | Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The negated return of rollouts imagined from the first observation of each window."""
        batch = self.prepare(tensordict)
        latent = self._draw(self.encoder.build_dist_from_params(batch.current))
        mask = batch.mask[:, 0]
        if self.actor_objective == "value":
            value = self.value(latent, self.act(latent, self.actor_params))
            metrics = {"actor_value": _masked_mean(value, mask)}
            return self._reduce(-value.squeeze(-1), mask), _detached(metrics)
        rollout = self.imagine(self.roll_on(latent) if self.start_steps else latent)
        returns = self.lambda_return(rollout)
        if self.actor_objective == "bound":
            loss = -self.bound(rollout).squeeze(-1)
        else:
            weights = discounts(self.value_estimator.gamma, self.horizon)
            if self.continuation_model is not None:
                weights = weights * survival(rollout["continuation"].detach())[:, :-1]
            loss = -(weights * returns).mean(-2).squeeze(-1)
        metrics = {
            "imagined_reward": _masked_mean(rollout["reward"], mask),
            "imagined_log_ratio": _masked_mean(rollout["log_ratio"], mask),
            "imagined_value": _masked_mean(rollout["next", "value"], mask),
            "imagined_return": _masked_mean(returns[:, 0], mask),
        }
        if self.continuation_model is not None:
            metrics["imagined_continuation"] = _masked_mean(rollout["continuation"], mask)
        return self._reduce(loss, mask), _detached(metrics)

    def _first_transition(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A latent drawn for the first observation, and its recorded action."""
        latent = self._draw(self.encoder.build_dist_from_params(batch.current))
        return latent, batch.windows.get(self.tensor_keys.action)[:, 0]

    def _outcome(self, batch: Batch, name: Literal["reward", "terminated"]) -> Tensor:
        """An entry of the first transition under ``"next"``, ``[B, 1]``."""
        return batch.windows.get(unravel_key(("next", getattr(self.tensor_keys, name))))[:, 0]

    def _counted(self, batch: Batch) -> Tensor:
        """The windows that the world-model loss counts, bool ``[B]``."""
        return batch.mask[:, -1] if self.short_windows == "drop" else batch.mask[:, 0]

    def _reduce(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self._reduce_loss(loss, TensorDict({self.tensor_keys.validity_mask: mask}))


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of ``values`` ``[*mask.shape, ...]`` over the entries that the mask keeps."""
    means = values.reshape(*mask.shape, -1).mean(-1)
    return torch.where(mask, means, 0).sum() / mask.sum().clamp_min(1)


def _detached(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in metrics.items()}

"""The objective of Aligned Latent Models as one TorchRL loss module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.nn import functional as F

from alm_torchrl.data.transitions import next_key
from alm_torchrl.objectives.checks import (
    check_choices,
    check_level,
    check_whole,
    refuse_estimator_options,
    split_losses,
)
from alm_torchrl.objectives.functional import (
    detached,
    discounts,
    log_ratio,
    masked_mean,
    survival,
)
from alm_torchrl.objectives.latent_model import Batch, LatentModelLoss
from alm_torchrl.objectives.options import (
    CHOICES,
    FIRST_STEP_KEYS,
    LOSS_KEYS,
    ActorObjective,
    Consistency,
    LatentTarget,
    LossFunction,
    Reduction,
    ShortWindows,
)
from alm_torchrl.objectives.windows import write_priority

__all__ = ["ALMLoss"]

LossAndMetrics: TypeAlias = tuple[Tensor, dict[str, Tensor]]


class ALMLoss(LatentModelLoss):
    r"""The objective of Aligned Latent Models (Ghugare et al., ICLR 2023, arXiv 2209.08466).

    One call returns all losses. Each loss trains only its own networks, so one backward pass
    through their sum and one optimizer are enough:

    ================== =========================== ===============================================
    loss               trains                      passes gradients through
    ================== =========================== ===============================================
    loss_world_model   encoder, latent dynamics    reward, action values
    loss_reward        reward                      \-
    loss_classifier    classifier                  \-
    loss_value         action values               \-
    loss_actor         actor                       latent dynamics, reward, classifier, action
                                                   values, continuation
    loss_continuation  continuation (optional)     \-
    ================== =========================== ===============================================

    The input is a batch of windows ``[B, T]`` (see :func:`alm_torchrl.data.make_replay_buffer`).
    The world-model loss reads whole windows. The other losses read the first transitions, which
    must be sampled uniformly. Transitions ``[B]`` are windows of one step. Steps after the end of
    an episode, or where ``"validity_mask"`` is false, have no effect.

    For the authors' implementation, use ``bootstrap_terminated=True``, ``short_windows="drop"``,
    and one optimizer step after each loss (call its method) on its own batch.
    ``alm_torchrl.modules`` has all of these networks.

    Args:
        encoder: maps observations to a distribution over the latent.
        dynamics: maps latent and action to a distribution over the next latent.
        reward_model: maps latent and action to a reward ``[..., 1]``.
        classifier: maps latent, action and next latent to logits ``[..., 2]``; class 1 is the next
            latent of a real observation.
        qvalue_network: maps latent and action to ``N`` action values ``[..., N]``; the losses use
            the minimum.
        actor: maps the latent to a distribution over the action, with the exploration noise.
        continuation_model: maps latent, action and next latent, or some of them, to the logit
            ``[..., 1]`` of the probability that the step does not terminate. By default, imagined
            episodes do not terminate.

    Keyword Args:
        horizon (int): number ``K`` of imagined steps, and length of the windows.
        consistency_coeff (float): weight ``c`` of the log-ratio in the actor's reward; assignable.
        reduction (str): ``"mean"`` or ``"sum"`` over the batch, or ``"none"`` for losses ``[B]``.
        loss_function (str): distance in the losses of rewards and values: ``"l2"``,
            ``"smooth_l1"`` or ``"l1"``.
        use_prioritized_weights (bool or "auto"): weights the losses by the entry
            ``"priority_weight"`` of a prioritized replay buffer: if the batch has it (``"auto"``),
            always (``True``) or never (``False``).
        bootstrap_terminated (bool): keeps the value of the last latent after a terminal state.
        short_windows (str): ``"mask"`` uses the valid steps of windows cut short by an episode's
            end; ``"drop"`` excludes these windows from the world-model loss.
        reward_term (bool): includes the rewards in the world-model loss.
        value_term (bool): includes the value of the last latent in the world-model loss.
        consistency (str): distance between dynamics :math:`m` and encoder :math:`e`:
            ``"reverse_kl"`` :math:`KL(m \| e)`, ``"forward_kl"`` :math:`KL(e \| m)`,
            ``"squared_distance"`` of the means, or ``"classifier"``, the negated log-ratio of
            latents sampled from :math:`m`.
        consistency_level (float): learns the weight of this distance as a Lagrange multiplier that
            keeps its mean over steps at this level (nats, or squared latent units). Adds
            ``loss_multiplier`` and a parameter group ``multiplier``. By default, the weight is 1.
        latent_target (str): encoder of the dynamics' targets and of the other losses' latents:
            ``"moving_average"`` of its weights, ``"stop_gradient"`` for the encoder itself, or
            ``"online"``, with which the distance also trains the targets.
        teacher_forcing (bool): predicts each step of a window from the target latent of its
            observation, without a gradient, instead of the latent sampled at the previous step.
        actor_objective (str): ``"lambda_returns"`` of all imagined steps, the K-step ``"bound"``,
            or the model-free ``"value"`` of the first latent and action.
        auxiliary_losses (dict): further losses by name; they become ``loss_<name>``. Each is a
            module, which reads the windows ``[B, T]`` with ``"validity_mask"`` and the latents of
            encoder (first step) and dynamics (later steps) and returns a scalar or ``[B]``; or the
            key of a loss that the encoder writes for each observation, such as that of a codebook.

    The entry ``"priority_weight"`` of a prioritized replay buffer, ``[B]`` or ``[B, T]``, weights
    the losses of a window by its value at the first transition. As in TorchRL, a mean is divided by
    the sum of the weights; metrics and scalar auxiliary losses have no weights. The value loss then
    writes the priority ``"td_error"`` in the same shape: the largest absolute error of the ensemble
    at the first transition, repeated over the window.

    With the entry ``"imagined"`` of :class:`ImaginedReplay`, the losses of values and actor read
    steps of imagined episodes instead of the first transitions. These have no weights.

    The options from ``reward_term`` to ``actor_objective`` are for ablations; the later ones and
    ``continuation_model`` are not in the paper. :meth:`make_value_estimator` sets discount and
    lambda (0.99 and 0.95 by default). Update the target networks with
    ``torchrl.objectives.SoftUpdate(loss, tau=0.005)``; create it before loading a checkpoint.

    Raises:
        ValueError: if a module has the wrong kind or keys, or an option is invalid.

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
        >>> step = {"observation": torch.randn(6, 3, 5), "reward": torch.randn(6, 3, 1)}
        >>> outcome = {**step, "done": flag, "terminated": flag}
        >>> windows = TensorDict({**step, "action": torch.rand(6, 3, 2), "next": outcome}, [6, 3])
        >>> losses = loss(windows)
        >>> sum(losses[key] for key in loss.out_keys).backward()
        >>> target_update.step()
    """

    @dataclass
    class _AcceptedKeys:
        """The entries of the batch.

        ``reward`` and the flags are under ``"next"``. Each of the flags ends an episode.
        ``truncated``, ``validity_mask`` ``[B, T]``, ``priority_weight`` and ``imagined`` are
        optional. ``priority`` is written.
        """

        action: NestedKey = "action"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        truncated: NestedKey = "truncated"
        validity_mask: NestedKey = "validity_mask"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"
        imagined: NestedKey = "imagined"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    _schedulable_buffers = frozenset({"consistency_coeff"})
    _loss_mask_key = "validity_mask"
    _selected: list[str] | None = None

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
        reduction: Reduction = "mean",
        loss_function: LossFunction = "l2",
        use_prioritized_weights: bool | Literal["auto"] = "auto",
        bootstrap_terminated: bool = False,
        short_windows: ShortWindows = "mask",
        reward_term: bool = True,
        value_term: bool = True,
        consistency: Consistency = "reverse_kl",
        consistency_level: float | None = None,
        latent_target: LatentTarget = "moving_average",
        teacher_forcing: bool = False,
        actor_objective: ActorObjective = "lambda_returns",
        auxiliary_losses: Mapping[str, nn.Module | NestedKey] | None = None,
        gamma: None = None,
        lmbda: None = None,
    ) -> None:
        refuse_estimator_options(gamma=gamma, lmbda=lmbda)
        averaged = ("encoder",) if latent_target == "moving_average" else ()
        super().__init__(
            averaged=(*averaged, "qvalue_network"),
            encoder=encoder,
            dynamics=dynamics,
            reward_model=reward_model,
            classifier=classifier,
            qvalue_network=qvalue_network,
            actor=actor,
            continuation_model=continuation_model,
        )
        self.horizon = check_whole("horizon", horizon, at_least=1)
        self.reduction, self.loss_function = reduction, loss_function
        self.use_prioritized_weights, self.consistency = use_prioritized_weights, consistency
        self.bootstrap_terminated, self.short_windows = bootstrap_terminated, short_windows
        self.reward_term, self.value_term = reward_term, value_term
        self.latent_target, self.actor_objective = latent_target, actor_objective
        self.consistency_level, self.teacher_forcing = consistency_level, bool(teacher_forcing)
        coefficient, device = float(consistency_coeff), self._default_device
        self.register_coeff_buffer("consistency_coeff", coefficient, device=device)
        if consistency_level is not None:
            check_level(consistency_level)
            self.log_multiplier = nn.Parameter(next(self.parameters()).new_zeros(()))
        self.auxiliary_losses, self._encoder_losses = split_losses(auxiliary_losses, self.encoder)
        check_choices({name: getattr(self, name) for name in CHOICES}, CHOICES)
        if len(set(self.out_keys)) < len(self.out_keys):
            raise ValueError(f"auxiliary_losses has the name of another loss: {self.out_keys}")
        self.set_keys(action=self._action_key)
        self.make_value_estimator()

    @property
    def in_keys(self) -> list[NestedKey]:
        """The observations, the action, and the outcome under ``"next"``."""
        keys = self.tensor_keys
        outcome = [*self.encoder.in_keys, keys.reward, keys.done, keys.terminated]
        return [*self.encoder.in_keys, keys.action, *(next_key(k) for k in outcome)]

    @property
    def out_keys(self) -> list[str]:
        """The losses to compute, by default :attr:`out_keys_source`.

        Assign a selection to compute only these losses and their metrics. ``select_out_keys`` does
        the same without the metrics, and ``reset_out_keys`` undoes it.
        """
        return self.out_keys_source if self._selected is None else [*self._selected]

    @out_keys.setter
    def out_keys(self, keys: Sequence[str]) -> None:
        available = self.out_keys_source
        if not keys or not {*keys} <= {*available}:
            raise ValueError(f"cannot select {[*keys]}; choose from {', '.join(available)}")
        self._selected = [*keys]

    @property
    def out_keys_source(self) -> list[str]:
        """The five losses and those of optional parts; the method ``x_loss`` returns ``loss_x``."""
        keys = list(LOSS_KEYS)
        if self.continuation_model is not None:
            keys.append("loss_continuation")
        if self.consistency_level is not None:
            keys.append("loss_multiplier")
        return keys + [f"loss_{name}" for name in (*self.auxiliary_losses, *self._encoder_losses)]

    def set_keys(self, **kwargs: NestedKey | None) -> None:
        """Renames the entries of the batch, but not the keys of the networks.

        See :class:`ALMLoss._AcceptedKeys` for the names. ``None`` restores a default.
        """
        if kwargs.get("action", self._action_key) is None:
            kwargs["action"] = self._action_key
        super().set_keys(**kwargs)
        self.loss_mask_key = self.tensor_keys.validity_mask

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the trained parameters in groups for gradient clipping and learning rates.

        The groups are ``world_model`` (encoder, dynamics and auxiliary losses), ``reward`` (reward
        model and classifier), ``value`` and ``actor``; optionally ``continuation`` and
        ``multiplier``.
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

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Computes the losses :attr:`out_keys` and their metrics.

        Args:
            tensordict: windows ``[B, T]`` with ``T >= horizon``, or transitions ``[B]``, with the
                entries :attr:`in_keys`.

        Returns:
            Scalar losses (``[B]`` with ``reduction="none"``), and detached scalar metrics.
        """
        keys = self.out_keys
        if FIRST_STEP_KEYS.issuperset(keys):
            batch = self.prepare(tensordict)
        else:
            batch = self.prepare(tensordict, steps=self.horizon)
            batch = batch._replace(rollout=self.world_model_rollout(batch))
        out: dict[str, Tensor] = {}
        for key in keys:
            name = key.removeprefix("loss_")
            if name in self.auxiliary_losses or name in self._encoder_losses:
                out[key], metrics = self.auxiliary_loss(batch, name)
            else:
                out[key], metrics = getattr(self, f"{name}_loss")(batch)
            out |= metrics
        return TensorDict(out)

    def world_model_loss(self, tensordict: TensorDictBase | Batch) -> LossAndMetrics:
        """The loss of encoder and dynamics.

        Like the other losses, it takes windows or a batch of :meth:`prepare`, and returns a loss
        and metrics. Subclasses may override it.
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
            "kl": masked_mean(rollout["kl"], batch.mask),
            "prior_entropy": masked_mean(rollout["prior_entropy"], batch.mask),
            "posterior_entropy": masked_mean(rollout["posterior_entropy"], batch.mask[:, 0]),
            "latent_spread": rollout["latent"].std(0, correction=0).mean(),
        }
        if self.consistency != "reverse_kl":
            metrics["consistency"] = masked_mean(rollout["consistency"], batch.mask)
        return self._reduce(loss, batch, self._counted(batch)), detached(metrics)

    def multiplier_loss(self, tensordict: TensorDictBase | Batch) -> LossAndMetrics:
        r"""The loss of the multiplier :math:`\beta`, which grows while the distance is too large.

        .. math:: -\log \beta \sum_t (\mathrm{sg}[\mathrm{consistency}_t] - \mathrm{level})
        """
        if self.consistency_level is None:
            raise ValueError("the loss has no multiplier; give ALMLoss a consistency_level")
        batch = self.prepare(tensordict, steps=self.horizon)
        excess = self.world_model_rollout(batch)["consistency"].detach() - self.consistency_level
        loss = -self.log_multiplier * (excess.squeeze(-1) * batch.mask).sum(-1)
        metrics = {"multiplier": self.log_multiplier.exp()}
        return self._reduce(loss, batch, self._counted(batch)), detached(metrics)

    def auxiliary_loss(self, tensordict: TensorDictBase | Batch, name: str) -> LossAndMetrics:
        """The loss of the auxiliary module or of the encoder's entry ``name``."""
        batch = self.prepare(tensordict, steps=self.horizon)
        rollout = self.world_model_rollout(batch)
        if name in self._encoder_losses:
            loss = rollout[f"loss_{name}"]
            loss = loss.squeeze(-1) if loss.ndim > 1 else loss
        else:
            module, windows = self.auxiliary_losses[name], batch.windows.copy()
            windows.set(self._latent_key, rollout["latent"])
            windows.set(self.tensor_keys.validity_mask, batch.mask)
            loss = module(windows)
            if isinstance(loss, TensorDictBase):
                loss = loss.get(cast("TensorDictModule", module).out_keys[-1])
        if loss.shape not in ((), batch.mask.shape[:1]):
            raise ValueError(
                f"auxiliary loss {name!r} has shape {tuple(loss.shape)}; return a scalar or one "
                f"loss per window, {tuple(batch.mask.shape[:1])}"
            )
        return (self._reduce(loss, batch) if loss.ndim else loss), {}

    def reward_loss(self, tensordict: TensorDictBase | Batch) -> LossAndMetrics:
        """The error of the reward model, on the first transition of each window."""
        batch = self.prepare(tensordict)
        transition, reward = self._first_transition(batch), self._outcome(batch, "reward")
        _, loss = self.regress("reward_model", *transition, reward)
        return self._reduce(loss.squeeze(-1), batch), {}

    def continuation_loss(self, tensordict: TensorDictBase | Batch) -> LossAndMetrics:
        """The cross-entropy of the continuation model, on the first transition of each window.

        A terminal state ends an episode; a time limit does not.
        """
        batch = self.prepare(tensordict)
        params = getattr(self, "continuation_model_params", None)
        following = self._draw(self.encoder.build_dist_from_params(batch.following[:, 0]))
        logit = self.continuation(*self._first_transition(batch), following, params)
        continues = (~self._outcome(batch, "terminated")).to(logit.dtype)
        loss = F.binary_cross_entropy_with_logits(logit, continues, reduction="none").squeeze(-1)
        return self._reduce(loss, batch), {}

    def classifier_loss(self, tensordict: TensorDictBase | Batch) -> LossAndMetrics:
        """The cross-entropy of the classifier, on the first transition of each window.

        The rows of :meth:`generated_rows` get a next latent from the dynamics (class 0).
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
        metrics = {"classifier_accuracy": masked_mean(correct.to(loss.dtype), batch.mask[:, 0])}
        return self._reduce(loss, batch), metrics

    def generated_rows(self, tensordict: TensorDictBase) -> Tensor:
        """Selects the rows with an imagined next latent for the classifier: a random half.

        It maps latents and actions of the first transitions to a mask ``[B]``. Subclasses may
        override it.
        """
        rows = tensordict.shape[0]
        return torch.randperm(rows, device=tensordict.get(self._latent_key).device) < rows // 2

    def value_loss(self, tensordict: TensorDictBase | Batch) -> LossAndMetrics:
        """The error of all action values.

        The targets are one-step targets of the first transitions, or the lambda-returns of the
        steps of imagined episodes, if the batch has them.
        """
        batch = self.prepare(tensordict).on_imagined()
        if batch.imagined is None:
            latent, action = self._first_transition(batch)
            target = self._td_target(batch)
        else:
            latent, action = batch.imagined["latent"], batch.imagined["action"]
            target = batch.imagined["value_target"]
        values, loss = self.regress("qvalue_network", latent, action, target)
        if batch.imagined is None:
            write_priority(batch.source, self.tensor_keys, values, target)
        loss, mask = loss.mean(-1), batch.mask[:, 0]
        metrics = {"q_value": masked_mean(values, mask), "target_value": masked_mean(target, mask)}
        return self._reduce(loss, batch), detached(metrics)

    def actor_loss(self, tensordict: TensorDictBase | Batch) -> LossAndMetrics:
        """The negated return of imagined rollouts.

        They start at the first observation of each window, or at the latents of imagined episodes,
        if the batch has them.
        """
        batch = self.prepare(tensordict).on_imagined()
        latent, mask = self._starts(batch), batch.mask[:, 0]
        if self.actor_objective == "value":
            value = self.value(latent, self.act(latent, self.actor_params))
            metrics = {"actor_value": masked_mean(value, mask)}
            return self._reduce(-value.squeeze(-1), batch), detached(metrics)
        rollout = self.imagine(latent)
        returns = self.lambda_return(rollout)
        if self.actor_objective == "bound":
            loss = -self.bound(rollout).squeeze(-1)
        else:
            weights = discounts(self.value_estimator.gamma, self.horizon)
            if self.continuation_model is not None:
                weights = weights * survival(rollout["continuation"].detach())[:, :-1]
            loss = -(weights * returns).mean(-2).squeeze(-1)
        metrics = {
            "imagined_reward": masked_mean(rollout["reward"], mask),
            "imagined_log_ratio": masked_mean(rollout["log_ratio"], mask),
            "imagined_value": masked_mean(rollout["next", "value"], mask),
            "imagined_return": masked_mean(returns[:, 0], mask),
        }
        if self.continuation_model is not None:
            metrics["imagined_continuation"] = masked_mean(rollout["continuation"], mask)
        return self._reduce(loss, batch), detached(metrics)

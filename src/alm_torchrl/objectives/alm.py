"""The objective of Aligned Latent Models as one TorchRL loss module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    dispatch,
)
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torch import distributions as D
from torch.nn import functional as F
from torchrl.envs.utils import ExplorationType
from torchrl.objectives import LossModule
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator

from alm_torchrl.objectives.checks import (
    blank,
    check_choice,
    check_horizon,
    check_latents,
    check_networks,
    check_output,
    explained,
    read_windows,
)
from alm_torchrl.objectives.functional import (
    discounts,
    episode_mask,
    kl_divergence,
    log_ratio,
    td_target,
)

__all__ = ["ALMLoss"]

LOSS_KEYS = ("loss_world_model", "loss_reward", "loss_classifier", "loss_value", "loss_actor")


class _Batch(NamedTuple):
    """A checked batch of windows with the target encoder's view of it."""

    windows: TensorDictBase
    """The entries of ``ALMLoss.in_keys``, ``[B, T]``."""
    mask: Tensor
    """Which steps of a window belong to the episode of its first, bool ``[B, T]``."""
    current: TensorDictBase
    """Target-encoder distribution parameters of the first observation, ``[B]``."""
    following: TensorDictBase
    """Target-encoder distribution parameters of the next observations, ``[B, T]``."""


class ALMLoss(LossModule):
    r"""The objective of Aligned Latent Models (Ghugare et al., ICLR 2023, arXiv 2209.08466).

    Encoder, latent dynamics and policy maximise one lower bound on the return; reward, transition
    classifier and action values are fitted beside them. The five losses come out of one call, and
    each gives a gradient to its own networks alone, so that their sum can be minimised with one
    backward pass and one optimiser:

    ================== ========================================= ==================================
    loss               trains                                    lets gradients pass through
    ================== ========================================= ==================================
    loss_world_model   encoder, latent dynamics                  reward, action values
    loss_reward        reward                                    \-
    loss_classifier    classifier                                \-
    loss_value         action values                             \-
    loss_actor         actor                                     latent dynamics, reward,
                                                                 classifier, action values
    ================== ========================================= ==================================

    The input is a batch of windows ``[B, T]`` (see
    :func:`alm_torchrl.data.make_replay_buffer`). The world-model loss reads the whole window; the
    other four read its first transition alone, which must be drawn uniformly. A plain batch of
    transitions ``[B]`` counts as windows of one step, at any horizon. Steps past an episode's end,
    or where ``"validity_mask"`` is false, contribute nothing.

    Deviations from the authors' implementation, each with what restores theirs:

    * A window that ends in a terminal state has no value term: ``bootstrap_terminated=True``.
    * A window cut short by an episode's end counts with the steps it has:
      ``short_windows="drop"``.
    * One batch serves all terms, where theirs draws windows and transitions apart: call the
      per-term methods with batches of your own.
    * All terms are evaluated before any optimiser moves: step after each per-term method.

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

    Keyword Args:
        horizon (int): steps ``K`` imagined for the actor, and the length of the windows.
        consistency_coeff (float): weight ``c`` of the log-ratio in the actor's reward; may be
            assigned during training.
        reduction (str): ``"mean"`` or ``"sum"`` over the batch, or ``"none"`` for losses ``[B]``.
        bootstrap_terminated (bool): whether a window keeps its value term after a terminal state.
        short_windows (str): ``"mask"`` keeps the steps that a window cut short has; ``"drop"``
            leaves such windows out of the world-model loss.

    The discount and lambda of the imagined returns are set by :meth:`make_value_estimator`
    (TD-lambda with 0.99 and 0.95 by default). Targets are moved by
    ``torchrl.objectives.SoftUpdate(loss, tau=0.005)``, built before a checkpoint is loaded.

    Raises:
        ValueError: for modules of the wrong kind or whose keys do not fit together.

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

        Attributes:
            action: the action ``[..., A]``; by default the key that the actor writes.
            reward: the reward ``[..., 1]``, read under ``"next"``.
            done: the end of an episode for any reason, bool ``[..., 1]``, read under ``"next"``.
            terminated: a terminal state, bool ``[..., 1]``, read under ``"next"``.
            validity_mask: which steps of a window hold data, bool ``[B, T]``; optional.
        """

        action: NestedKey = "action"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        validity_mask: NestedKey = "validity_mask"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TDLambda
    deterministic_sampling_mode = ExplorationType.RANDOM
    _schedulable_buffers = frozenset({"consistency_coeff"})
    _loss_mask_key = "validity_mask"

    encoder: ProbabilisticTensorDictSequential
    encoder_params: TensorDictParams
    target_encoder_params: TensorDictParams
    dynamics: ProbabilisticTensorDictSequential
    dynamics_params: TensorDictParams
    target_dynamics_params: TensorDictParams
    reward_model: TensorDictModule
    reward_model_params: TensorDictParams
    target_reward_model_params: TensorDictParams
    classifier: TensorDictModule
    classifier_params: TensorDictParams
    target_classifier_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams
    actor: ProbabilisticTensorDictSequential
    actor_params: TensorDictParams
    target_actor_params: TensorDictParams

    def __init__(
        self,
        encoder: ProbabilisticTensorDictSequential,
        dynamics: ProbabilisticTensorDictSequential,
        reward_model: TensorDictModule,
        classifier: TensorDictModule,
        qvalue_network: TensorDictModule,
        actor: ProbabilisticTensorDictSequential,
        *,
        horizon: int = 3,
        consistency_coeff: float = 0.1,
        reduction: Literal["none", "mean", "sum"] = "mean",
        bootstrap_terminated: bool = False,
        short_windows: Literal["mask", "drop"] = "mask",
    ) -> None:
        super().__init__()
        check_horizon(horizon)
        check_choice("reduction", reduction, ("none", "mean", "sum"))
        check_choice("short_windows", short_windows, ("mask", "drop"))
        networks = {
            "encoder": encoder,
            "dynamics": dynamics,
            "reward_model": reward_model,
            "classifier": classifier,
            "qvalue_network": qvalue_network,
            "actor": actor,
        }
        check_networks(**networks)
        for name, network in networks.items():
            self.convert_to_functional(
                network, name, create_target_params=name in ("encoder", "qvalue_network")
            )
        # Not as an attribute, which warns that nothing updates it yet.
        _share_untrained(self.encoder_params, self._modules["target_encoder_params"])
        self.horizon = horizon
        self.reduction = reduction
        self.bootstrap_terminated = bootstrap_terminated
        self.short_windows = short_windows
        self.register_coeff_buffer("consistency_coeff", float(consistency_coeff))
        self._latent_key = encoder.dist_sample_keys[-1]
        self._next_latent_key = dynamics.dist_sample_keys[-1]
        self._action_key = actor.dist_sample_keys[-1]
        self.set_keys(action=self._action_key)
        self.make_value_estimator()

    # ---------------------------------------------------------------- keys and estimators

    @property
    def in_keys(self) -> list[NestedKey]:
        """What :meth:`forward` reads: observations, action, and the outcome under ``"next"``."""
        keys = self.tensor_keys
        outcome = [*self.encoder.in_keys, keys.reward, keys.done, keys.terminated]
        return [*self.encoder.in_keys, keys.action, *(unravel_key(("next", k)) for k in outcome)]

    @property
    def out_keys(self) -> list[str]:
        """The five losses."""
        return list(LOSS_KEYS)

    def set_keys(self, **kwargs: NestedKey | None) -> None:
        """Renames the entries read from the input; see :class:`ALMLoss._AcceptedKeys`.

        Args:
            **kwargs: new keys by name; ``None`` restores the default. The networks keep the keys
                that they were built with: ``action`` says where the batch holds it.

        Raises:
            ValueError: for a name that is none of the accepted keys.
        """
        if kwargs.get("action", self._action_key) is None:
            kwargs["action"] = self._action_key
        super().set_keys(**kwargs)
        self.loss_mask_key = self.tensor_keys.validity_mask

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams: object
    ) -> ALMLoss:
        """Chooses how imagined returns are estimated, and the discount of all losses.

        Args:
            value_type: ``ValueEstimators.TDLambda`` (the default), ``TD0`` or ``TD1``, or an
                estimator of TorchRL's.
            **hyperparams: such as ``gamma`` (0.99 by default) and ``lmbda`` (0.95).

        Returns:
            The loss itself.

        Raises:
            NotImplementedError: for any other estimator.
        """
        value_type, hyperparams = self._prepare_value_estimator_kwargs(value_type, **hyperparams)
        if value_type is None:
            return self
        if "lmbda" in hyperparams:
            # TorchRL's vectorised form is silently wrong under torch.compile.
            hyperparams.setdefault("vectorized", False)
        dispatch_value_estimator(
            self,
            value_type,
            supported=(ValueEstimators.TDLambda, ValueEstimators.TD0, ValueEstimators.TD1),
            value_network=None,
            **hyperparams,
        )
        if self.value_type is ValueEstimators.TD1:  # always vectorised there
            return self.make_value_estimator(ValueEstimators.TDLambda, lmbda=1.0, **hyperparams)
        return self

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters by the losses that move them.

        ALM clips the gradient norm of each group apart, and may give each its own learning rate.

        Returns:
            ``world_model`` (encoder and dynamics), ``reward`` (reward model and classifier),
            ``value`` and ``actor``.
        """
        members = {
            "world_model": (self.encoder_params, self.dynamics_params),
            "reward": (self.reward_model_params, self.classifier_params),
            "value": (self.qvalue_network_params,),
            "actor": (self.actor_params,),
        }
        return {
            name: [p for params in group for p in params.parameters() if p.requires_grad]
            for name, group in members.items()
        }

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """Does nothing: the estimator reads imagined rollouts, whose keys are the loss's own."""

    # ------------------------------------------------------------------------- the losses

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """All five losses and their metrics from one batch.

        Args:
            tensordict: windows ``[B, T]`` with ``T >= horizon``, or transitions ``[B]``, holding
                :attr:`in_keys`. It is not changed.

        Returns:
            The losses, scalars (``[B]`` with ``reduction="none"``), and detached scalar metrics.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if an entry has the wrong shape or the windows are too short.
        """
        batch = self._prepare(tensordict, steps=self.horizon)
        out: dict[str, Tensor] = {}
        for name in LOSS_KEYS:
            term = getattr(self, "_" + name.removeprefix("loss_") + "_term")
            loss, metrics = term(batch)
            out |= {name: loss, **metrics}
        return TensorDict(out)

    def world_model_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """The world-model loss alone; see :meth:`world_model_rollout` for its terms.

        Args:
            tensordict: as for :meth:`forward`.

        Returns:
            The loss and its metrics.
        """
        return self._world_model_term(self._prepare(tensordict, steps=self.horizon))

    def reward_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared error of the reward model, on the first transition of each window.

        Args:
            tensordict: as for :meth:`forward`, with windows of any length.

        Returns:
            The loss and its metrics.
        """
        return self._reward_term(self._prepare(tensordict, steps=1))

    def classifier_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy of the classifier, on the first transition of each window.

        A random half of the batch has its next latent drawn from the latent dynamics (class 0).

        Args:
            tensordict: as for :meth:`forward`, with windows of any length.

        Returns:
            The loss and its metrics.
        """
        return self._classifier_term(self._prepare(tensordict, steps=1))

    def value_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """The squared temporal-difference error, on the first transition of each window.

        Args:
            tensordict: as for :meth:`forward`, with windows of any length.

        Returns:
            The loss, a mean over the action values, and its metrics.
        """
        return self._value_term(self._prepare(tensordict, steps=1))

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """The negated return of rollouts imagined from the first observation of each window.

        Args:
            tensordict: as for :meth:`forward`, with windows of any length.

        Returns:
            The loss and its metrics.
        """
        return self._actor_term(self._prepare(tensordict, steps=1))

    def _world_model_term(self, batch: _Batch) -> tuple[Tensor, dict[str, Tensor]]:
        rollout = self._world_model_rollout(batch)
        steps = (rollout["kl"] - rollout["reward"]).squeeze(-1) * batch.mask
        loss = steps.sum(-1) - rollout["value"].squeeze(-1)
        mask = batch.mask[:, -1] if self.short_windows == "drop" else batch.mask[:, 0]
        metrics = {
            "kl": _masked_mean(rollout["kl"], batch.mask),
            "prior_entropy": _masked_mean(rollout["prior_entropy"], batch.mask),
            "posterior_entropy": _masked_mean(rollout["posterior_entropy"], batch.mask[:, 0]),
            "latent_spread": rollout["latent"].std(0, correction=0).mean(),
        }
        return self._reduce(loss, mask), _detached(metrics)

    def _reward_term(self, batch: _Batch) -> tuple[Tensor, dict[str, Tensor]]:
        first = self._first_transition(batch)
        predicted = self._output("reward_model", first, self.reward_model_params)
        loss = F.mse_loss(predicted, self._outcome(batch, "reward"), reduction="none").squeeze(-1)
        return self._reduce(loss, batch.mask[:, 0]), {}

    def _classifier_term(self, batch: _Batch) -> tuple[Tensor, dict[str, Tensor]]:
        first = self._first_transition(batch)
        generated = self._generated_rows(first)
        with torch.no_grad():
            imagined = self._draw(self._distribution("dynamics", first, self.dynamics_params))
        encoded = self._draw(self.encoder.build_dist_from_params(batch.following[:, 0]))
        following = torch.where(generated.unsqueeze(-1), imagined, encoded)
        first.set(self._next_latent_key, following)
        logits = self._output("classifier", first, self.classifier_params)
        labels = (~generated).long()
        loss = F.cross_entropy(logits, labels, reduction="none")
        correct = (log_ratio(logits).squeeze(-1) > 0) == labels.bool()
        metrics = {"classifier_accuracy": _masked_mean(correct.to(loss.dtype), batch.mask[:, 0])}
        return self._reduce(loss, batch.mask[:, 0]), metrics

    def _value_term(self, batch: _Batch) -> tuple[Tensor, dict[str, Tensor]]:
        first = self._first_transition(batch)
        with torch.no_grad():
            latent = self._draw(self.encoder.build_dist_from_params(batch.following[:, 0]))
            target = td_target(
                self._outcome(batch, "reward"),
                self._outcome(batch, "terminated"),
                self._value(latent, self._act(latent), self.target_qvalue_network_params),
                self.value_estimator.gamma,
            )
        values = self._output("qvalue_network", first, self.qvalue_network_params)
        loss = (values - target).square().mean(-1)
        mask = batch.mask[:, 0]
        metrics = {
            "q_value": _masked_mean(values, mask),
            "target_value": _masked_mean(target, mask),
        }
        return self._reduce(loss, mask), _detached(metrics)

    def _actor_term(self, batch: _Batch) -> tuple[Tensor, dict[str, Tensor]]:
        latent = self._draw(self.encoder.build_dist_from_params(batch.current))
        rollout = self.imagine(latent)
        returns = self.lambda_return(rollout)
        weights = discounts(self.value_estimator.gamma, self.horizon)
        loss = -(weights * returns).mean(-2).squeeze(-1)
        mask = batch.mask[:, 0]
        metrics = {
            "imagined_reward": _masked_mean(rollout["reward"], mask),
            "imagined_log_ratio": _masked_mean(rollout["log_ratio"], mask),
            "imagined_value": _masked_mean(rollout["next", "value"], mask),
            "imagined_return": _masked_mean(returns[:, 0], mask),
        }
        return self._reduce(loss, mask), _detached(metrics)

    # ------------------------------------------------------------------------ the rollouts

    def world_model_rollout(self, tensordict: TensorDictBase) -> TensorDictBase:
        r"""Runs the latent dynamics along the recorded actions of each window.

        From :math:`z_0 \sim e(s_0)`, every step draws :math:`z_{t+1} \sim m(z_t, a_t)` and
        compares the dynamics with the target encoder's view of what was observed.

        Args:
            tensordict: as for :meth:`forward`.

        Returns:
            ``kl`` and ``reward`` ``[B, T, 1]`` (meaningful where the window is valid), ``value``
            ``[B, 1]`` of the last latent reached, ``latent`` ``[B, T, D]`` and entropies.
        """
        return self._world_model_rollout(self._prepare(tensordict, steps=self.horizon))

    def _world_model_rollout(self, batch: _Batch) -> TensorDictBase:
        actions = batch.windows.get(self.tensor_keys.action)
        posterior = self._distribution("encoder", batch.windows[:, 0], self.encoder_params)
        latent = self._draw(posterior)
        visited, priors = [], []
        for t in range(actions.shape[1]):
            visited.append(latent)
            prior = self._dist_params(
                "dynamics", self._step(latent, actions[:, t]), self.dynamics_params
            )
            priors.append(prior)
            following = self._draw(self.dynamics.build_dist_from_params(prior))
            latent = torch.where(batch.mask[:, t, None], following, latent)
        latents = torch.stack(visited, 1)
        prior = self.dynamics.build_dist_from_params(torch.stack(priors, 1))
        target = self.encoder.build_dist_from_params(batch.following)
        check_latents(prior, target)
        value = self._value(latent, self._act(latent.detach()), self.qvalue_network_params.detach())
        if not self.bootstrap_terminated:
            ends = batch.windows.get(unravel_key(("next", self.tensor_keys.terminated)))
            ended = (ends.squeeze(-1) & batch.mask).any(-1, keepdim=True)
            value = torch.where(ended, torch.zeros_like(value), value)
        step = self._step(latents, actions)
        return TensorDict(
            {
                "latent": latents,
                "kl": kl_divergence(prior, target).unsqueeze(-1),
                "reward": self._output("reward_model", step, self.reward_model_params.detach()),
                "value": value,
                "prior_entropy": prior.entropy().detach(),
                "posterior_entropy": posterior.entropy().detach(),
            },
            batch_size=latents.shape[:1],
        )

    def imagine(self, latent: Tensor, action: Tensor | None = None) -> TensorDictBase:
        r"""Rolls the actor out in the latent dynamics.

        Actions are drawn on detached latents, and detached again where they enter the values, so
        that a gradient reaches the actor through the dynamics, the rewards and the log-ratios.

        Args:
            latent: where to start, ``[B, D]``.
            action: the first action ``[B, A]``; drawn from the actor by default.

        Returns:
            ``latent``, ``action``, ``reward``, ``log_ratio`` and, under ``"next"``, ``latent``,
            ``action`` and ``value``, all ``[B, K, ...]``.
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
        return TensorDict(
            {
                "latent": current.get(self._latent_key),
                "action": current.get(self._action_key),
                "reward": self._output("reward_model", current, self.reward_model_params.detach()),
                "log_ratio": log_ratio(logits),
                "next": {
                    "latent": following,
                    "action": following_action,
                    "value": self._value(
                        following, following_action, self.qvalue_network_params.detach()
                    ),
                },
            },
            batch_size=following.shape[:2],
        )

    def lambda_return(self, rollout: TensorDictBase) -> Tensor:
        r"""The return of an imagined rollout by the loss's value estimator.

        The reward of a step is :math:`r(z_t, a_t) + c \cdot \mathrm{logratio}_t`, and nothing ends
        inside a rollout.

        Args:
            rollout: what :meth:`imagine` returns, ``[B, K]``.

        Returns:
            The returns, ``[B, K, 1]``.
        """
        reward = rollout["reward"] + self.consistency_coeff * rollout["log_ratio"]
        never = torch.zeros_like(reward, dtype=torch.bool)
        outcome = {"reward": reward, "done": never, "terminated": never}
        steps = TensorDict({"next": outcome}, batch_size=rollout.batch_size)
        return self.value_estimator.value_estimate(steps, next_value=rollout["next", "value"])

    # --------------------------------------------------------------------------- networks

    def _output(self, name: str, tensordict: TensorDictBase, params: TensorDictBase) -> Tensor:
        """The output of a deterministic network with the given parameters."""
        network = getattr(self, name)
        with _parametrised(network, params), explained(name, network, tensordict):
            output = network(tensordict.copy()).get(network.out_keys[-1])
        check_output(name, network.out_keys[-1], output, tensordict.batch_size)
        return output

    def _dist_params(
        self, name: str, tensordict: TensorDictBase, params: TensorDictBase
    ) -> TensorDictBase:
        """The parameters of a network's distribution, to be stacked or indexed."""
        network = getattr(self, name)
        with _parametrised(network, params), explained(name, network, tensordict):
            return network.get_dist_params(tensordict.copy()).select(*network.dist_params_keys)

    def _distribution(
        self, name: str, tensordict: TensorDictBase, params: TensorDictBase
    ) -> D.Distribution:
        parameters = self._dist_params(name, tensordict, params)
        return getattr(self, name).build_dist_from_params(parameters)

    def _policy(self, latent: Tensor, params: TensorDictBase) -> D.Distribution:
        state = TensorDict({self._latent_key: latent}, batch_size=latent.shape[:-1])
        return self._distribution("actor", state, params)

    @torch.no_grad()
    def _act(self, latent: Tensor) -> Tensor:
        """An action without a gradient."""
        return self._draw(self._policy(latent, self.actor_params.detach()))

    def _value(self, latent: Tensor, action: Tensor, params: TensorDictBase) -> Tensor:
        """The smallest of the action values, ``[..., 1]``."""
        values = self._output("qvalue_network", self._step(latent, action), params)
        return values.amin(-1, keepdim=True)

    def _step(self, latent: Tensor, action: Tensor) -> TensorDictBase:
        entries = {self._latent_key: latent, self._action_key: action}
        return TensorDict(entries, batch_size=latent.shape[:-1])

    def _draw(self, dist: D.Distribution) -> Tensor:
        """A fresh sample whatever the exploration type outside, unless the loss says otherwise."""
        if self.deterministic_sampling_mode == ExplorationType.RANDOM:
            return dist.rsample()
        return dist.deterministic_sample  # type: ignore[attr-defined]

    def _generated_rows(self, tensordict: TensorDictBase) -> Tensor:
        """Which rows, a random half, the classifier sees with an imagined next latent."""
        rows = tensordict.shape[0]
        return torch.randperm(rows, device=tensordict.get(self._latent_key).device) < rows // 2

    # ------------------------------------------------------------------------------ input

    def _prepare(self, tensordict: TensorDictBase, steps: int) -> _Batch:
        """Checks the input and encodes its observations with the target encoder, in one pass."""
        windows = read_windows(tensordict, self.tensor_keys, self.encoder.in_keys, steps)
        done = windows.get(unravel_key(("next", self.tensor_keys.done))).squeeze(-1)
        mask = episode_mask(done, windows.get(self.tensor_keys.validity_mask, None))
        # What lies past the episode's end may be anything, NaN included, which no product with a
        # mask would take out of the gradient.
        windows = windows.apply(lambda value: blank(value, mask))
        observations = self.encoder.in_keys
        current = windows[:, :1].select(*observations)
        following = windows.get("next").select(*observations)
        with torch.no_grad():
            encoded = self._dist_params(
                "encoder", torch.cat([current, following], 1), self.target_encoder_params
            )
        return _Batch(windows, mask, encoded[:, 0], encoded[:, 1:])

    def _first_transition(self, batch: _Batch) -> TensorDictBase:
        """A latent drawn for the first observation, with its recorded action."""
        latent = self._draw(self.encoder.build_dist_from_params(batch.current))
        return self._step(latent, batch.windows.get(self.tensor_keys.action)[:, 0])

    def _outcome(self, batch: _Batch, name: Literal["reward", "terminated"]) -> Tensor:
        """An entry of the first transition under ``"next"``, ``[B, 1]``."""
        return batch.windows.get(unravel_key(("next", getattr(self.tensor_keys, name))))[:, 0]

    def _reduce(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self._reduce_loss(loss, TensorDict({self.tensor_keys.validity_mask: mask}))


def _share_untrained(source: TensorDictParams, target: Any) -> None:
    """Lets a target read what no gradient moves, such as running statistics, where the source does.

    ``SoftUpdate`` follows trained parameters alone and would leave a copy of these behind.
    """
    for key, value in source.items(True, True):
        if not value.requires_grad:
            target.get(key).data = value.data


@contextmanager
def _parametrised(network: nn.Module, params: TensorDictBase) -> Iterator[None]:
    """Runs a network with other parameters, and gives it its own back whatever happens.

    As a context manager, ``TensorDict.to_module`` leaves them exchanged after an exception.
    """
    own = params.to_module(network, preserve_module_state=False)
    try:
        yield
    finally:
        own.to_module(network, preserve_module_state=False, return_swap=False)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of ``values`` ``[*mask.shape, ...]`` over the entries that the mask keeps."""
    means = values.reshape(*mask.shape, -1).mean(-1)
    return torch.where(mask, means, 0).sum() / mask.sum().clamp_min(1)


def _detached(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in metrics.items()}

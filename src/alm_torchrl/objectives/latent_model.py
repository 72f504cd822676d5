"""The networks of ALMLoss, methods that run them, and rollouts in the latent space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch import distributions as D
from torchrl.envs.utils import ExplorationType
from torchrl.objectives import LossModule
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator, distance_loss

from alm_torchrl.data.transitions import next_key
from alm_torchrl.objectives.checks import (
    check_latents,
    check_networks,
    explain_inputs,
)
from alm_torchrl.objectives.functional import (
    episode_mask,
    k_step_bound,
    kl_divergence,
    lambda_returns,
    log_ratio,
    squared_distance,
)
from alm_torchrl.objectives.options import CHOICES
from alm_torchrl.objectives.parameters import check_shared, match_compiled, parametrized, summary
from alm_torchrl.objectives.windows import (
    check_order,
    is_tracing,
    mask_invalid,
    read_weights,
    read_windows,
)

__all__ = ["Batch", "LatentModelLoss"]

#: Parameters to run a network with; by default its own, without a gradient.
Params: TypeAlias = TensorDictBase | None

_OUTPUT_SIZES = {"reward_model": 1, "classifier": 2, "continuation_model": 1}


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
    source: TensorDictBase | None = None
    """The TensorDict that was read."""


class LatentModelLoss(LossModule):
    """The networks and rollouts of :class:`ALMLoss`, without its losses.

    The loss shares all parameters and buffers with the networks, and ``to`` moves both. It unwraps
    compiled networks, and loads state dicts of compiled and plain networks. Networks named in
    ``averaged`` have a moving average as target.
    """

    deterministic_sampling_mode = ExplorationType.RANDOM
    default_value_estimator = ValueEstimators.TDLambda

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
    continuation_model: TensorDictModule | None
    continuation_model_params: TensorDictParams
    target_continuation_model_params: TensorDictParams

    tensor_keys: Any
    horizon: int
    bootstrap_terminated: bool
    consistency: str
    latent_target: str
    consistency_coeff: Tensor
    start_steps: int
    loss_function: str
    _encoder_losses: dict[str, NestedKey]
    auxiliary_losses: nn.ModuleDict
    _order_checked = False

    def __init__(self, averaged: tuple[str, ...], **networks: Any) -> None:
        super().__init__()
        networks = {
            name: getattr(network, "_orig_mod", network)
            for name, network in networks.items()
            if network is not None
        }
        check_networks(networks)
        self._names = tuple(networks)
        if "continuation_model" not in networks:
            self.continuation_model = None
        for name, network in networks.items():
            self.convert_to_functional(network, name, create_target_params=name in averaged)
        self._share()
        self._latent_key = self.encoder.dist_sample_keys[-1]
        self._next_latent_key = self.dynamics.dist_sample_keys[-1]
        self._action_key = self.actor.dist_sample_keys[-1]

    @property
    def actor_network(self) -> ProbabilisticTensorDictSequential:
        """The actor, by the name that TorchRL's ``Trainer`` looks for."""
        return self.actor

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

    def _share(self) -> None:
        """Takes the current parameters and buffers of the networks."""
        self._shared: list[tuple[dict[str, Any], str, Any]] = []
        for name in self._names:
            network = getattr(self, name)
            params = TensorDict.from_module(network, as_module=True)
            setattr(self, f"{name}_params", params)
            # Attribute access would warn that no target updater is registered yet.
            target: Any = self._modules.get(f"target_{name}_params")
            if target is not None:
                # SoftUpdate averages only trained parameters; the rest, such as running statistics,
                # is shared.
                for key, value in params.items(True, True):
                    if not value.requires_grad:
                        target.get(key).data = value.data
            self._shared += [
                (tensors, key, tensor)
                for module in network.modules()
                for tensors in (module._parameters, module._buffers)
                for key, tensor in tensors.items()
            ]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        match_compiled(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Also moves the networks, with their buffers."""
        super()._apply(fn)
        for name in self._names:
            getattr(self, name)._apply(fn)
        self._share()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Shares the tensors again after a copy or unpickling."""
        super().__setstate__(state)
        self._share()

    def _run(
        self, name: str, inputs: TensorDictBase, params: Params = None, *, all_entries: bool = False
    ) -> Any:
        """Returns the output of a network, or the parameters of its distribution.

        With ``all_entries``, it returns a TensorDict with all outputs.
        """
        network = getattr(self, name)
        params = getattr(self, f"{name}_params").detach() if params is None else params
        try:
            with parametrized(network, params):
                if isinstance(network, ProbabilisticTensorDictSequential):
                    written = network.get_dist_params(inputs.copy())
                    losses = self._encoder_losses.values() if name == "encoder" else ()
                    return written.select(*network.dist_params_keys, *losses)
                written = network(inputs.copy())
        except RuntimeError as error:
            explain_inputs(error, name, network, inputs)
            raise
        output = written.get(network.out_keys[-1])
        expected = (*inputs.batch_size, _OUTPUT_SIZES.get(name, output.shape[-1]))
        if output.shape != expected:
            raise ValueError(
                f"{name} wrote entry {network.out_keys[-1]!r} of shape {tuple(output.shape)}; "
                f"expected {expected}"
            )
        return written if all_entries else output

    def _step(self, latent: Tensor, action: Tensor) -> TensorDictBase:
        entries = {self._latent_key: latent, self._action_key: action}
        return TensorDict(entries, batch_size=latent.shape[:-1])

    def _draw(self, dist: D.Distribution) -> Tensor:
        """Samples in every exploration type; returns the mean in deterministic mode."""
        if self.deterministic_sampling_mode == ExplorationType.RANDOM:
            return dist.rsample()
        return dist.deterministic_sample  # type: ignore[attr-defined]

    @torch.no_grad()
    def _encode(self, observations: TensorDictBase) -> TensorDictBase:
        """Returns the distribution parameters of the target encoder."""
        averaged = self.latent_target == "moving_average"
        return self._run("encoder", observations, self.target_encoder_params if averaged else None)

    def encoding(self, observations: TensorDictBase) -> D.Distribution:
        """The target encoder's distribution over the latent, without a gradient."""
        parameters = self._encode(observations.select(*self.encoder.in_keys))
        return self.encoder.build_dist_from_params(parameters)

    def encode(self, observations: TensorDictBase) -> Tensor:
        """A latent sampled from :meth:`encoding`, ``[..., D]``."""
        return self._draw(self.encoding(observations))

    def next(
        self, latent: Tensor, action: Tensor, params: Params = None
    ) -> tuple[Tensor, TensorDictBase]:
        """A next latent ``[..., D]`` sampled from the dynamics, and its distribution parameters.

        In this and the following methods, only ``params`` receive a gradient.
        """
        prior = self._run("dynamics", self._step(latent, action), params)
        return self._draw(self.dynamics.build_dist_from_params(prior)), prior

    def reward(self, latent: Tensor, action: Tensor, params: Params = None) -> Tensor:
        """The predicted reward, ``[..., 1]``."""
        return self._run("reward_model", self._step(latent, action), params)

    def classify(
        self, latent: Tensor, action: Tensor, next_latent: Tensor, params: Params = None
    ) -> Tensor:
        """The classifier's logits ``[..., 2]``; class 1 is an encoded next latent."""
        step = self._step(latent, action).set(self._next_latent_key, next_latent)
        return self._run("classifier", step, params)

    def continuation(self, latent: Tensor, action: Tensor, params: Params = None) -> Tensor:
        """The logit of the probability that the step does not terminate, ``[..., 1]``."""
        if self.continuation_model is None:
            raise ValueError("cannot predict terminations; give ALMLoss a continuation_model")
        return self._run("continuation_model", self._step(latent, action), params)

    def action_values(self, latent: Tensor, action: Tensor, params: Params = None) -> Tensor:
        """The action values of all networks in the ensemble, ``[..., N]``."""
        return self._run("qvalue_network", self._step(latent, action), params)

    def regress(
        self, name: str, latent: Tensor, action: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The predictions ``[..., N]`` of a trained network, and their losses ``[..., N]``.

        The loss is the ``loss_function`` of prediction and target ``[..., 1]``, or the cross-entropy
        of a network with a :class:`~alm_torchrl.modules.TwoHot` as ``two_hot`` and logits as first
        output.
        """
        params = getattr(self, f"{name}_params")
        written = self._run(name, self._step(latent, action), params, all_entries=True)
        network = getattr(self, name)
        predicted = written.get(network.out_keys[-1])
        two_hot = getattr(network, "two_hot", None)
        if two_hot is None:
            target = target.expand_as(predicted)
            return predicted, distance_loss(predicted, target, self.loss_function)
        return predicted, two_hot.loss(written.get(network.out_keys[0]), target)

    def value(self, latent: Tensor, action: Tensor, params: Params = None) -> Tensor:
        """The smallest of the action values, ``[..., 1]``."""
        values = self._run("qvalue_network", self._step(latent, action), params)
        return values.amin(-1, keepdim=True)

    def act(self, latent: Tensor, params: Params = None) -> Tensor:
        """An action sampled from the actor, ``[..., A]``."""
        state = TensorDict({self._latent_key: latent}, batch_size=latent.shape[:-1])
        parameters = self._run("actor", state, params)
        return self._draw(self.actor.build_dist_from_params(parameters))

    def _first_transition(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A latent sampled for the first observation, and the recorded action."""
        latent = self._draw(self.encoder.build_dist_from_params(batch.current))
        return latent, batch.windows.get(self.tensor_keys.action)[:, 0]

    def _outcome(self, batch: Batch, name: Literal["reward", "terminated"]) -> Tensor:
        """An entry under ``"next"`` of the first transition, ``[B, 1]``."""
        return batch.windows.get(next_key(getattr(self.tensor_keys, name)))[:, 0]

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
        if len(windows[0]) < steps and not self._order_checked and not is_tracing(done):
            check_order(tensordict.get("index", None), windows, self.encoder.in_keys[0], done)
            self._order_checked = True
        mask = episode_mask(done, windows.get(keys.validity_mask, None))
        # Entries after the episode may be NaN; masking only the loss would give NaN gradients.
        windows = windows.apply(lambda value: mask_invalid(value, mask))
        entries = (windows[:, :1], windows.get("next"))
        encoded = self._encode(torch.cat([e.select(*self.encoder.in_keys) for e in entries], 1))
        return Batch(windows, mask, encoded[:, 0], encoded[:, 1:], None, weight, tensordict)

    def world_model_rollout(self, tensordict: TensorDictBase | Batch) -> TensorDictBase:
        r"""Runs the latent dynamics along the recorded actions of each window.

        From :math:`z_0 \sim e(s_0)`, every step samples :math:`z_{t+1} \sim m(z_t, a_t)` and
        compares the dynamics with the target encoder's distribution.

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
        latents, priors = [self._draw(posterior)], []
        for t in range(actions.shape[1]):
            following, prior = self.next(latents[-1], actions[:, t], self.dynamics_params)
            priors.append(prior)
            latents.append(torch.where(batch.mask[:, t, None], following, latents[-1]))
        prior = self.dynamics.build_dist_from_params(torch.stack(priors, 1))
        parameters = batch.following
        if self.latent_target == "online":
            observations = batch.windows.get("next").select(*self.encoder.in_keys)
            parameters = self._run("encoder", observations, self.encoder_params)
        target = self.encoder.build_dist_from_params(parameters)
        check_latents(prior, target)
        latent, following = torch.stack(latents[:-1], 1), torch.stack(latents[1:], 1)
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
    def roll_on(self, latent: Tensor) -> Tensor:
        r"""Advances latents ``[B, D]`` by up to ``start_steps`` steps of the actor.

        The number of steps is uniform in :math:`\{0, \dots, N\}` for each row. A row stops early
        where the continuation model predicts a termination.
        """
        steps = torch.randint(self.start_steps + 1, latent.shape[:1], device=latent.device)
        moving = torch.ones_like(steps, dtype=torch.bool)
        for t in range(self.start_steps):
            action = self.act(latent)
            moving = moving & (steps > t)
            if self.continuation_model is not None:
                continues = self.continuation(latent, action).sigmoid() > 0.5
                moving = moving & continues.squeeze(-1)
            following, _ = self.next(latent, action)
            latent = torch.where(moving.unsqueeze(-1), following, latent)
        return latent

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
            rollout["continuation"] = self.continuation(current, current_action).sigmoid()
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

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """Does nothing: the estimator reads imagined rollouts, whose keys are fixed."""

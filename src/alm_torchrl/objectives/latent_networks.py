"""The networks of ALMLoss and the methods that run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torch import distributions as D
from torchrl.envs.utils import ExplorationType
from torchrl.objectives import LossModule
from torchrl.objectives.utils import distance_loss

from alm_torchrl.distributions import full_precision
from alm_torchrl.objectives.checks import check_networks, explain_inputs
from alm_torchrl.objectives.parameters import Places, holding, match_compiled, places

#: Parameters to run a network with; by default its own, without a gradient.
Params: TypeAlias = TensorDictBase | None

_OUTPUT_SIZES = {"reward_model": 1, "classifier": 2, "continuation_model": 1}


class LatentNetworks(LossModule):
    """The networks of :class:`ALMLoss`.

    The loss shares all parameters and buffers with the networks, and ``to`` moves both. It unwraps
    compiled networks, and loads state dicts of compiled and plain networks. Networks named in
    ``averaged`` have a moving average as target.
    """

    deterministic_sampling_mode = ExplorationType.RANDOM

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

    latent_target: str
    loss_function: str
    _encoder_losses: dict[str, NestedKey]

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

    def _share(self) -> None:
        """Takes the current parameters and buffers of the networks."""
        self._shared: list[tuple[dict[str, Any], str, Any]] = []
        self._places: dict[str, Places] = {}
        for name in self._names:
            network = getattr(self, name)
            params = TensorDict.from_module(network, as_module=True)
            if not isinstance(params, TensorDictParams):  # a network without any tensor
                params = TensorDictParams(params)
            setattr(self, f"{name}_params", params)
            # Attribute access would warn that no target updater is registered yet.
            target: Any = self._modules.get(f"target_{name}_params")
            if target is not None:
                # SoftUpdate averages only trained parameters; the rest, such as running statistics,
                # is shared.
                for key, value in params.items(True, True):
                    if not value.requires_grad:
                        target.get(key).data = value.data
            self._places[name] = places(network)
            self._shared += [
                (tensors, key, tensors[key]) for tensors, key in self._places[name].values()
            ]

    def own_tensor(self, name: str, key: NestedKey) -> Tensor:
        """The parameter or buffer of a network, by its key in the network's TensorDict."""
        holder, entry = self._places[name][unravel_key(key)]
        return holder[entry]

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
        if params is None:
            own = getattr(self, f"{name}_params").items(True, True)
            tensors = {key: tensor.detach() for key, tensor in own}
        else:
            tensors = dict(params.items(True, True))
        try:
            with holding(self._places[name], tensors):
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

    def continuation(
        self, latent: Tensor, action: Tensor, next_latent: Tensor, params: Params = None
    ) -> Tensor:
        """The logit of the probability that the step does not terminate, ``[..., 1]``."""
        if self.continuation_model is None:
            raise ValueError("cannot predict terminations; give ALMLoss a continuation_model")
        step = self._step(latent, action).set(self._next_latent_key, next_latent)
        return full_precision(self._run("continuation_model", step, params))

    def action_values(self, latent: Tensor, action: Tensor, params: Params = None) -> Tensor:
        """The action values of all networks in the ensemble, ``[..., N]``."""
        return self._run("qvalue_network", self._step(latent, action), params)

    def regress(
        self, name: str, latent: Tensor, action: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The predictions ``[..., N]`` of a trained network, and their losses ``[..., N]``.

        The loss is the ``loss_function`` of prediction and target ``[..., 1]``. For a network with
        a :class:`~alm_torchrl.modules.TwoHot` as ``two_hot`` and logits as first output, it is the
        cross-entropy.
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

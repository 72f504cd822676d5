"""The networks of the objective, each run with the parameters that a term asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torch import distributions as D
from torchrl.envs.utils import ExplorationType
from torchrl.objectives import LossModule

from alm_torchrl.objectives.checks import check_networks, check_output, explained

__all__ = ["ComponentLoss", "match_compiled", "parametrized"]


class ComponentLoss(LossModule):
    """A loss on the networks, without its terms.

    It shares all their parameters and buffers. ``to`` moves the networks along, and a copy of the
    loss shares with its own copies of them. Networks that ``torch.compile`` wraps are taken out, to
    be compiled as part of the loss; a state dict of either kind is loaded into the other.

    Args:
        targets: the networks that have targets, by name.
        **networks: encoder, dynamics, reward model, classifier, action values and actor by name,
            and the continuation model where there is one.

    Raises:
        ValueError: for modules of the wrong kind or whose keys do not fit together.
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

    def __init__(
        self,
        *,
        targets: tuple[str, ...],
        encoder: ProbabilisticTensorDictSequential,
        dynamics: ProbabilisticTensorDictSequential,
        reward_model: TensorDictModule,
        classifier: TensorDictModule,
        qvalue_network: TensorDictModule,
        actor: ProbabilisticTensorDictSequential,
        continuation_model: TensorDictModule | None = None,
    ) -> None:
        super().__init__()
        networks: dict[str, Any] = {
            "encoder": encoder,
            "dynamics": dynamics,
            "reward_model": reward_model,
            "classifier": classifier,
            "qvalue_network": qvalue_network,
            "actor": actor,
        }
        if continuation_model is None:
            self.continuation_model = None
        else:
            networks["continuation_model"] = continuation_model
        networks = {name: getattr(net, "_orig_mod", net) for name, net in networks.items()}
        check_networks(**networks)
        self._names = tuple(networks)
        for name, network in networks.items():
            self.convert_to_functional(network, name, create_target_params=name in targets)
        self._share()
        encoder, dynamics, actor = self.encoder, self.dynamics, self.actor
        self._latent_key = encoder.dist_sample_keys[-1]
        self._next_latent_key = dynamics.dist_sample_keys[-1]
        self._action_key = actor.dist_sample_keys[-1]

    def _share(self) -> None:
        """Takes the networks' own parameters and buffers, wherever they are now."""
        networks = {name: getattr(self, name) for name in self._names}
        for name, network in networks.items():
            params = TensorDict.from_module(network, as_module=True)
            setattr(self, f"{name}_params", params)
            # not as an attribute, which warns that nothing updates it yet
            target = self._modules.get(f"target_{name}_params")
            if target is not None:
                _share_untrained(params, target)
        self._shared = [
            (tensors, key, tensor)
            for network in networks.values()
            for module in network.modules()
            for tensors in (module._parameters, module._buffers)
            for key, tensor in tensors.items()
        ]

    def _check_sharing(self) -> None:
        """Raises if a network has other tensors than those that the loss shares with it."""
        for tensors, key, tensor in self._shared:
            own = tensors.get(key)
            if own is tensor or (own is not None and own.data_ptr() == tensor.data_ptr()):
                continue
            raise RuntimeError(
                "a network was moved or given other tensors after the loss was built, which no "
                "longer shares its noise schedule and statistics: move the loss (its networks "
                "move along) as in loss.to(device), or build the loss after the move"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        match_compiled(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Moves the networks along, whose buffers would be left behind."""
        super()._apply(fn)
        for name in self._names:
            getattr(self, name)._apply(fn)
        self._share()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Shares what a copy or a pickle holds twice."""
        super().__setstate__(state)
        self._share()

    def _output(self, name: str, tensordict: TensorDictBase, params: TensorDictBase) -> Tensor:
        """The output of a deterministic network with the given parameters."""
        network = getattr(self, name)
        with parametrized(network, params), explained(name, network, tensordict):
            output = network(tensordict.copy()).get(network.out_keys[-1])
        check_output(name, network.out_keys[-1], output, tensordict.batch_size)
        return output

    def _dist_params(
        self, name: str, tensordict: TensorDictBase, params: TensorDictBase
    ) -> TensorDictBase:
        """The parameters of a network's distribution, to be stacked or indexed."""
        network = getattr(self, name)
        with parametrized(network, params), explained(name, network, tensordict):
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


def match_compiled(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Renames the entries of compiled networks as a module has them, or as it has not.

    ``torch.compile`` puts ``_orig_mod.`` before the names in the module that it wraps.

    Args:
        module: what the entries are loaded into.
        state_dict: the entries, changed in place.
        prefix: of the names of the module's own.
    """
    names = {name.replace("_orig_mod.", ""): prefix + name for name in module.state_dict()}
    for name in [name for name in state_dict if name.startswith(prefix)]:
        wanted = names.get(name.removeprefix(prefix).replace("_orig_mod.", ""), name)
        if wanted != name:
            state_dict[wanted] = state_dict.pop(name)


def _share_untrained(source: TensorDictParams, target: Any) -> None:
    """Lets a target read what no gradient moves, such as running statistics, where the source does.

    ``SoftUpdate`` follows trained parameters alone and would leave a copy of these behind.
    """
    for key, value in source.items(True, True):
        if not value.requires_grad:
            target.get(key).data = value.data


@contextmanager
def parametrized(network: nn.Module, params: TensorDictBase) -> Iterator[None]:
    """Runs a network with other parameters, and gives it its own back whatever happens.

    As a context manager, ``TensorDict.to_module`` leaves them exchanged after an exception.
    """
    own = params.to_module(network, preserve_module_state=False)
    try:
        yield
    finally:
        own.to_module(network, preserve_module_state=False, return_swap=False)

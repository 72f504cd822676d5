"""Several seeds trained together by one update over stacked parameters.

Each seed has its own networks, environments, share of the replay buffer, random numbers, gradient
norms and curve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate

from alm_torchrl.agent import ALMAgent
from alm_torchrl.modules import NoiseSchedule
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.objectives.parameters import parametrized


class StackedLoss(nn.Module):
    """The objectives of ``S`` seeds as one, with parameters ``[S, ...]``.

    The parameters of the losses and of their agents become views of the stacked parameters, so the
    agents always have the newest weights.

    Args:
        losses: one for each seed, on one device, of the same sizes. The settings of the first loss
            (horizon, estimator, coefficient, noise) apply to all.
    """

    def __init__(self, losses: Sequence[ALMLoss]) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)
        networks = [_networks(loss) for loss in losses]
        shapes = [{key: leaf.shape for key, leaf in n.items(True, True)} for n in networks]
        if not losses or any(shape != shapes[0] for shape in shapes):
            raise ValueError("expected one or more losses of the same sizes")
        self._stack: TensorDictBase = TensorDict(batch_size=[len(losses)])
        for key in shapes[0]:
            leaves = [network[key] for network in networks]
            stacked = torch.stack([leaf.detach() for leaf in leaves])
            self._stack[key] = stacked.requires_grad_(leaves[0].requires_grad)
        self._share()

    @property
    def out_keys(self) -> list[str]:
        """Keys of the losses."""
        return self._first.out_keys

    @property
    def _first(self) -> ALMLoss:
        return self.losses[0]  # type: ignore[return-value]

    def parameter_groups(self) -> dict[str, list[Tensor]]:
        """Returns the stacked parameters in the groups of :meth:`ALMLoss.parameter_groups`."""
        ids = {id(leaf): key for key, leaf in _networks(self._first).items(True, True)}
        return {
            name: [self._stack[ids[id(p)]] for p in group]
            for name, group in self._first.parameter_groups().items()
        }

    @staticmethod
    def clip_grad_norm_(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
        """Clips the gradient norm of each seed; returns the norms before clipping, ``[S]``."""
        grads = [p.grad.view(len(p), -1) for p in parameters if p.grad is not None]
        if not grads:  # the loss of these parameters is not selected
            return parameters[0].new_zeros(len(parameters[0]))
        norms = torch.stack([grad.norm(dim=1) for grad in grads]).norm(dim=0)
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0).unsqueeze(1)
        torch._foreach_mul_(grads, [factors] * len(grads))
        return norms

    def forward(self, windows: TensorDictBase) -> TensorDictBase:
        """Computes losses and metrics ``[S]`` from a batch for each seed, ``[S, B, T]``."""
        return torch.vmap(self._one, randomness="different")(self._stack, windows)

    def imagine_episodes(self, windows: TensorDictBase, steps: int) -> TensorDictBase:
        """Plays episodes for each seed, ``[S, B, steps]``."""
        play = partial(self._one, method="imagine_episodes", steps=steps)
        return torch.vmap(play, randomness="different")(self._stack, windows)

    def _one(
        self,
        parameters: TensorDictBase,
        windows: TensorDictBase,
        method: str = "forward",
        **options: Any,
    ) -> TensorDictBase:
        with parametrized(self._first, parameters):
            return getattr(self._first, method)(windows, **options)

    def _share(self) -> None:
        """Makes the parameters of each seed views of the stacked ones."""
        for key in list(self._stack.keys(True, True)):
            # The target encoder has the buffers of the encoder, also after copying and moving.
            if key[0] == "target_encoder_params" and not self._stack[_trained(key)].requires_grad:
                self._stack[key] = self._stack[_trained(key)]
        losses = losses_of(self)
        networks = [_networks(loss) for loss in losses]
        for key, stacked in self._stack.items(True, True):
            for loss, network, view in zip(
                losses, networks, stacked.detach().unbind(), strict=True
            ):
                network[key].data = view
                if key[0] == "encoder_params":  # TensorDictParams wraps buffers in other tensors
                    loss.own_tensor("encoder", key[1:]).data = view

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StackedLoss:
        """Also moves the stacked parameters, in place, because an optimizer refers to them."""
        super()._apply(fn, recurse)
        for stacked in self._stack.values(True, True):
            stacked.data = fn(stacked.data)
        self._share()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Shares the parameters again after copying or unpickling, which duplicates them."""
        super().__setstate__(state)
        self._stack = self._stack.apply(lambda t: t.detach().requires_grad_(t.requires_grad))
        self._share()


class TargetUpdate:
    """TorchRL's ``SoftUpdate`` of the target networks, for one seed or several."""

    def __init__(self, loss: ALMLoss | StackedLoss, tau: float) -> None:
        self._updates = [SoftUpdate(one, tau=tau) for one in losses_of(loss)]

    def step(self) -> None:
        """Updates the target networks in place."""
        for update in self._updates:
            update.step()


class StackedAgent(nn.Module):
    """The agents of ``S`` seeds as one that acts in a multiple of ``S`` environments."""

    def __init__(self, agents: Sequence[ALMAgent]) -> None:
        super().__init__()
        self.agents = nn.ModuleList(agents)

    @property
    def noise(self) -> StackedNoise:
        """The noise schedules of all seeds."""
        return StackedNoise([agent.noise for agent in agents_of(self)])

    def update_statistics(self, data: TensorDictBase) -> None:
        """Updates the statistics of each seed with its share of the data ``[S * E, ...]``."""
        shares = data.reshape(len(self.agents), -1)
        for agent, share in zip(agents_of(self), shares, strict=True):
            agent.update_statistics(share)

    def policy(self) -> TensorDictModuleBase:
        """Returns a policy for environments ``[S * E]``, ``E`` consecutive ones for each seed."""
        return StackedPolicy([agent.policy() for agent in agents_of(self)])


class StackedNoise:
    """Noise schedules that advance together."""

    def __init__(self, schedules: Sequence[NoiseSchedule]) -> None:
        self._schedules = schedules

    @property
    def scale(self) -> Tensor:
        """The scale, which is equal in all schedules."""
        return self._schedules[0].scale

    def advance(self, steps: int = 1) -> None:
        """Advances all schedules."""
        for schedule in self._schedules:
            schedule.advance(steps)


class StackedPolicy(TensorDictModuleBase):
    """Policies of the same sizes, each of which acts in its share of the environments."""

    def __init__(self, policies: Sequence[TensorDictModuleBase]) -> None:
        super().__init__()
        self.policies = nn.ModuleList(policies)
        self.in_keys, self.out_keys = policies[0].in_keys, policies[0].out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the actions of all seeds, ``[S * E, A]``."""
        shares = tensordict.select(*self.in_keys).reshape(len(self.policies), -1)
        parameters = torch.stack([TensorDict.from_module(policy) for policy in self.policies])
        out = torch.vmap(self._one, randomness="different")(parameters, shares)
        return tensordict.update(out.select(*self.out_keys).reshape(tensordict.shape))

    def _one(self, parameters: TensorDictBase, share: TensorDictBase) -> TensorDictBase:
        with parametrized(self.policies[0], parameters):
            return self.policies[0](share)


def stack_seeds(
    agents: Sequence[ALMAgent], losses: Sequence[ALMLoss]
) -> tuple[ALMAgent | StackedAgent, ALMLoss | StackedLoss]:
    """Stacks the agents and losses of several seeds; returns a single pair unchanged."""
    if len(agents) == 1:
        return agents[0], losses[0]
    return StackedAgent(agents), StackedLoss(losses)


def losses_of(loss: ALMLoss | StackedLoss) -> list[ALMLoss]:
    """Returns the objective of each seed."""
    return cast("list[ALMLoss]", [*loss.losses] if isinstance(loss, StackedLoss) else [loss])


def agents_of(agent: ALMAgent | StackedAgent) -> list[ALMAgent]:
    """Returns the agent of each seed."""
    return cast("list[ALMAgent]", [*agent.agents] if isinstance(agent, StackedAgent) else [agent])


def _networks(loss: ALMLoss) -> TensorDictBase:
    """Returns parameters, target parameters and the encoder's buffers by their names."""
    everything = TensorDict.from_module(loss)
    keys = [
        key
        for key, leaf in everything.items(True, True)
        if isinstance(leaf, nn.Parameter) or key[0].startswith(("target_", "encoder_params"))
    ]
    return everything.select(*keys)


def _trained(key: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the key of what a target follows."""
    return (key[0].removeprefix("target_"), *key[1:])

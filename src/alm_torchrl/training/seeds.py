"""Several seeds trained at once: their parameters are stacked, and one update moves them all.

An update of small networks hardly fills a GPU, so that several side by side cost far less than one
after the other. Nothing passes between the seeds: every one has its own networks, environment,
lane of the replay buffer, random numbers, gradient norms and curve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate

from alm_torchrl.agent import ALMAgent
from alm_torchrl.modules.latent import keeps_statistics
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.objectives.components import parametrized

__all__ = [
    "StackedAgent",
    "StackedLoss",
    "StackedNoise",
    "StackedPolicy",
    "StackedSoftUpdate",
    "stack_seeds",
]


class StackedLoss(nn.Module):
    """The objectives of ``S`` seeds as one, over parameters ``[S, ...]``.

    The parameters of the given losses (and so of the agents that they were built on) become views
    of the stacked ones: what is learnt here is at once what those agents act with and save.

    Args:
        losses: one for each seed, on one device and of the same sizes. The first one's settings
            (horizon, estimator, coefficient, noise) hold for all.

    Raises:
        ValueError: for networks of different sizes, no loss at all, or an encoder that keeps
            running statistics, which are not stacked.
    """

    def __init__(self, losses: Sequence[ALMLoss]) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)
        networks = [_networks(loss) for loss in losses]
        shapes = [{key: leaf.shape for key, leaf in n.items(True, True)} for n in networks]
        if not losses or any(shape != shapes[0] for shape in shapes):
            raise ValueError("seeds are stacked from one or more losses of the same sizes")
        if keeps_statistics(losses[0].encoder):
            raise ValueError(
                "an encoder that keeps running statistics is trained one seed at a time: take "
                "num_seeds=1, or build it with normalize=False"
            )
        self._stack: TensorDictBase = TensorDict(batch_size=[len(losses)])
        for key in shapes[0]:
            leaves = [network[key] for network in networks]
            stacked = torch.stack([leaf.detach() for leaf in leaves])
            self._stack[key] = stacked.requires_grad_(leaves[0].requires_grad)
        self._share()

    @property
    def out_keys(self) -> list[str]:
        """The five losses."""
        return self._first.out_keys

    @property
    def _first(self) -> ALMLoss:
        return self.losses[0]  # type: ignore[return-value]

    def parameter_groups(self) -> dict[str, list[Tensor]]:
        """The stacked parameters, as :meth:`ALMLoss.parameter_groups` has them for one seed."""
        ids = {id(leaf): key for key, leaf in _networks(self._first).items(True, True)}
        return {
            name: [self._stack[ids[id(p)]] for p in group]
            for name, group in self._first.parameter_groups().items()
        }

    def forward(self, windows: TensorDictBase) -> TensorDictBase:
        """All losses of all seeds.

        Args:
            windows: one batch for each seed, ``[S, B, T]``.

        Returns:
            Losses and metrics, ``[S]``.
        """
        return torch.vmap(self._one, randomness="different")(self._stack, windows)

    def _one(self, parameters: TensorDictBase, windows: TensorDictBase) -> TensorDictBase:
        with parametrized(self._first, parameters):
            return self._first(windows)

    def _share(self) -> None:
        """Makes the parameters of each seed views of the stacked ones."""
        networks = [_networks(cast("ALMLoss", loss)) for loss in self.losses]
        for key, stacked in self._stack.items(True, True):
            for network, view in zip(networks, stacked.detach().unbind(), strict=True):
                network[key].data = view

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StackedLoss:
        """Moves the stacked parameters too, in place, since an optimizer holds them."""
        super()._apply(fn, recurse)
        for stacked in self._stack.values(True, True):
            stacked.data = fn(stacked.data)
        self._share()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Shares what a copy or a pickle holds twice, and makes leaves of it again."""
        super().__setstate__(state)
        self._stack = self._stack.apply(lambda t: t.detach().requires_grad_(t.requires_grad))
        self._share()


class StackedSoftUpdate:
    """TorchRL's moving averages of the targets of all seeds.

    Args:
        loss: the stacked objectives.
        tau: weight of the new value.
    """

    def __init__(self, loss: StackedLoss, tau: float) -> None:
        self._updates = [SoftUpdate(one, tau=tau) for one in loss.losses]

    def step(self) -> None:
        """One step of the averages, in place."""
        for update in self._updates:
            update.step()


class StackedAgent(nn.Module):
    """The agents of ``S`` seeds as one that acts in ``S`` (or a multiple of ``S``) environments.

    Args:
        agents: one for each seed, whose losses have been stacked.
    """

    def __init__(self, agents: Sequence[ALMAgent]) -> None:
        super().__init__()
        self.agents = nn.ModuleList(agents)

    @property
    def noise(self) -> StackedNoise:
        """The schedules of the action noise, which move together."""
        return StackedNoise([agent.noise for agent in self.agents])

    def policy(self) -> StackedPolicy:
        """A policy over environments ``[S * E]``, the first ``E`` of which are the first seed's."""
        return StackedPolicy([cast("ALMAgent", agent).policy() for agent in self.agents])


class StackedNoise:
    """Schedules that move together."""

    def __init__(self, schedules: Sequence[Any]) -> None:
        self._schedules = schedules

    @property
    def scale(self) -> Tensor:
        """The scale that all of them have."""
        return self._schedules[0].scale

    def advance(self, steps: int = 1) -> None:
        """Moves all of them on."""
        for schedule in self._schedules:
            schedule.advance(steps)


class StackedPolicy(TensorDictModuleBase):
    """Policies that each act in their own share of the environments.

    Args:
        policies: one for each seed, of the same sizes.
    """

    def __init__(self, policies: Sequence[TensorDictModuleBase]) -> None:
        super().__init__()
        self.policies = nn.ModuleList(policies)
        self.in_keys = policies[0].in_keys
        self.out_keys = policies[0].out_keys

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
    """Stacks the agents and losses of several seeds; those of one are returned as they are.

    Args:
        agents: one for each seed.
        losses: the objective of each agent.

    Returns:
        The agent and the loss for :class:`~alm_torchrl.training.ALMModule`.

    Raises:
        ValueError: for networks of different sizes, or no agent at all.
    """
    if len(agents) == 1:
        return agents[0], losses[0]
    return StackedAgent(agents), StackedLoss(losses)


def _networks(loss: ALMLoss) -> TensorDictBase:
    """Parameters and target parameters by the names that they have in the loss."""
    everything = TensorDict.from_module(loss)
    keys = [
        key
        for key, leaf in everything.items(True, True)
        if isinstance(leaf, nn.Parameter) or key[0].startswith("target_")
    ]
    return everything.select(*keys)

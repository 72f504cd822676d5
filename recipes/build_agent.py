"""Builds networks and losses from the options."""

from __future__ import annotations

from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn
from torchrl.envs import EnvBase
from torchrl.objectives.utils import ValueEstimators

from alm_torchrl.agent import ALMAgent
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import StackedLoss
from recipes.config import Config, pick


def make_networks(
    config: Config, env: EnvBase, network_kwargs: dict[str, dict[str, Any]]
) -> dict[str, nn.Module]:
    """Builds the encoder, and the networks that replace those of the package."""
    options = config.agent
    networks = {}
    for name, target in {"encoder": config.encoder.build, **options.networks}.items():
        spec = env.observation_spec_unbatched if name == "encoder" else env.action_spec_unbatched
        width = options.dynamics_hidden_dim if name == "dynamics" else options.hidden_dim
        arguments = {"latent_dim": options.latent_dim, "hidden_dim": width}
        build = instantiate(target, _partial_=True)
        networks[name] = build(spec, **arguments | network_kwargs.get(name, {}))
    return networks


def make_agent(
    config: Config, env: EnvBase, device: torch.device, seed: int
) -> tuple[ALMAgent, ALMLoss]:
    """Builds the networks of a seed and their loss."""
    torch.manual_seed(seed)
    kwargs = instantiate(config.agent.network_kwargs, _convert_="all")
    networks = make_networks(config, env, kwargs)
    options = vars(config.agent) | {"network_kwargs": kwargs}
    del options["latent_dim"], options["networks"]
    agent = ALMAgent.from_env(env, **networks, **options).to(device)
    objective = dict(vars(config.objective))
    estimator = {name: objective.pop(name) for name in ("gamma", "lmbda")}
    auxiliary = objective.pop("auxiliary_losses")
    auxiliary = {
        name: target if isinstance(target, str) else instantiate(target).to(device)
        for name, target in auxiliary.items()
    }
    loss = ALMLoss(**agent.networks(), **objective, auxiliary_losses=auxiliary)
    loss.make_value_estimator(ValueEstimators.TDLambda, **estimator)
    return agent, loss


def learning_rates(config: Config, loss: ALMLoss | StackedLoss) -> dict[str, float]:
    """Returns the learning rate of each parameter group."""
    options = config.learning_rates
    rates = pick(options, *loss.parameter_groups())
    split = pick(options, "encoder", "dynamics")
    if any(rate is not None for rate in split.values()):
        shared = rates.pop("world_model")
        rates |= {name: shared if rate is None else rate for name, rate in split.items()}
    return rates

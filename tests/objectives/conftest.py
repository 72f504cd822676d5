"""Small networks, losses and batches for the tests of the objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs.utils import ExplorationType
from torchrl.objectives import SoftUpdate

from alm_torchrl.modules import (
    Actor,
    LatentDynamics,
    MLPEncoder,
    NoiseSchedule,
    QValueEnsemble,
    RewardModel,
    TransitionClassifier,
)
from alm_torchrl.objectives import ALMLoss

OBS, ACT, LATENT, HIDDEN = 5, 2, 4, 8


def build_networks(
    observation_key: Any = "observation", latent_key: Any = "latent", action_key: Any = "action"
) -> dict[str, nn.Module]:
    keys = {"latent_key": latent_key, "action_key": action_key}
    actor = Actor(LATENT, [-1.0] * ACT, [1.0] * ACT, HIDDEN, noise=NoiseSchedule(0.5, 0.1), **keys)
    return {
        "encoder": MLPEncoder(
            OBS, LATENT, HIDDEN, in_keys=[observation_key], latent_key=latent_key
        ),
        "dynamics": LatentDynamics(LATENT, ACT, HIDDEN, **keys),
        "reward_model": RewardModel(LATENT, ACT, HIDDEN, **keys),
        "classifier": TransitionClassifier(LATENT, ACT, HIDDEN, **keys),
        "qvalue_network": QValueEnsemble(LATENT, ACT, HIDDEN, **keys),
        "actor": actor,
    }


def build_loss(
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    deterministic: bool = True,
    networks: dict[str, nn.Module] | None = None,
    keys: dict[str, Any] | None = None,
    **kwargs: Any,
) -> ALMLoss:
    """A loss whose every parameter is away from its initial value, targets apart from theirs."""
    torch.manual_seed(seed)
    networks = build_networks(**(keys or {})) if networks is None else networks
    for network in networks.values():
        network.to(dtype)
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    loss = ALMLoss(**networks, **kwargs)
    SoftUpdate(loss, tau=0.005)
    for name, target in loss.named_buffers():
        if name.startswith("target_"):
            target += 0.3 * torch.randn_like(target)
    if deterministic:
        loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    return loss


def build_windows(
    batch: int = 6, steps: int = 3, *, seed: int = 1, dtype: torch.dtype = torch.float64
) -> TensorDict:
    """Windows in which nothing ends."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return TensorDict(
        observation=randn(batch, steps, OBS),
        action=randn(batch, steps, ACT).tanh(),
        next=TensorDict(
            observation=randn(batch, steps, OBS),
            reward=randn(batch, steps, 1),
            done=torch.zeros(batch, steps, 1, dtype=torch.bool),
            terminated=torch.zeros(batch, steps, 1, dtype=torch.bool),
            batch_size=[batch, steps],
        ),
        batch_size=[batch, steps],
    )


@pytest.fixture
def make_networks() -> Callable[..., dict[str, nn.Module]]:
    return build_networks


@pytest.fixture
def make_loss() -> Callable[..., ALMLoss]:
    return build_loss


@pytest.fixture
def make_windows() -> Callable[..., TensorDict]:
    return build_windows

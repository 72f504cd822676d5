"""Every number of the authors' networks and losses, in float64 (see tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs.utils import ExplorationType
from torchrl.objectives import SoftUpdate

from alm_torchrl.evaluation import lower_bound
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
from alm_torchrl.objectives.functional import td_target

FILE = Path(__file__).parents[1] / "golden" / "alm_losses.npz"
OBS, ACT, LATENT, HIDDEN, MODEL_HIDDEN = 5, 2, 4, 8, 12
GAMMA, LMBDA, COEFF, NOISE, TAU = 0.99, 0.95, 0.1, 0.5, 0.005

# The authors' name of a network, and ours.
NETWORKS = {
    "encoder": "encoder",
    "model": "dynamics",
    "reward": "reward_model",
    "classifier": "classifier",
    "critic": "qvalue_network",
    "actor": "actor",
}
TARGETS = {"encoder_target": "encoder", "critic_target": "qvalue_network"}

with np.load(FILE) as _archive:
    GOLDEN = {key: _archive[key] for key in _archive.files}
INPUTS = {
    key
    for key in GOLDEN
    if key.startswith(("weights/", "sequence/", "transition/"))
    or key == "classifier/generated_index"
}


def tensor(key: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[key].copy())


def parameter_names(net: str) -> list[str]:
    """The authors' parameter names of one network, in layer order."""
    prefix = f"weights/{net}/"
    return [key.removeprefix(prefix) for key in GOLDEN if key.startswith(prefix)]


def networks() -> dict[str, nn.Module]:
    actor = Actor(LATENT, [-1.0] * ACT, [1.0] * ACT, HIDDEN, noise=NoiseSchedule(NOISE, NOISE, 1))
    nets = {
        "encoder": MLPEncoder(OBS, LATENT, HIDDEN),
        "dynamics": LatentDynamics(LATENT, ACT, MODEL_HIDDEN),
        "reward_model": RewardModel(LATENT, ACT, HIDDEN),
        "classifier": TransitionClassifier(LATENT, ACT, HIDDEN),
        "qvalue_network": QValueEnsemble(LATENT, ACT, HIDDEN),
        "actor": actor,
    }
    for theirs, ours in NETWORKS.items():
        nets[ours].double()
        names, parameters = parameter_names(theirs), list(nets[ours].parameters())
        assert len(names) == len(parameters)
        for name, parameter in zip(names, parameters, strict=True):
            value = tensor(f"weights/{theirs}/{name}")
            assert value.shape == parameter.shape, (theirs, name)
            parameter.data.copy_(value)
    return nets


def golden_loss(nets: dict[str, nn.Module], **options: Any) -> tuple[ALMLoss, SoftUpdate]:
    """The loss with the authors' weights and settings, without noise, and its target update."""
    loss = ALMLoss(**nets, **{"horizon": 3, **options})
    loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    loss.consistency_coeff = torch.tensor(COEFF, dtype=torch.float64)
    loss.value_estimator.gamma = torch.tensor(GAMMA, dtype=torch.float64)
    loss.value_estimator.lmbda = torch.tensor(LMBDA, dtype=torch.float64)
    generated = torch.zeros(6, dtype=torch.bool)
    generated[tensor("classifier/generated_index")] = True
    loss.generated_rows = lambda _: generated
    update = SoftUpdate(loss, tau=TAU)
    for net, ours in TARGETS.items():
        if ours == "qvalue_network" or loss.latent_target == "moving_average":
            for name, value in target_parameters(loss, net).items():
                value.data.copy_(tensor(f"weights/{net}/{name}"))
    return loss, update


def target_parameters(loss: ALMLoss, net: str) -> dict[str, torch.Tensor]:
    """A target network's tensors under the authors' names."""
    ours = TARGETS[net]
    params = getattr(loss, f"target_{ours}_params")
    names = [tuple(name.split(".")) for name, _ in getattr(loss, ours).named_parameters()]
    return {k: params.get(name) for k, name in zip(parameter_names(net), names, strict=True)}


class Golden:
    """The loss with the authors' weights, and each of their numbers computed with it."""

    def __init__(self) -> None:
        self.nets = networks()
        self.loss, self.update = golden_loss(self.nets)
        self.windows, self.transitions = self.inputs()
        self.state = tensor("transition/state")
        self.action = tensor("transition/action")
        self.numbers: dict[str, torch.Tensor] = {}
        for compute in (
            self.outputs,
            self.world_model,
            self.reward_and_classifier,
            self.critic,
            self.actor,
            self.bound,
            self.soft_update,
        ):
            compute()

    @staticmethod
    def inputs() -> tuple[TensorDict, TensorDict]:
        never = torch.zeros(6, 3, 1, dtype=torch.bool)
        windows = TensorDict(
            observation=tensor("sequence/state").transpose(0, 1),
            action=tensor("sequence/action").transpose(0, 1),
            next=TensorDict(
                observation=tensor("sequence/next_state").transpose(0, 1),
                reward=tensor("sequence/reward").transpose(0, 1).unsqueeze(-1),
                done=never,
                terminated=never,
            ),
            batch_size=[6, 3],
        )
        done = tensor("transition/done").bool().unsqueeze(-1)
        assert 0 < done.sum() < 6
        transitions = TensorDict(
            observation=tensor("transition/state"),
            action=tensor("transition/action"),
            next=TensorDict(
                observation=tensor("transition/next_state"),
                reward=tensor("transition/reward").unsqueeze(-1),
                done=done,
                terminated=done,
            ),
            batch_size=[6],
        )
        return windows, transitions

    def target_loc(self, observation: torch.Tensor) -> torch.Tensor:
        td = TensorDict(observation=observation, batch_size=observation.shape[:1])
        with self.loss.target_encoder_params.to_module(self.loss.encoder):
            return self.loss.encoder.get_dist(td).base_dist.loc

    def gradients(self, loss: torch.Tensor, prefix: str, *nets: str) -> None:
        """Notes the gradients of a loss for all of the networks named."""
        parameters = {
            f"{prefix}/grad/{net}/{name}": parameter
            for net in nets
            for name, parameter in zip(
                parameter_names(net), self.nets[NETWORKS[net]].parameters(), strict=True
            )
        }
        grads = torch.autograd.grad(loss, list(parameters.values()))
        self.numbers |= dict(zip(parameters, grads, strict=True))

    def outputs(self) -> None:
        nets, out = self.nets, self.numbers
        z, following = self.target_loc(self.state), self.target_loc(tensor("transition/next_state"))
        td = TensorDict(observation=self.state, latent=z, action=self.action, batch_size=[6])
        encoded = nets["encoder"].get_dist(td).base_dist
        out["outputs/encoder_loc"], out["outputs/encoder_scale"] = encoded.loc, encoded.scale
        out["outputs/encoder_target_loc"] = z
        imagined = nets["dynamics"].get_dist(td).base_dist
        out["outputs/model_loc"], out["outputs/model_scale"] = imagined.loc, imagined.scale
        out["outputs/reward"] = nets["reward_model"](latent=z, action=self.action)
        out["outputs/classifier_logits"] = nets["classifier"](
            latent=z, action=self.action, next_latent=following
        )
        values = nets["qvalue_network"](latent=z, action=self.action)
        out["outputs/q1"], out["outputs/q2"] = values.split(1, -1)
        out["outputs/actor_loc"] = nets["actor"].get_dist(td).loc

    def world_model(self) -> None:
        rollout = self.loss.world_model_rollout(self.windows)
        self.numbers["world_model/kl"] = rollout["kl"].transpose(0, 1)
        self.numbers["world_model/reward"] = rollout["reward"].transpose(0, 1)
        self.numbers["world_model/value"] = rollout["value"]
        loss, _ = self.loss.world_model_loss(self.windows)
        self.numbers["world_model/loss"] = loss
        self.gradients(loss, "world_model", "encoder", "model")

    def reward_and_classifier(self) -> None:
        reward, _ = self.loss.reward_loss(self.transitions)
        classifier, _ = self.loss.classifier_loss(self.transitions)
        self.numbers["reward/loss"], self.numbers["classifier/loss"] = reward, classifier
        self.gradients(reward + classifier, "reward_classifier", "reward", "classifier")

    def critic(self) -> None:
        following = self.target_loc(tensor("transition/next_state"))
        action = (
            self.nets["actor"]
            .get_dist(TensorDict(latent=following, batch_size=[6]))
            .deterministic_sample
        )
        td = TensorDict(latent=following, action=action, batch_size=[6])
        with self.loss.target_qvalue_network_params.to_module(self.loss.qvalue_network):
            values = self.loss.qvalue_network(td)["state_action_value"]
        self.numbers["critic/target"] = td_target(
            self.transitions["next", "reward"],
            self.transitions["next", "terminated"],
            values.amin(-1, keepdim=True),
            torch.tensor(GAMMA, dtype=torch.float64),
        )
        loss, _ = self.loss.value_loss(self.transitions)
        self.numbers["critic/loss"] = loss
        self.gradients(loss, "critic", "critic")

    def actor(self) -> None:
        z = self.target_loc(self.state)
        rollout = self.loss.imagine(z)
        out = self.numbers

        def through_time(key: str, first: torch.Tensor) -> torch.Tensor:
            return torch.cat([first[None], rollout["next", key].transpose(0, 1)])

        out["actor/latents"] = through_time("latent", z)
        out["actor/actions"] = through_time("action", rollout["action"][:, 0])
        # The loss leaves out Q at t = 0, which never enters the result.
        first = self.nets["qvalue_network"](latent=z, action=rollout["action"][:, 0])
        out["actor/value"] = through_time("value", first.amin(-1, keepdim=True))
        out["actor/reward"] = rollout["reward"].transpose(0, 1)
        out["actor/log_ratio"] = rollout["log_ratio"].transpose(0, 1)
        out["actor/lambda_return"] = self.loss.lambda_return(rollout).transpose(0, 1)
        loss, _ = self.loss.actor_loss(self.transitions)
        out["actor/loss"] = loss
        self.gradients(loss, "actor", "actor")

    def bound(self) -> None:
        latent = self.target_loc(self.state)
        self.numbers["bound/value"] = lower_bound(self.loss, latent, action=self.action)

    def soft_update(self) -> None:
        self.update.step()
        for net in TARGETS:
            for name, value in target_parameters(self.loss, net).items():
                self.numbers[f"soft_update/{net}/{name}"] = value.clone()


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


@pytest.mark.parametrize("key", [key for key in GOLDEN if key not in INPUTS])
def test_number_equals_the_authors(golden: Golden, key: str) -> None:
    assert key in golden.numbers, f"{key} is compared with nothing"
    found = golden.numbers[key].detach()
    assert found.dtype == torch.float64
    assert found.shape == GOLDEN[key].shape
    # A gradient entry that cancels to almost nothing is held to the size of its neighbors.
    floor = 1e-5 * np.abs(GOLDEN[key]).max()
    np.testing.assert_allclose(found.numpy(), GOLDEN[key], rtol=1e-8, atol=1e-8 * floor)


def test_every_number_is_compared(golden: Golden) -> None:
    assert set(golden.numbers) == set(GOLDEN) - INPUTS

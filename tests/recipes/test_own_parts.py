"""Networks, optimizer, losses and measurements of one's own, given as options of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded

from alm_torchrl.modules import CategoricalHead, LatentModule, QValueEnsemble
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import Measurement, ValueBias
from recipes.build import env_factory, make_measurements, make_module
from recipes.build_agent import make_agent

SIZES = ("agent.latent_dim=8", "agent.hidden_dim=8", "agent.dynamics_hidden_dim=8")
CPU = torch.device("cpu")


def make_critics(
    action_spec: Bounded, latent_dim: int, hidden_dim: int, num_networks: int = 2
) -> TensorDictModule:
    return QValueEnsemble(latent_dim, action_spec.shape[-1], hidden_dim, num_networks=num_networks)


def test_networks_are_built_from_options(config) -> None:
    options = config(
        *SIZES,
        "+agent.network_kwargs.encoder={depth: 3, activation_class: SiLU}",
        "+agent.network_kwargs.encoder.head._target_=alm_torchrl.modules.CategoricalHead",
        "+agent.network_kwargs.encoder.head.classes=4",
        "+agent.network_kwargs.actor.depth=4",
        f"+agent.networks.qvalue_network._target_={__name__}.make_critics",
        "+agent.networks.qvalue_network.num_networks=5",
        "num_seeds=2",
    )
    env = env_factory(options)(seed=0)
    agent, loss = make_agent(options, env, CPU, seed=0)
    linear = {name: _count(network, nn.Linear) for name, network in agent.networks().items()}
    plain, _ = make_agent(config(*SIZES), env, CPU, seed=0)
    usual = {name: _count(network, nn.Linear) for name, network in plain.networks().items()}
    assert linear["encoder"] == usual["encoder"] + 1
    assert linear["actor"] == usual["actor"] + 2
    assert linear["reward_model"] == usual["reward_model"]
    assert _count(agent.encoder, nn.SiLU) == 3
    assert agent.encoder.head == agent.dynamics.head == CategoricalHead(classes=4)
    rollout = env.rollout(4, agent.policy()).unsqueeze(0)
    assert agent.qvalue_network(agent.encoder(rollout))["state_action_value"].shape[-1] == 5
    assert all(loss(rollout)[key].isfinite() for key in loss.out_keys)


def test_optimizer_and_schedule_are_built_from_options(config) -> None:
    module = make_module(
        config(
            *(*SIZES, "training.warmup_steps=20", "run.compile=never"),
            *("training.optimizer._target_=torch.optim.AdamW", "learning_rates.encoder=1e-5"),
            "+training.optimizer.weight_decay=0.1",
            "+training.schedule._target_=torch.optim.lr_scheduler.LinearLR",
            *("+training.schedule.start_factor=0.5", "+training.schedule.total_iters=4"),
        ),
        CPU,
    )
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    rates = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert rates.keys() == {"encoder", "dynamics", "reward", "value", "actor"}
    assert (rates["encoder"], rates["dynamics"]) == (1e-5, 1e-3)
    assert optimizer.param_groups[0]["lr"] == 0.5e-5
    assert isinstance(configured["lr_scheduler"], torch.optim.lr_scheduler.LinearLR)
    usual = make_module(config(*SIZES, "training.warmup_steps=20"), CPU).configure_optimizers()
    assert type(usual) is torch.optim.Adam
    assert usual.param_groups[0]["name"] == "world_model"


class Reconstruction(nn.Module):
    """The example of docs/auxiliary_loss.md."""

    def __init__(self, latent_dim: int, observation_dim: int) -> None:
        super().__init__()
        self.decoder = nn.Linear(latent_dim, observation_dim)

    def forward(self, windows: TensorDictBase) -> Tensor:
        predicted = self.decoder(windows["latent"][:, 0])
        return (predicted - windows["observation"][:, 0]).square().mean(-1)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_auxiliary_losses_are_built_from_options(config, num_seeds: int) -> None:
    name = "+objective.auxiliary_losses.reconstruction"
    module = make_module(
        config(
            *(*SIZES, "training.warmup_steps=20", f"num_seeds={num_seeds}"),
            *(f"{name}._target_={__name__}.Reconstruction", f"{name}.observation_dim=17"),
            f"{name}.latent_dim=${{agent.latent_dim}}",
        ),
        CPU,
    )
    assert "loss_reconstruction" in module.loss.out_keys
    optimizer = module.configure_optimizers()
    batch = next(iter(module.experience))
    losses = module.loss(batch)
    assert losses["loss_reconstruction"].isfinite().all()
    sum(losses[key].sum() for key in module.loss.out_keys).backward()
    decoders = [p for p in optimizer.param_groups[0]["params"] if p.shape[-2:] == (17, 8)]
    assert len(decoders) == 1
    assert decoders[0].grad.abs().sum() > 0


class WithLoss(nn.Linear):
    """A network that writes a loss of its own."""

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        out = super().forward(observation)
        return out, out.square().mean(-1)


def make_encoder_with_loss(spec: Any, *, latent_dim: int, hidden_dim: int) -> LatentModule:
    network = WithLoss(spec["observation"].shape[-1], 2 * latent_dim)
    return LatentModule(network, ["observation"], extra_keys=["own_loss"])


def test_a_loss_of_the_encoder_is_named_in_the_options(config) -> None:
    options = (*SIZES, "training.warmup_steps=20", "training.batch_size=8")
    build = f"encoder.build._target_={__name__}.make_encoder_with_loss"
    module = make_module(config(*options, build, "+objective.auxiliary_losses.own=own_loss"), CPU)
    losses = module.loss(next(iter(module.experience)))
    losses["loss_own"].backward()
    assert all(p.grad.any() for p in module.agent.encoder.parameters())
    with pytest.raises(ValueError, match="'own' is neither .*; the encoder writes .*'own_loss'"):
        make_module(config(*options, build, "+objective.auxiliary_losses.own=other"), CPU)


class RewardMean(Measurement):
    """The example of docs/lightning.md."""

    name = "reward"

    def measure(self, loss: ALMLoss, rollout: TensorDictBase) -> dict[str, Tensor]:
        return {"reward_mean": rollout["next", "reward"].mean()}


def test_measurements_are_built_from_options(config, tmp_path: Path) -> None:
    own = f"evaluation.measurements=[{{_target_: {__name__}.RewardMean, steps: 7}}]"
    usual, measurement = make_measurements(config(own, "evaluation.bias=true"))
    assert usual is ValueBias
    built = measurement(tmp_path, seed=0, seed_index=0)
    assert isinstance(built, RewardMean)
    assert built.steps == 7
    assert make_measurements(config()) == []


def _count(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


def test_runs_of_different_seeds_can_be_evaluated_on_the_same_episodes(config) -> None:
    def first_observation(*options: str) -> Tensor:
        module = make_module(config(*SIZES, "evaluation.episodes=1", *options), CPU)
        module.experience.shutdown()
        return module.eval_env.reset()["observation"]

    same = [first_observation("evaluation.seed=7", f"seed={seed}") for seed in (0, 1)]
    assert torch.equal(*same)
    assert not torch.equal(first_observation(), same[0])
    assert torch.equal(first_observation(), first_observation("evaluation.seed=1000"))

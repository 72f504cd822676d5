"""``check_encoder`` reports every violation with a remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import Tensor, nn
from torch import distributions as D
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import DoubleToFloat, GymEnv, TransformedEnv
from torchrl.modules import GRUModule
from torchrl.objectives import SoftUpdate
from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv

from alm_torchrl.agent import ALMAgent
from alm_torchrl.distributions import DiagonalNormal
from alm_torchrl.modules import (
    Actor,
    Augmented,
    CategoricalHead,
    FrozenEncoder,
    LatentDynamics,
    LatentModule,
    MLPEncoder,
    NormalizedInputs,
    QValueEnsemble,
    RecurrentEncoder,
    RewardModel,
    RunningNorm,
    TransitionClassifier,
)
from alm_torchrl.objectives import ALMLoss, check_encoder
from alm_torchrl.objectives.contract import _CHECKS
from alm_torchrl.objectives.parameters import parametrized

SPEC = Composite(
    observation=Unbounded(3),
    image=Unbounded((1, 4, 4)),
    double=Unbounded(3, dtype=torch.float64),
    bytes=Unbounded(3, dtype=torch.uint8),
)
ACTION = Unbounded(2)


def gaussian(network: nn.Module, **options: Any) -> LatentModule:
    return LatentModule(network, options.pop("in_keys", ["observation"]), **options)


def ending_in(distribution: Any, names: tuple[str, ...], network: nn.Module | None = None) -> Any:
    """An encoder that ends in a distribution of one's own."""
    network = nn.Linear(3, 4) if network is None else network
    params = {name: f"latent_{name}" for name in names}
    return ProbabilisticTensorDictSequential(
        TensorDictModule(network, in_keys=["observation"], out_keys=[*params.values()]),
        ProbabilisticTensorDictModule(
            params, ["latent"], distribution_class=distribution, default_interaction_type="random"
        ),
    )


class NoRsample(D.Independent):
    """A Normal that cannot be drawn with a gradient."""

    has_rsample = False

    def __init__(self, loc: Tensor) -> None:
        super().__init__(D.Normal(loc, 1.0), 1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        raise NotImplementedError


class NoDivergence(D.Independent):
    """Student's t, for which torch knows no divergence."""

    def __init__(self, loc: Tensor) -> None:
        super().__init__(D.StudentT(torch.full_like(loc, 3.0), loc, 1.0), 1)

    @property
    def deterministic_sample(self) -> Tensor:
        return self.base_dist.loc


class Wide(DiagonalNormal):
    """Its event keeps two dimensions."""

    def __init__(self, loc: Tensor) -> None:
        D.Independent.__init__(self, D.Normal(loc.unsqueeze(-1), 1.0), 2)


class Flattened(nn.Module):
    """It takes one batch dimension alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, image: Tensor) -> Tensor:
        return self.linear(image.reshape(-1, 16))


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Unused(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 8)
        self.spare = nn.Linear(3, 3)


class Mutating(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return super().forward(x)


class PlainTensor(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 8)
        self.offset = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.offset)


class Unsaved(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 8)
        self.register_buffer("offset", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.offset)


class RunningMean(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 8)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.add_(1)
        return super().forward(x)


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


class LeadingDims(nn.Module):
    """It flattens the leading dimensions of images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image.reshape(-1, 1, 4, 4)).reshape(*image.shape[:-3], -1)


def convolutions(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(8, 8))


class Spectral(nn.Module):
    """Its power iterations run in update_statistics alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Linear(3, 16)), nn.SiLU(), spectral_norm(nn.Linear(16, 8))
        )
        self.train()

    def train(self, mode: bool = True) -> Spectral:
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    @torch.no_grad()
    def update_statistics(self, x: Tensor) -> None:
        super().train()
        self.layers(x)
        self.train()


class VectorStatistics(nn.Linear):
    """Its statistics are those of batches with one dimension."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("mean", torch.zeros(3))

    def update_statistics(self, x: Tensor) -> None:
        self.mean.copy_(x.mean(0))


class OwnLoss(nn.Linear):
    """Its bias is trained by a loss of its own alone."""

    def __init__(self, mean: bool = False) -> None:
        super().__init__(3, 8)
        self.mean = mean

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = super().forward(x)
        loss = out.square().mean(-1)
        return out - self.bias, loss.mean() if self.mean else loss


class Remembers(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


WRONG = {
    "no_distribution": (
        lambda: TensorDictModule(nn.Linear(3, 4), ["observation"], ["latent"]),
        ["does not end in a distribution", r"in LatentModule\(network"],
    ),
    "wrong_key": (
        lambda: gaussian(nn.Linear(3, 8), in_keys=["position"]),
        ["reads 'position', which is not in the .* spec: use in_keys from bytes, double, image, o"],
    ),
    "no_memory": (
        lambda: RecurrentEncoder(3, 4, 8),
        ["memory at 'recurrent_state'", "append_transform.encoder.make_tensordict_primer"],
    ),
    "memory_not_read": (
        lambda: LatentModule(Remembers(3, 8), ["observation"], extra_keys=[("next", "memory")]),
        [r"writes \('next', 'memory'\) but does not read 'memory': add that to its in_keys"],
    ),
    "wrong_input_size": (
        lambda: MLPEncoder(5, 4, 8),
        ["fails on observations of batch size", "mat1 and mat2"],
    ),
    "one_batch_dimension": (
        lambda: gaussian(Flattened(), in_keys=["image"]),
        ["batch shape .* keep the leading dimensions"],
    ),
    "event": (
        lambda: ending_in(Wide, ("loc",)),
        [r"event shape \(4, 1\), expected \(D,\): wrap it"],
    ),
    "no_rsample": (
        lambda: ending_in(NoRsample, ("loc",)),
        ["NoRsample, has no rsample: use", "no deterministic_sample: use DiagonalNormal or"],
    ),
    "no_divergence": (
        lambda: ending_in(NoDivergence, ("loc",)),
        [r"KL divergence .*NoDivergence\) is not defined", r"register_kl\(DiagonalNormal, NoDiv"],
    ),
    "wrong_latent": (
        lambda: MLPEncoder(3, 6, 8),
        ["size 6, but the other networks have latent_dim=4: build it with 4"],
    ),
    "wrong_latent_key": (
        lambda: MLPEncoder(3, 4, 8, latent_key="state"),
        [r"writes 'state', but the dynamics reads \['latent', 'action'\]"],
    ),
    "discrete": (
        lambda: MLPEncoder(3, 4, 8, head=CategoricalHead(classes=2)),
        [r"KL divergence .*DiagonalNormal, OneHotGroups\) is not defined: build the dynamics with"],
    ),
    "detached": (lambda: gaussian(Detached(3, 8)), ["no gradient", r"remove detach\(\)"]),
    "unused": (lambda: gaussian(Unused()), [r"spare\.weight has no gradient", "spare.bias"]),
    "dropout": (
        lambda: gaussian(nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 8))),
        ["under ExplorationType.DETERMINISTIC differ: remove dropout"],
    ),
    "mutating": (lambda: gaussian(Mutating(3, 8)), ["changes the observation 'observation'"]),
    "plain_tensor": (lambda: gaussian(PlainTensor()), [r"offset is neither .*register_buffer"]),
    "unsaved": (lambda: gaussian(Unsaved()), ["state_dict does not restore it"]),
    "moving": (
        lambda: gaussian(RunningMean()),
        ["changes .*mean: .*update_statistics"],
    ),
    "batch_norm": (
        lambda: gaussian(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8))),
        ["module.0.module.0 is a BatchNorm .*: use nn.LayerNorm .* NormalizedInputs, .* FrozenEnc"],
    ),
    "batch_norm_of_images": (
        lambda: gaussian(LeadingDims(convolutions(nn.BatchNorm2d(2))), in_keys=["image"]),
        [r"network.1 is a BatchNorm .*nn.GroupNorm\(1, channels\) after a convolution"],
    ),
    "batch_norm_in_eval": (
        lambda: gaussian(LeadingDims(convolutions(nn.BatchNorm2d(2))), in_keys=["image"]).eval(),
        ["network.1 is a BatchNorm in training mode"],
    ),
    "norm_without_statistics": (
        lambda: gaussian(nn.Sequential(RunningNorm(3), nn.Linear(3, 8))),
        ["statistics: .* does not reach module.0.module.0, a RunningNorm: .*NormalizedInputs"],
    ),
    "statistics_of_vectors": (
        lambda: gaussian(VectorStatistics(3, 8)),
        [r"statistics: update_statistics.. fails on .*\[4, 3\] .*: accept any leading dimensions"],
    ),
    "spectral_norm": (
        # Its iteration has converged for the weights that it starts with.
        lambda: gaussian(spectral_norm(nn.Linear(3, 8), n_power_iterations=50)),
        ["buffers: .*changes .*_u, .*_v: keep the layer in evaluation mode .*update_statistics"],
    ),
    "old_spectral_norm": (
        lambda: gaussian(nn.utils.spectral_norm(nn.Linear(3, 8))),
        ["changes .*weight_u", "module.weight is neither a .*, or use torch.nn.utils.parametriz"],
    ),
    "old_weight_norm": (
        lambda: gaussian(nn.utils.weight_norm(nn.Linear(3, 8))),
        ["cannot be copied .*: .* use torch.nn.utils.parametrizations.weight_norm instead"],
    ),
    "float64_latent": (
        lambda: gaussian(nn.Sequential(nn.Linear(3, 8), Cast(torch.float64))),
        ["latent has dtype torch.float64, .*: convert the output of the network to torch.float32"],
    ),
    "float64_weights": (
        lambda: gaussian(nn.Linear(3, 8).double()),
        [r"batch size \[4\] .*: convert the weights .* encoder.to\(torch.float32\)"],
    ),
    "float64_observation": (
        lambda: gaussian(nn.Linear(3, 8), in_keys=["double"]),
        [r"batch size \[4\] .*: append torchrl.envs.DoubleToFloat\(\) to the environment"],
    ),
    "bytes": (
        lambda: gaussian(nn.Linear(3, 8), in_keys=["bytes"]),
        [r"batch size \[4\] .*: convert 'bytes' to float32 in forward"],
    ),
    "odd_size": (
        lambda: gaussian(nn.Linear(3, 7)),
        [r"has size 7, .* multiple of 2 .*for 6 or 8 outputs.*: change the last layer"],
    ),
    "odd_groups": (
        lambda: gaussian(nn.Linear(3, 7), head=CategoricalHead(classes=4)),
        [r"has size 7, .* multiple of classes=4; build the network for 4 or 8 outputs"],
    ),
    "mean_loss": (
        lambda: gaussian(OwnLoss(mean=True), extra_keys=["own_loss"]),
        ["one number for each observation, not their mean"],
    ),
    "wrong_image_size": (
        lambda: gaussian(nn.Sequential(nn.Flatten(-3), nn.Linear(25, 8)), in_keys=["image"]),
        [r"build it for the shapes in the observation spec, 'image' \[1, 4, 4\]"],
    ),
    "convolution": (
        lambda: gaussian(
            nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(-3), nn.Linear(4, 8)), in_keys=["image"]
        ),
        [r"batch size \[4, 3\] .*: accept any leading dimensions"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_encoder_is_told_what_to_write(name: str) -> None:
    make, says = WRONG[name]
    with pytest.raises(ValueError, match="does not satisfy the encoder contract") as error:
        check_encoder(make(), SPEC, LatentDynamics(4, 2, 8))
    for expected in says:
        assert error.match(expected)


#: For each mistake above: the encoder that its advice leads to.
FOLLOWED = {
    "batch_norm": lambda: gaussian(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 8))),
    "norm_without_statistics": lambda: gaussian(
        NormalizedInputs(nn.Linear(3, 8), [RunningNorm(3)])
    ),
    "batch_norm_of_images": lambda: gaussian(
        LeadingDims(convolutions(nn.GroupNorm(1, 2))), in_keys=["image"]
    ),
    "batch_norm_in_eval": lambda: FrozenEncoder(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), (1, 4, 4), 4, 8, in_keys=["image"]
    ),
    "spectral_norm": lambda: gaussian(Spectral()),
    "old_weight_norm": lambda: gaussian(weight_norm(nn.Linear(3, 8))),
    "float64_latent": lambda: gaussian(
        nn.Sequential(nn.Linear(3, 8), Cast(torch.float64), Cast(torch.float32))
    ),
    "float64_weights": lambda: gaussian(nn.Linear(3, 8).double()).to(torch.float32),
    "bytes": lambda: gaussian(
        nn.Sequential(Cast(torch.float32), nn.Linear(3, 8)), in_keys=["bytes"]
    ),
    "odd_size": lambda: gaussian(nn.Linear(3, 8)),
    "odd_groups": lambda: gaussian(nn.Linear(3, 8), head=CategoricalHead(classes=4)),
    "mean_loss": lambda: gaussian(OwnLoss(), extra_keys=["own_loss"]),
}


def windows(count: int = 32) -> TensorDict:
    """Windows of one step, whose next observations follow from the observations."""
    now = SPEC.rand((count, 1))
    now["bytes"] = now["bytes"].remainder(4)
    flag = torch.zeros(count, 1, 1, dtype=torch.bool)
    following = now.apply(lambda value: (0.5 * value).to(value.dtype))
    following.update({"reward": now["observation"][..., :1], "done": flag, "terminated": flag})
    return now.set("action", torch.rand(count, 1, 2)).set("next", following)


@pytest.mark.parametrize("name", FOLLOWED)
def test_an_encoder_that_follows_the_advice_passes_and_learns(name: str) -> None:
    torch.manual_seed(0)
    encoder, size = FOLLOWED[name](), 8 if name == "odd_groups" else 4
    dynamics = LatentDynamics(size, 2, 8, head=encoder.head)
    assert check_encoder(encoder, SPEC, dynamics) == size
    loss = ALMLoss(
        encoder,
        dynamics,
        RewardModel(size, 2, 8),
        TransitionClassifier(size, 2, 8),
        QValueEnsemble(size, 2, 8),
        Actor(size, [-1.0] * 2, [1.0] * 2, 8),
        horizon=1,
        auxiliary_losses={"own": "own_loss"} if name == "mean_loss" else None,
    )
    target_update = SoftUpdate(loss, tau=0.05)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    data, found = windows(), []
    for _ in range(60):
        encoder.update_statistics(data)
        out = loss(data)
        sum(out[key] for key in loss.out_keys).backward()
        found.append(out["loss_world_model"].item())
        if len(found) == 1:
            assert all(p.grad.any() for p in loss.encoder_params.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        target_update.step()
    assert sum(found[-10:]) < sum(found[:10]) - 1
    if name == "spectral_norm":
        for params in (loss.encoder_params, loss.target_encoder_params):
            with parametrized(encoder, params):
                for layer in (encoder.network.layers[0], encoder.network.layers[2]):
                    norm = torch.linalg.matrix_norm(layer.weight, 2).item()
                    assert norm == pytest.approx(1, abs=0.1)
    if name == "norm_without_statistics":
        mean = data["observation"].mean((0, 1))
        torch.testing.assert_close(encoder.network.norms[0].mean, mean)


def test_statistics_that_do_not_change_any_more_are_reached() -> None:
    encoder = gaussian(Spectral())
    for _ in range(200):
        encoder.update_statistics(windows())
    u = encoder.network.layers[0].parametrizations.weight[0]._u
    before = u.clone()
    encoder.update_statistics(windows())
    assert torch.allclose(u, before)
    assert check_encoder(encoder, SPEC) == 4


def test_float64_observations_are_read_after_the_advised_transform() -> None:
    env, encoder = GymEnv("InvertedPendulum-v5"), gaussian(nn.Linear(4, 8))
    with pytest.raises(ValueError, match="append torchrl.envs.DoubleToFloat"):
        check_encoder(encoder, env.observation_spec)
    env = TransformedEnv(env)
    env.append_transform(DoubleToFloat())
    assert check_encoder(encoder, env.observation_spec) == 4
    env.close()


def test_a_float64_latent_in_the_loss_names_the_network_to_change() -> None:
    encoder = gaussian(nn.Sequential(nn.Linear(3, 8), Cast(torch.float64)))
    networks = (RewardModel(4, 2, 8), TransitionClassifier(4, 2, 8), QValueEnsemble(4, 2, 8))
    loss = ALMLoss(encoder, LatentDynamics(4, 2, 8), *networks, Actor(4, [-1.0] * 2, [1.0] * 2, 8))
    with pytest.raises(ValueError, match="cannot read 'latent' of dtype torch.float64, .* convert"):
        loss.world_model_rollout(torch.cat([windows()] * 3, 1))


@pytest.mark.parametrize("name", ["gradient", "latent_dim", "determinism"])
def test_a_check_is_skipped_by_its_name(name: str) -> None:
    make, options = {
        "gradient": (lambda: gaussian(Unused()), {}),
        "latent_dim": (lambda: MLPEncoder(3, 4, 8), {"latent_dim": 5}),
        "determinism": (lambda: gaussian(nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 8))), {}),
    }[name]
    with pytest.raises(ValueError, match=f"- {name}: ") as error:
        check_encoder(make(), SPEC, **options)
    assert str(error.value).count(f"\n- {name}: ") == len(str(error.value).splitlines()) - 1
    for skip in (name, [name]):
        assert check_encoder(make(), SPEC, skip=skip, **options) == 4
    with pytest.raises(ValueError, match=f"- {name}: "):
        check_encoder(make(), SPEC, skip=["inputs"], **options)


def test_an_agent_is_built_without_the_skipped_checks() -> None:
    env = ContinuousActionVecMockEnv()
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(7, 8))
    options = {"encoder": gaussian(network), "hidden_dim": 8, "dynamics_hidden_dim": 8}
    with pytest.raises(ValueError, match="- determinism: "):
        ALMAgent.from_env(env, **options)
    assert ALMAgent.from_env(env, skip_checks="determinism", **options).config.latent_dim == 4
    with pytest.raises(ValueError, match="did you mean 'determinism'"):
        ALMAgent.from_env(env, skip_checks=["deterministic"], **options)


def test_an_unknown_check_is_answered_with_the_name_that_was_meant() -> None:
    with pytest.raises(ValueError, match="unknown check 'gradients'; did you mean 'gradient'?"):
        check_encoder(MLPEncoder(3, 4, 8), SPEC, skip=["shapes", "gradients"])
    with pytest.raises(ValueError, match="unknown check 'xyz'; choose from shapes, samples, "):
        check_encoder(MLPEncoder(3, 4, 8), SPEC, skip="xyz")


def test_every_check_that_can_be_skipped_is_documented() -> None:
    for name in _CHECKS:
        assert f"``{name}``" in check_encoder.__doc__


def test_all_findings_come_at_once() -> None:
    encoder = gaussian(nn.Sequential(nn.Dropout(0.5), PlainTensor()))
    encoder[0].module.append(nn.Linear(8, 12))
    with pytest.raises(ValueError, match="does not satisfy the encoder contract") as error:
        check_encoder(encoder, SPEC, LatentDynamics(4, 2, 8), latent_dim=5)
    lines = str(error.value).splitlines()
    assert lines[0] == "LatentModule does not satisfy the encoder contract:"
    assert [line.startswith("- ") for line in lines[1:]] == [True] * 3
    assert error.match("size 6, but the other networks have latent_dim=5")


def test_without_dynamics_the_divergence_to_its_like_is_checked() -> None:
    with pytest.raises(ValueError, match=r"KL divergence .*NoDivergence, NoDivergence"):
        check_encoder(ending_in(NoDivergence, ("loc",)), SPEC)


def test_a_right_encoder_is_left_as_it_was() -> None:
    encoder, dynamics = MLPEncoder(3, 4, 8), LatentDynamics(4, 2, 8)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with torch.no_grad():
        assert check_encoder(encoder, SPEC.expand(5), dynamics) == 4
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_the_dynamics_is_checked_too() -> None:
    encoder = MLPEncoder(3, 4, 8)
    network = TensorDictModule(nn.Linear(6, 4), ["latent", "action"], [("next", "latent")])
    with pytest.raises(ValueError, match="the dynamics, TensorDictModule, does not end in a"):
        check_encoder(encoder, SPEC, network)
    joined = LatentModule(nn.Bilinear(4, 2, 8), ["latent", "action"], latent_key=("next", "latent"))
    with pytest.raises(ValueError, match="pass action_spec=env.action_spec"):
        check_encoder(encoder, SPEC, joined)
    assert check_encoder(encoder, SPEC, joined, action_spec=ACTION) == 4
    with pytest.raises(ValueError, match=r"cannot read its latent, \(4, 3, 4\), with an action of"):
        check_encoder(encoder, SPEC, joined, action_spec=Unbounded(3))


def test_augmentation_and_torchrls_recurrent_module_will_do() -> None:
    noise = Augmented(nn.Linear(3, 8), [nn.Dropout(0.5)])
    assert check_encoder(gaussian(noise), SPEC) == 4
    memory = GRUModule(3, 5, in_keys=["observation", "state"], out_keys=["h", ("next", "state")])
    head = LatentModule(nn.Linear(5, 8), ["h"])
    spec = SPEC.clone()
    spec["state"], spec["is_init"] = Unbounded((1, 5)), Unbounded(1, dtype=torch.bool)
    assert check_encoder(ProbabilisticTensorDictSequential(memory, *head), spec) == 4


@pytest.mark.parametrize("bound", [float("inf"), 1e300, 3e38])
def test_bounds_that_are_out_of_reach_are_not_drawn_from(bound: float) -> None:
    low, high = torch.tensor([-1.0, -bound, 0.0]), torch.tensor([1.0, bound, bound])
    for dtype in (torch.float32, torch.float64):
        bounds = {"low": low.to(dtype), "high": high.to(dtype), "shape": (3,), "dtype": dtype}
        spec = Composite(observation=Bounded(**bounds))
        encoder = MLPEncoder(3, 4, 8).to(dtype)
        assert check_encoder(encoder, spec) == 4

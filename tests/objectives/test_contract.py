"""``check_encoder`` reports every violation with a remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import Tensor, nn
from torch import distributions as D
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.modules import GRUModule

from alm_torchrl.distributions import DiagonalNormal
from alm_torchrl.modules import (
    Augmented,
    CategoricalHead,
    LatentDynamics,
    LatentModule,
    MLPEncoder,
    RecurrentEncoder,
)
from alm_torchrl.objectives import check_encoder

SPEC = Composite(observation=Unbounded(3), image=Unbounded((1, 4, 4)))
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


class ToDouble(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


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
        ["reads 'position', which is not in the observation spec: use in_keys from image, obs"],
    ),
    "no_memory": (
        lambda: RecurrentEncoder(3, 4, 8),
        ["memory at 'recurrent_state'", "append_transform.encoder.make_tensordict_primer"],
    ),
    "memory_not_read": (
        lambda: LatentModule(Remembers(3, 8), ["observation"], memory_keys=[("next", "memory")]),
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
        ["changes the buffer .*mean: .*update_statistics"],
    ),
    "batch_norm": (
        lambda: gaussian(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8))),
        [r"batch size \[\] .*: use nn.LayerNorm or RunningNorm"],
    ),
    "spectral_norm": (
        lambda: gaussian(nn.utils.spectral_norm(nn.Linear(3, 8))),
        ["changes the buffer .*weight_u: .*weight_norm instead of spectral_norm"],
    ),
    "float64_latent": (
        lambda: gaussian(nn.Sequential(nn.Linear(3, 8), ToDouble())),
        ["the dynamics cannot read its latent.*: build both with the same dtype"],
    ),
    "float64_weights": (
        lambda: gaussian(nn.Linear(3, 8).double()),
        [r"batch size \[4\] .*: convert the observations to the dtype of the weights"],
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

"""Encoder, latent dynamics, reward model, classifier and values: shapes, layers, keys."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import distributions as D
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl.modules import (
    Actor,
    GaussianHead,
    LatentDynamics,
    LatentModule,
    LayerNormMLP,
    MLPEncoder,
    QValueEnsemble,
    RewardModel,
    TransitionClassifier,
    mlp,
    orthogonal_init,
)
from alm_torchrl.modules.networks import TensorModule

PLAIN = ["Linear", "ELU", "Linear", "ELU", "Linear"]
TRUNK = ["Linear", "LayerNorm", "Tanh", "Linear", "ELU", "Linear"]
OBS, ACT, LATENT, HIDDEN, MODEL_HIDDEN = 5, 2, 4, 8, 12

NETWORKS = {
    "encoder": lambda: MLPEncoder(OBS, LATENT, HIDDEN),
    "dynamics": lambda: LatentDynamics(LATENT, ACT, MODEL_HIDDEN),
    "reward": lambda: RewardModel(LATENT, ACT, HIDDEN),
    "classifier": lambda: TransitionClassifier(LATENT, ACT, HIDDEN),
    "qvalue": lambda: QValueEnsemble(LATENT, ACT, HIDDEN),
    "actor": lambda: Actor(LATENT, [-1.0] * ACT, [1.0] * ACT, HIDDEN),
}


def batch(*shape: int) -> TensorDict:
    return TensorDict(
        observation=torch.randn(*shape, OBS),
        latent=torch.randn(*shape, LATENT),
        action=torch.rand(*shape, ACT),
        next=TensorDict(latent=torch.randn(*shape, LATENT), batch_size=shape),
        batch_size=shape,
    )


def layers(module: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.LayerNorm, nn.Tanh, nn.ELU)
    return [kind.__name__ for m in module.modules() for kind in kinds if isinstance(m, kind)]


@pytest.mark.parametrize(
    ("name", "order", "widths"),
    [
        ("encoder", PLAIN, [(OBS, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 2 * LATENT)]),
        (
            "dynamics",
            PLAIN,
            [
                (LATENT + ACT, MODEL_HIDDEN),
                (MODEL_HIDDEN, MODEL_HIDDEN),
                (MODEL_HIDDEN, 2 * LATENT),
            ],
        ),
        ("reward", TRUNK, [(LATENT + ACT, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)]),
        ("classifier", TRUNK, [(2 * LATENT + ACT, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 2)]),
        ("qvalue", 2 * TRUNK, 2 * [(LATENT + ACT, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)]),
        ("actor", PLAIN, [(LATENT, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, ACT)]),
    ],
)
def test_layers_are_those_of_the_paper(
    name: str, order: list[str], widths: list[tuple[int, int]]
) -> None:
    network = NETWORKS[name]()
    assert layers(network) == order
    linears = [m for m in network.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == widths


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_start_orthogonal_and_biases_at_zero(name: str) -> None:
    for layer in NETWORKS[name]().modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach().double()
            gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(gram, torch.eye(len(gram)).double(), rtol=0, atol=1e-5)
            assert (layer.bias == 0).all()


def test_convolutions_start_with_the_gain_of_a_relu() -> None:
    network = orthogonal_init(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3)))
    for layer in network:
        weight = layer.weight.detach().flatten(1)
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(4), rtol=0, atol=1e-5)
        assert (layer.bias == 0).all()
    orthogonal_init(nn.Linear(3, 4, bias=False))


@pytest.mark.parametrize(
    ("name", "key", "size"),
    [
        ("encoder", "latent", LATENT),
        ("dynamics", ("next", "latent"), LATENT),
        ("reward", "predicted_reward", 1),
        ("classifier", "transition_logits", 2),
        ("qvalue", "state_action_value", 2),
    ],
)
@pytest.mark.parametrize("shape", [(3,), (3, 2), ()])
def test_output_shapes_for_any_batch(
    name: str, key: str | tuple[str, str], size: int, shape: tuple[int, ...]
) -> None:
    out = NETWORKS[name]()(batch(*shape))
    assert out[key].shape == (*shape, size)
    assert out[key].dtype == torch.float32


def test_default_sizes_are_the_papers() -> None:
    def hidden(module: nn.Module) -> int:
        return next(m for m in module.modules() if isinstance(m, nn.Linear)).out_features

    assert hidden(MLPEncoder(OBS)) == hidden(RewardModel(50, ACT)) == 512
    assert hidden(TransitionClassifier(50, ACT)) == hidden(QValueEnsemble(50, ACT)) == 512
    assert hidden(Actor(50, [-1.0], [1.0])) == 512
    assert hidden(LatentDynamics(50, ACT)) == 1024
    td = MLPEncoder(OBS)(batch(2))
    assert td["latent"].shape == (2, 50)


def test_dynamics_reads_latent_then_action() -> None:
    dynamics = LatentDynamics(LATENT, ACT, MODEL_HIDDEN)
    td = batch(3)
    raw = mlp(LATENT + ACT, 2 * LATENT, MODEL_HIDDEN)
    raw.load_state_dict(dynamics[0].module.state_dict())
    loc, scale = GaussianHead()(raw(torch.cat([td["latent"], td["action"]], -1)))
    dist = dynamics.get_dist(td)
    torch.testing.assert_close(dist.base_dist.loc, loc)
    torch.testing.assert_close(dist.base_dist.scale, scale)


def test_each_value_is_a_network_of_its_own() -> None:
    qvalue = QValueEnsemble(LATENT, ACT, HIDDEN, num_networks=3)
    td = batch(6)
    values = qvalue(td.copy())["state_action_value"]
    assert values.shape == (6, 3)
    assert not torch.allclose(values[:, 0], values[:, 1])
    gradients = torch.autograd.grad(
        values[:, 1].sum(), list(qvalue.parameters()), allow_unused=True
    )
    per_network = len(gradients) // 3
    touched = [g is not None and bool(g.any()) for g in gradients]
    assert touched == [False] * per_network + [True] * per_network + [False] * per_network


def test_several_observations_are_concatenated_in_order() -> None:
    encoder = MLPEncoder(5, LATENT, HIDDEN, in_keys=["joints", ("sensors", "touch")])
    single = MLPEncoder(5, LATENT, HIDDEN)
    single.load_state_dict(encoder.state_dict())
    joints, touch = torch.randn(3, 2), torch.randn(3, 3)
    td = encoder(TensorDict({"joints": joints, ("sensors", "touch"): touch}, batch_size=[3]))
    wanted = single(TensorDict(observation=torch.cat([joints, touch], -1), batch_size=[3]))
    torch.testing.assert_close(td["latent_loc"], wanted["latent_loc"])


def test_nested_keys() -> None:
    keys = {"latent_key": ("s", "z"), "action_key": ("s", "a")}
    td = TensorDict({"obs": {"x": torch.randn(3, OBS)}, "s": {"a": torch.rand(3, ACT)}}, [3])
    MLPEncoder(OBS, LATENT, HIDDEN, in_keys=[("obs", "x")], latent_key=("s", "z"))(td)
    LatentDynamics(LATENT, ACT, HIDDEN, **keys)(td)
    RewardModel(LATENT, ACT, HIDDEN, out_key=("out", "r"), **keys)(td)
    TransitionClassifier(LATENT, ACT, HIDDEN, out_key=("out", "l"), **keys)(td)
    QValueEnsemble(LATENT, ACT, HIDDEN, out_key=("out", "q"), **keys)(td)
    assert td["next", "s", "z"].shape == td["s", "z"].shape == (3, LATENT)
    assert {name: entry.shape[-1] for name, entry in td["out"].items()} == {"r": 1, "l": 2, "q": 2}


@pytest.mark.parametrize("name", ["encoder", "dynamics"])
def test_latents_are_drawn_from_a_bounded_normal(name: str) -> None:
    network = NETWORKS[name]()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    td = batch(1).expand(20_000)
    key = network.out_keys[-1]
    torch.manual_seed(0)
    out = network(td.copy())
    draws, dist = out[key].double(), network.get_dist(td)
    assert isinstance(dist, D.Independent)
    loc, scale = dist.base_dist.loc[0].double(), dist.base_dist.scale[0].double()
    torch.testing.assert_close(
        draws.mean(0), loc, rtol=0, atol=5 * scale.max().item() / 20_000**0.5
    )
    torch.testing.assert_close(draws.std(0), scale, rtol=0.03, atol=0)
    assert out[key].requires_grad
    torch.manual_seed(0)
    assert torch.equal(network(td.copy())[key], out[key])


def test_exploration_type_decides_between_sample_and_mean() -> None:
    encoder, td = MLPEncoder(OBS, LATENT, HIDDEN), batch(3)
    first, second = encoder(td.copy())["latent"], encoder(td.copy())["latent"]
    assert not torch.equal(first, second)
    for mode in (ExplorationType.DETERMINISTIC, ExplorationType.MEAN, ExplorationType.MODE):
        with set_exploration_type(mode):
            out = encoder(td.copy())
        assert torch.equal(out["latent"], out["latent_loc"])


def test_own_bounds_and_networks() -> None:
    head = GaussianHead(loc_bound=1.0, scale_min=0.5, scale_max=0.6)
    encoder = LatentModule(nn.Linear(3, 8), ["pixels"], head=head)
    td = encoder(TensorDict(pixels=100 * torch.randn(50, 3), batch_size=[50]))
    assert td["latent_loc"].abs().max() <= 1
    assert td["latent_scale"].min() >= 0.5


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_answer_in_full_precision_under_autocast(name: str) -> None:
    network, td = NETWORKS[name](), batch(3)
    inputs = set(network.in_keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(td.select(*inputs))
    half = {key for key, value in out.items(True, True) if value.dtype == torch.bfloat16}
    assert {k if isinstance(k, str) else k[-1] for k in half} <= {"latent_params"}
    assert out[network.out_keys[-1]].dtype == torch.float32


def test_large_values_keep_their_differences_under_autocast() -> None:
    """In bfloat16, 400 has neighbors at 398 and 402."""
    torch.manual_seed(0)
    trunk, x = LayerNormMLP(5, 1, HIDDEN), torch.randn(64, 5)
    with torch.no_grad():
        trunk[-1].bias.fill_(400.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = trunk(x)
    torch.testing.assert_close(rounded, trunk(x), rtol=0, atol=0.05)
    assert trunk.bfloat16()(x.bfloat16()).dtype == torch.float32  # weights in half precision


def test_trunk_runs_where_there_is_no_autocast() -> None:
    trunk = LayerNormMLP(5, 2, HIDDEN).to("meta")
    assert trunk(torch.randn(3, 5, device="meta")).shape == (3, 2)


def test_trunk_concatenates_its_inputs() -> None:
    torch.manual_seed(0)
    trunk = LayerNormMLP(5, 2, HIDDEN)
    a, b = torch.randn(3, 2), torch.randn(3, 3)
    torch.testing.assert_close(trunk(a, b), trunk(torch.cat([a, b], -1)))
    assert not torch.allclose(trunk(a, b), trunk(torch.cat([b, a], -1)))


def test_a_network_writes_its_outputs() -> None:
    module = TensorModule(lambda x: (x + 1, 2 * x), in_keys=["x"], out_keys=["y", ("next", "z")])
    written = module(TensorDict(x=torch.ones(3), batch_size=[3]))
    assert written["y"].tolist() == written["next", "z"].tolist() == [2.0] * 3
    target = TensorDict()
    assert module(written, tensordict_out=target) is target
    assert {*target.keys(True, True)} == {"y", ("next", "z")}
    assert [value.tolist() for value in module(x=torch.ones(1))] == [[2.0], [2.0]]
    with pytest.raises(KeyError, match='"x" not found'):
        module(TensorDict(y=torch.ones(3)))
    with pytest.raises(ValueError, match="returned 1 outputs; expected .'y', 'z'"):
        TensorModule(nn.Identity(), in_keys=["x"], out_keys=["y", "z"])(x=torch.ones(1))


@pytest.mark.parametrize("norm_class", [None, nn.LayerNorm])
def test_gradients_are_those_of_elu_out_of_place(norm_class: type[nn.Module] | None) -> None:
    network = mlp(3, 2, 8, norm_class=norm_class).double()
    found = []
    for inplace in (None, False):
        for layer in network.modules():
            if isinstance(layer, nn.ELU) and inplace is not None:
                layer.inplace = inplace
        x = torch.linspace(-3, 3, 15, dtype=torch.float64).reshape(5, 3).requires_grad_()
        found.append(torch.autograd.grad(network(x).square().sum(), [x, *network.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)

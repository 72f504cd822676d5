"""Every encoder of the package through all that an agent does with one, on real transitions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.envs import CatFrames, EnvBase, ObservationTransform, Transform
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from alm_torchrl.agent import ALMAgent
from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.envs import History, make_env
from alm_torchrl.modules import (
    CategoricalHead,
    FrozenEncoder,
    IdentityEncoder,
    LatentModule,
    LayerNormHead,
    LinearEncoder,
    MLPEncoder,
    MultiInputEncoder,
    PixelEncoder,
    RecurrentEncoder,
    SimplicialHead,
    WindowEncoder,
    state_primer,
)
from alm_torchrl.objectives import ALMLoss, check_encoder
from alm_torchrl.objectives.functional import kl_divergence
from alm_torchrl.training import StackedAgent, StackedLoss

SIDE = 20


class Drawn(ObservationTransform):
    """An image of the pendulum, drawn from its state without a renderer."""

    def __init__(self) -> None:
        super().__init__(in_keys=["observation"], out_keys=["pixels"])

    def _apply_transform(self, observation: Tensor) -> Tensor:
        grid = torch.linspace(-1.3, 1.3, SIDE)
        tip = observation[..., :2, None]
        distance = (grid - tip[..., 1, :]).square()[..., None, :] + (
            (-grid - tip[..., 0, :]).square()[..., :, None]
        )
        return (255 * torch.exp(-8 * distance)).to(torch.uint8)[..., None, :, :]

    def _reset(self, tensordict: TensorDict, tensordict_reset: TensorDict) -> TensorDict:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, spec: Any) -> Any:
        shape = (*spec.shape, 1, SIDE, SIDE)
        spec["pixels"] = Bounded(0, 255, shape=shape, dtype=torch.uint8)
        return spec


class Case(NamedTuple):
    """An encoder, and the transforms that its environment needs."""

    build: Callable[..., nn.Module]
    transforms: Callable[[], list[Transform]] = list
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    described: bool = True
    lr: float = 3e-3  # to learn with in 200 updates
    falls: float = 0.3  # by how much the world model's loss then falls at least


def drawn() -> list[Transform]:
    return [Drawn(), CatFrames(2, dim=-3, in_keys=["pixels"])]


def own(spec: Any, **_: Any) -> nn.Module:
    """As a user would write one."""
    network = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 16))
    return LatentModule(network, in_keys=["observation"])


def pretrained() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 5, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))


CONV = {"channels": 4, "feature_dim": 8, "pad": 2}
CASES = {
    "mlp": Case(MLPEncoder.from_spec),
    "normalized": Case(MLPEncoder.from_spec, options={"normalize": True}),
    "linear": Case(LinearEncoder.from_spec),
    "identity": Case(IdentityEncoder.from_spec, options={"normalize": True, "scale": 0.3}),
    "without_tensors": Case(IdentityEncoder.from_spec, options={"scale": 0.3}),
    "pixels": Case(PixelEncoder.from_spec, drawn, CONV, lr=3e-4),
    "plain_pixels": Case(PixelEncoder.from_spec, drawn, {**CONV, "normalize": False}, lr=3e-4),
    "pixels_and_vector": Case(MultiInputEncoder.from_spec, drawn, CONV, lr=3e-4),
    "window": Case(
        WindowEncoder.from_spec, lambda: [History(), CatFrames(4, dim=-2, in_keys=["history"])]
    ),
    "recurrent": Case(RecurrentEncoder.from_spec, lambda: [state_primer(16)]),
    "discrete": Case(MLPEncoder.from_spec, options={"head": CategoricalHead(classes=4)}),
    "discrete_pixels": Case(
        PixelEncoder.from_spec,
        drawn,
        {**CONV, "head": CategoricalHead(classes=4)},
        falls=0.09,  # from 0.37
    ),
    "simplicial": Case(MLPEncoder.from_spec, options={"head": SimplicialHead(classes=4)}),
    "layer_norm": Case(MLPEncoder.from_spec, options={"head": LayerNormHead()}),
    "frozen": Case(FrozenEncoder.from_spec, drawn, {"module": pretrained()}, described=False),
    "own": Case(own, described=False),
}
NORMALISED = ("normalized", "identity", "pixels", "pixels_and_vector", "discrete_pixels")
GROUPS = {
    "loss_world_model": {"encoder_params", "dynamics_params"},
    "loss_reward": {"reward_model_params"},
    "loss_classifier": {"classifier_params"},
    "loss_value": {"qvalue_network_params"},
    "loss_actor": {"actor_params"},
}


def environment(case: Case, **options: Any) -> EnvBase:
    env = make_env("Pendulum-v1", max_episode_steps=7, seed=0, **options)
    for transform in case.transforms():
        env.append_transform(transform)
    return env


class World(NamedTuple):
    case: Case
    env: EnvBase
    agent: ALMAgent
    loss: ALMLoss
    data: TensorDict
    batch: TensorDict


def build(which: str | Case, frames: int = 150, **options: Any) -> World:
    torch.manual_seed(0)
    case = which if isinstance(which, Case) else CASES[which]
    env = environment(case)
    spec = env.observation_spec_unbatched
    encoder = case.build(spec, latent_dim=8, hidden_dim=16, **case.options)
    agent = ALMAgent.from_env(env, encoder=encoder, hidden_dim=16, dynamics_hidden_dim=16)
    collector = make_collector(env, agent.policy(), frames_per_batch=frames)
    data = next(iter(collector))
    agent.update_statistics(data)
    replay = make_replay_buffer(frames, batch_size=64, window_length=2, seed=0)
    replay.extend(data)
    loss = ALMLoss(**agent.networks(), **{"horizon": 2, **options})
    SoftUpdate(loss, tau=0.005)
    return World(case, env, agent, loss, data, replay.sample())


@pytest.fixture(scope="module", params=CASES)
def world(request: pytest.FixtureRequest) -> World:
    return build(request.param)


def gradients(loss: ALMLoss, value: Tensor) -> dict[str, Tensor]:
    loss.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}


def test_it_is_what_the_contract_asks_for(world: World) -> None:
    for environment_of_it in (world.env, environment(world.case, num_envs=2)):
        size = check_encoder(
            world.agent.encoder,
            environment_of_it.observation_spec,
            world.agent.dynamics,
            action_spec=world.env.action_spec,
        )
        assert size == world.agent.config.latent_dim


def test_a_collector_stores_what_the_loss_reads_and_nothing_else(world: World) -> None:
    assert not world.batch["validity_mask"].all()  # windows that an episode's end cuts short
    read = {key if isinstance(key, tuple) else (key,) for key in world.loss.in_keys}
    stored = {key if isinstance(key, tuple) else (key,) for key in world.batch.keys(True, True)}
    assert read <= stored
    assert not any("latent" in part for key in stored for part in key)


def test_each_loss_is_finite_and_trains_its_own_networks(world: World) -> None:
    out = world.loss(world.batch)
    assert all(value.isfinite().all() for value in out.values())
    assert out["latent_spread"] > 0
    assert out["prior_entropy"].isfinite()
    for name, wanted in GROUPS.items():
        found = gradients(world.loss, world.loss(world.batch)[name])
        assert all(value.isfinite().all() for value in found.values())
        moved = {key.split(".")[0] for key, value in found.items() if value.abs().max() > 0}
        has = {key.split(".")[0] for key, _ in world.loss.named_parameters()}
        assert moved == wanted & has, name
    world.loss.zero_grad()


def test_the_same_batch_gives_the_same_losses_and_moves_no_statistics(world: World) -> None:
    before = {name: value.clone() for name, value in world.agent.named_buffers()}
    for mode in (ExplorationType.DETERMINISTIC, ExplorationType.RANDOM):
        world.loss.deterministic_sampling_mode = mode
        found = []
        for _ in range(2):
            torch.manual_seed(0)
            found.append(world.loss(world.batch).detach())
        assert (found[0] == found[1]).all()
    assert all(torch.equal(before[name], value) for name, value in world.agent.named_buffers())


def test_losses_under_autocast_are_float32_and_close(world: World) -> None:
    world.loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    try:
        wanted = world.loss.world_model_loss(world.batch)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = world.loss(world.batch)
    finally:
        world.loss.deterministic_sampling_mode = ExplorationType.RANDOM
    assert all(out[name].dtype == torch.float32 for name in GROUPS)
    assert all(value.isfinite().all() for value in out.values())
    found = gradients(world.loss, sum(out[name] for name in GROUPS))
    assert all(value.isfinite().all() for value in found.values())
    if "discrete" not in str(world.agent.encoder.dist_params_keys):
        assert out["loss_world_model"].item() == pytest.approx(wanted.item(), rel=0.1, abs=0.3)


def act(agent: ALMAgent, env: EnvBase) -> Tensor:
    torch.manual_seed(3)
    env.set_seed(3)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return env.rollout(6, agent.policy())["action"]


def test_saved_and_loaded_it_acts_the_same(world: World, tmp_path: Path) -> None:
    world.agent.save(tmp_path / "agent.pt")
    encoder = None
    if not world.case.described:
        with pytest.raises(ValueError, match=r"pass encoder=\.\.\."):
            ALMAgent.load(tmp_path / "agent.pt")
        encoder = world.case.build(
            world.env.observation_spec_unbatched,
            latent_dim=8,
            hidden_dim=16,
            **{**world.case.options, **({"module": pretrained()} if world.case.options else {})},
        )
    components = {} if encoder is None else {"encoder": encoder}
    loaded = ALMAgent.load(tmp_path / "agent.pt", **components)
    assert type(loaded.encoder) is type(world.agent.encoder)
    assert loaded.encoder.head == world.agent.encoder.head == loaded.dynamics.head
    assert torch.equal(act(loaded, world.env), act(world.agent, world.env))


def assert_compiles(world: World, call: Callable[[TensorDict], Tensor], backend: str) -> None:
    """Compiled as one graph, a value and its gradients are those of eager; drawn, they are new."""
    torch._dynamo.reset()
    world.loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    found = []
    for way in (call, compiled):
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            value = way(world.batch)
        found.append({"value": value.detach(), **gradients(world.loss, value)})
    world.loss.deterministic_sampling_mode = ExplorationType.RANDOM
    world.loss.zero_grad()
    assert found[0].keys() == found[1].keys()
    for key, wanted in found[0].items():
        floor = 1e-4 * wanted.abs().max().item() + 1e-6
        torch.testing.assert_close(found[1][key], wanted, rtol=0, atol=floor)
    torch._dynamo.reset()


@pytest.mark.slow
def test_encoding_and_divergence_compile_as_one_graph(world: World) -> None:
    encoder, prior = world.agent.encoder, None

    def call(batch: TensorDict) -> Tensor:
        dist = encoder.get_dist(batch.select(*encoder.in_keys))
        divergence = kl_divergence(dist, prior).mean()
        return divergence + (dist.deterministic_sample**3 + dist.rsample().detach() * 0).mean()

    with torch.no_grad():
        prior = encoder.get_dist(world.batch.flip(0).select(*encoder.in_keys))
    if any(True for _ in encoder.parameters()):
        assert_compiles(world, call, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("discrete", "inductor"), ("window", "aot_eager")])
def test_the_world_model_loss_compiles_as_one_graph(name: str, backend: str) -> None:
    world = build(name, horizon=1)
    assert_compiles(world, lambda batch: world.loss.world_model_loss(batch)[0], backend)


@pytest.mark.parametrize("name", CASES)
def test_seeds_trained_at_once_have_the_losses_that_they_have_alone(name: str) -> None:
    worlds = [build(name, frames=70) for _ in range(2)]
    losses, batches = [world.loss for world in worlds], [world.batch for world in worlds]
    for loss in losses:
        loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    wanted = torch.stack([loss(batch) for loss, batch in zip(losses, batches, strict=True)])
    stacked = StackedLoss(losses)
    found = stacked(torch.stack(batches))
    torch.testing.assert_close(found["loss_world_model"], wanted["loss_world_model"])
    for loss in losses:
        loss.deterministic_sampling_mode = ExplorationType.RANDOM
    sum(stacked(torch.stack(batches))[name].sum() for name in GROUPS).backward()
    policy = StackedAgent([world.agent for world in worlds]).policy()
    assert policy(worlds[0].data[:4].exclude("action"))["action"].shape == (4, 1)


@pytest.mark.parametrize("name", NORMALISED)
def test_seeds_have_statistics_of_their_own(name: str) -> None:
    alone, together = ([build(name, frames=70) for _ in range(2)] for _ in range(2))
    stacked = StackedLoss([world.loss for world in together])
    data = torch.stack([world.data[20 * i : 20 * i + 10] for i, world in enumerate(alone)])
    StackedAgent([world.agent for world in together]).update_statistics(data)
    for i, world in enumerate(alone):
        world.agent.update_statistics(data[i])
    wanted, found = ([dict(w.agent.named_buffers()) for w in ws] for ws in (alone, together))
    assert not all(torch.equal(value, wanted[1][key]) for key, value in wanted[0].items())
    torch.testing.assert_close(found, wanted)
    batches = torch.stack([world.batch for world in alone])
    for loss in (world.loss for world in (*alone, *together)):
        loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    losses = torch.stack([world.loss(world.batch) for world in alone])
    assert_close = torch.testing.assert_close
    assert_close(stacked(batches)["loss_world_model"], losses["loss_world_model"])
    moved = copy.deepcopy(stacked).double().float()
    moved.losses[0].encoder.update_statistics(data[1])
    for key, value in moved.losses[0].target_encoder_params.items(True, True):
        if not moved.losses[0].encoder_params[key].requires_grad:
            assert torch.equal(value, moved.losses[0].encoder_params[key])
    assert not torch.equal(moved(batches)["loss_world_model"][0], losses["loss_world_model"][0])
    assert_close(stacked(batches)["loss_world_model"], losses["loss_world_model"])


@pytest.mark.parametrize("name", CASES)
def test_updates_reduce_the_world_model_loss(name: str) -> None:
    world = build(name, frames=200, horizon=1)
    replay = make_replay_buffer(200, batch_size=16, window_length=1, seed=0)
    replay.extend(world.data[:150])
    unseen = world.data[150:]
    group = world.loss.parameter_groups()["world_model"]
    optimizer = torch.optim.Adam(group, lr=world.case.lr)
    target_update = SoftUpdate(world.loss, tau=0.01)

    def evaluate() -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            return world.loss.world_model_loss(unseen)[0].item()

    before = evaluate()
    for _ in range(200):
        world.loss.world_model_loss(replay.sample())[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        target_update.step()
    assert evaluate() < before - world.case.falls


@pytest.mark.slow
def test_images_tell_reward_and_next_latent_of_transitions_never_seen() -> None:
    """Both beat the best constant, which a latent that all images share could not."""
    options = {"channels": 8, "feature_dim": 16, "pad": 1}
    world = build(CASES["pixels"]._replace(options=options), frames=1000, horizon=1)
    seen, unseen = world.data[:800], world.data[800:]
    replay = make_replay_buffer(800, batch_size=64, window_length=1, seed=0)
    replay.extend(seen)
    loss, encoder = world.loss, world.agent.encoder
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    target_update = SoftUpdate(loss, tau=0.02)
    for _ in range(500):
        out = loss(replay.sample())
        sum(out[name] for name in GROUPS).backward()
        optimizer.step()
        optimizer.zero_grad()
        target_update.step()
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        now, following = encoder(unseen.copy()), encoder(unseen["next"].copy())["latent"]
        reward = world.agent.reward_model(now.copy())["predicted_reward"]
        prior = world.agent.dynamics(now)["next", "latent"]
    for found, wanted in ((reward, unseen["next", "reward"]), (prior, following)):
        error = (found - wanted).square().sum(-1).mean()
        assert error < 0.3 * (wanted - wanted.mean(0)).square().sum(-1).mean()

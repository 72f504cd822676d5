"""What is particular to each encoder, its head and its memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Binary, Bounded, Composite, OneHot, TensorSpec, Unbounded
from torchrl.envs import CatFrames, Compose, EnvBase, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules.utils import get_primers_from_module
from torchrl.objectives import SoftUpdate
from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv

from alm_torchrl.agent import AgentConfig, ALMAgent
from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.envs import History, make_env
from alm_torchrl.modules import (
    CategoricalHead,
    ConvNet,
    FixedScaleHead,
    FrozenEncoder,
    GaussianHead,
    IdentityEncoder,
    LatentDynamics,
    LatentHead,
    LayerNormHead,
    LinearEncoder,
    MLPEncoder,
    MultiInputEncoder,
    PixelEncoder,
    RandomShift,
    RecurrentEncoder,
    RunningNorm,
    SimplicialHead,
    WindowEncoder,
    state_primer,
)
from alm_torchrl.modules.rebuildable import describe, rebuild
from alm_torchrl.objectives import ALMLoss, check_encoder

HEADS = [
    GaussianHead(5.0, 0.2, 2.0),
    FixedScaleHead(0.3),
    LayerNormHead(0.7),
    SimplicialHead(0.2, 4, 2.0),
    CategoricalHead(4, 0.05),
]


def images(*batch: int, channels: int = 3, side: int = 20) -> torch.Tensor:
    return torch.randint(256, (*batch, channels, side, side), dtype=torch.uint8)


# ------------------------------------------------------------------------------ heads


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_a_head_serves_encoder_and_dynamics_and_is_described(head: LatentHead) -> None:
    assert isinstance(head, LatentHead)
    encoder = MLPEncoder(3, 8, 16, head=head)
    dynamics = LatentDynamics(8, 2, 16, head=encoder.head)
    state = TensorDict(observation=torch.randn(5, 3), action=torch.rand(5, 2), batch_size=[5])
    latent = encoder(state)["latent"]
    assert latent.shape == dynamics(state)["next", "latent"].shape == (5, 8)
    divergence = torch.distributions.kl_divergence(
        dynamics.get_dist(state), encoder.get_dist(state)
    )
    assert divergence.shape == (5,)
    assert (divergence >= -1e-6).all()
    assert rebuild(describe(head)) == head
    again = rebuild(describe(dynamics))
    assert (again.head, again.latent_dim, again.action_dim) == (head, 8, 2)


def test_normalized_locations_lie_where_they_should() -> None:
    raw = 10 * torch.randn(6, 8)
    simplices = SimplicialHead(classes=4)(raw)[0].unflatten(-1, (2, 4))
    torch.testing.assert_close(simplices.sum(-1), torch.ones(6, 2))
    assert (simplices >= 0).all()
    normed = LayerNormHead()(raw)[0]
    torch.testing.assert_close(normed.mean(-1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(-1, correction=0), torch.ones(6), atol=1e-3, rtol=0)
    assert SimplicialHead(classes=4)(raw.bfloat16())[0].dtype == torch.float32
    assert CategoricalHead(classes=4)(raw.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GaussianHead(scale_min=2.0, scale_max=1.0), "scale_min"),
        (lambda: FixedScaleHead(0.0), r"expected scale > 0, got FixedScaleHead\(scale=0.0\)"),
        (lambda: SimplicialHead(classes=1), "at least 2 classes"),
        (lambda: CategoricalHead(unimix=1.0), r"unimix in \[0, 1\)"),
        (lambda: MLPEncoder(3, 50, head=CategoricalHead(8)), "classes=8; use latent_dim=48"),
        (lambda: MLPEncoder(3, 50, head=SimplicialHead(classes=8)), "use latent_dim=48"),
    ],
)
def test_a_head_that_cannot_be_is_refused(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_the_agent_gives_the_dynamics_the_encoders_head() -> None:
    config = AgentConfig({"observation": 3}, (-1.0,), (1.0,), latent_dim=8, hidden_dim=8)
    agent = ALMAgent(config, encoder=MLPEncoder(3, 8, 8, head=CategoricalHead(4)))
    assert agent.dynamics.head == CategoricalHead(4)
    assert ALMAgent(config).dynamics.head == GaussianHead()


# ------------------------------------------------------------------------ description


def test_a_component_made_from_what_is_not_plain_is_not_described() -> None:
    class Own(MLPEncoder):
        pass

    class OwnHead(FixedScaleHead):
        pass

    for own in (Own(3), MLPEncoder(3, head=OwnHead()), nn.Linear(3, 3)):
        with pytest.raises(TypeError, match="it is not a component of alm_torchrl"):
            describe(own)
    with pytest.raises(ValueError, match="no component 'Fancy'; upgrade"):
        rebuild({"component": "Fancy"})


def test_a_description_holds_nested_keys_and_further_options() -> None:
    key = ("agents", "pixels")
    encoder = PixelEncoder(torch.Size([3, 20, 20]), 8, 8, in_keys=[key], channels=4, pad=1)
    again = rebuild(describe(encoder))
    assert again.in_keys == encoder.in_keys == [key]
    again.load_state_dict(encoder.state_dict())


# ----------------------------------------------------------------------------- pixels


def test_a_shift_moves_all_frames_of_an_image_alike_and_images_apart() -> None:
    torch.manual_seed(0)
    position = torch.arange(20 * 20, dtype=torch.int32).reshape(20, 20)
    stack = torch.stack([position, position + 1000]).expand(64, 2, 20, 20)
    shifted = RandomShift(3)(stack)
    assert torch.equal(shifted[:, 1] - shifted[:, 0], torch.full_like(shifted[:, 0], 1000))
    middle = shifted[:, 0, 10, 10]  # tells by how much an image was moved
    rows, columns = middle // 20 - 10, middle % 20 - 10
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(-3, 4))
    down = (rows == 3).nonzero()[0, 0]  # the border is repeated
    assert torch.equal(shifted[down, 0, -1], shifted[down, 0, -4])
    assert torch.equal(RandomShift(0)(stack), stack)
    with pytest.raises(ValueError, match="at least 0"):
        RandomShift(-1)


def test_a_shift_equals_padding_and_cropping() -> None:
    pixels = images(16)
    torch.manual_seed(3)
    shifted = RandomShift(2)(pixels)
    torch.manual_seed(3)
    shift = torch.randint(-2, 3, (2, 16, 1))
    padded = nn.functional.pad(pixels.float(), (2, 2, 2, 2), mode="replicate")
    for image, (row, column) in enumerate(zip(*shift.squeeze(-1).tolist(), strict=True)):
        crop = padded[image, :, 2 + row : 22 + row, 2 + column : 22 + column]
        assert torch.equal(shifted[image].float(), crop)


def test_images_are_shifted_in_the_losses_and_never_when_acting() -> None:
    encoder = PixelEncoder((3, 20, 20), 4, 8, channels=4)
    state = TensorDict(pixels=images(6), batch_size=[6])

    def location(module: nn.Module) -> torch.Tensor:
        return module.get_dist_params(state.copy())["latent_loc"].detach()

    with set_exploration_type(ExplorationType.RANDOM):
        assert not torch.equal(location(encoder), location(encoder))
        unshifted = location(encoder.eval())
        assert torch.equal(location(encoder), unshifted)
        encoder.train()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(location(encoder), unshifted)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", [None, *ExplorationType])
def test_a_policy_sees_images_unchanged(
    normalize: bool, mode: ExplorationType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AgentConfig({}, (-1.0,), (1.0,), latent_dim=4, hidden_dim=8)
    encoder = PixelEncoder((3, 20, 20), 4, 8, channels=4, normalize=normalize)
    agent = ALMAgent(config, encoder=encoder)
    encoder.update_statistics(TensorDict(pixels=images(6), batch_size=[6]))
    seen = TensorDict(pixels=images(2), batch_size=[2])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        dist = encoder.get_dist(seen.copy())
    monkeypatch.setattr(RandomShift, "forward", None)  # a call raises a TypeError
    policy = agent.policy()
    with set_exploration_type(mode):
        torch.manual_seed(1)
        action = policy(seen)["action"]
        torch.manual_seed(1)
        wanted = agent.actor.acting()(TensorDict(latent=dist.rsample(), batch_size=[2]))["action"]
    assert torch.equal(action, wanted)
    assert {id(p) for p in encoder.parameters()} <= {id(p) for p in policy.parameters()}


def test_bytes_are_scaled_and_sizes_follow_the_image() -> None:
    network = ConvNet((9, 84, 84), channels=2)
    assert network.trunk.in_features == 2 * 35 * 35
    small = ConvNet((3, 32, 32), channels=2)
    assert small.trunk.in_features == 2 * 9 * 9
    pixels = images(2, 5, side=32)
    torch.testing.assert_close(small(pixels), small(pixels.float() / 255 - 0.5))
    assert small(pixels[0, 0]).shape == (50,)
    with pytest.raises(ValueError, match=r"move channels first with .*PermuteTransform"):
        ConvNet((84, 84, 3))


def test_vectors_beside_images_are_read_as_they_are() -> None:
    encoder = MultiInputEncoder({"joints": (5,), "pixels": (3, 20, 20)}, 4, 8, channels=4)
    state = TensorDict(joints=torch.randn(6, 5), pixels=images(6), batch_size=[6])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        before = encoder.get_dist_params(state.copy())["latent_loc"]
        state["joints"] += 1
        assert not torch.equal(encoder.get_dist_params(state)["latent_loc"], before)
    with pytest.raises(ValueError, match=r"shapes must be images .* got \{'window': \(4, 5\)\}"):
        MultiInputEncoder({"window": (4, 5)})


# ----------------------------------------------------------------------------- memory


def counting_env(steps: int = 5) -> TransformedEnv:
    return TransformedEnv(ContinuousActionVecMockEnv(), StepCounter(steps))


def test_a_window_is_the_last_observations_and_is_trained_throughout() -> None:
    env = TransformedEnv(
        ContinuousActionVecMockEnv(), Compose(History(), CatFrames(3, dim=-2, in_keys=["history"]))
    )
    rollout = env.rollout(5)
    seen = rollout["observation"]
    assert torch.equal(rollout["history"][3], seen[1:4])
    assert torch.equal(rollout["history"][0], seen[0].expand(3, -1))
    window = torch.randn(2, 3, 4, requires_grad=True)
    params = WindowEncoder(4, 8, 16).get_dist_params(TensorDict(history=window, batch_size=[2]))
    params["latent_loc"].sum().backward()
    assert (window.grad.abs().sum((0, 2)) > 0).all()


@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_state_is_primed_handed_on_and_stored(num_envs: int) -> None:
    torch.manual_seed(0)
    limits = [4, 7][:num_envs]  # the environments are reset at different times
    makes = [lambda steps=steps: counting_env(steps) for steps in limits]
    env = TransformedEnv(SerialEnv(2, makes) if num_envs == 2 else makes[0](), state_primer(16))
    encoder = RecurrentEncoder.from_spec(env.observation_spec_unbatched, latent_dim=4)
    assert encoder.hidden_dim == 16
    agent = ALMAgent.from_env(env, encoder=encoder, hidden_dim=8)
    collector = make_collector(env, agent.policy(), frames_per_batch=12 * num_envs)
    data = next(iter(collector)).reshape(num_envs, 12)
    states, following = data["recurrent_state"], data["next", "recurrent_state"]
    done = data["next", "done"].squeeze(-1)
    for index, steps in enumerate(limits):
        assert done[index].nonzero()[0, 0] == steps - 1
    assert (states[:, 0] == 0).all()
    assert (following.abs().sum((-1, -2)) > 0).all()
    expected = torch.where(done[:, :-1, None, None], 0, following[:, :-1])
    assert torch.equal(states[:, 1:], expected)
    replay = make_replay_buffer(12 * num_envs, batch_size=4, num_envs=num_envs)
    replay.extend(data if num_envs == 2 else data[0])
    batch = replay.sample()
    assert batch["next", "recurrent_state"].shape == (4, 3, 1, 16)
    loss = ALMLoss(**agent.networks())
    loss.world_model_loss(batch)[0].backward()
    assert agent.encoder.network.cell.weight_hh.grad.abs().max() > 0


def test_the_primer_is_found_as_torchrls_is() -> None:
    encoder = RecurrentEncoder(3, 4, 16, state_key="memory")
    primer = get_primers_from_module(nn.ModuleDict({"encoder": encoder}))
    assert primer.primers["memory"].shape == (1, 16)


def test_random_frames_leave_the_state_at_zero() -> None:
    env = TransformedEnv(counting_env(), state_primer(8))
    encoder = RecurrentEncoder.from_spec(env.observation_spec_unbatched, latent_dim=4)
    agent = ALMAgent.from_env(env, encoder=encoder, hidden_dim=8)
    collector = make_collector(
        env, agent.policy(), frames_per_batch=4, init_random_frames=4, total_frames=8
    )
    random, acted = list(collector)
    assert (random["next", "recurrent_state"] == 0).all()
    assert (acted["next", "recurrent_state"] != 0).any()


# ---------------------------------------------------------------------- normalization


def test_statistics_are_those_of_all_that_was_seen() -> None:
    torch.manual_seed(0)
    norm, seen = RunningNorm(3).double(), []
    for size in (1, 5, 40, 2):
        seen.append(torch.randn(size, 2, 3, dtype=torch.float64) * 4 + 2)
        norm.update(seen[-1])
    everything = torch.cat([x.reshape(-1, 3) for x in seen])
    torch.testing.assert_close(norm.mean, everything.mean(0))
    torch.testing.assert_close(norm.variance, everything.var(0, correction=0))
    assert norm(torch.full((3,), 1e9, dtype=torch.float64)).tolist() == [10.0] * 3


def test_an_image_has_a_mean_for_every_pixel_and_one_variance() -> None:
    torch.manual_seed(0)
    norm, seen = RunningNorm(3, 20, 20), images(2, 50)
    seen[..., 0, :10, :] = 200  # what never moves
    for part in seen.unbind():
        norm.update(part)
    scaled = seen.flatten(0, 1) / 255 - 0.5
    torch.testing.assert_close(norm.mean, scaled.mean(0))
    torch.testing.assert_close(norm.variance, (scaled - scaled.mean(0)).square().mean())
    normalized = norm(seen)
    assert normalized[..., 0, :10, :].abs().max() < 1e-5
    assert normalized.square().mean().item() == pytest.approx(1, abs=1e-3)


def test_images_are_centered_before_they_are_shifted() -> None:
    """A shift after the mean is taken away leaves a background that never moves at 0."""
    torch.manual_seed(0)
    encoder = PixelEncoder((3, 20, 20), 4, 8, channels=4, normalize=True)
    still = images(1).expand(6, -1, -1, -1)
    encoder.update_statistics(TensorDict(pixels=still, batch_size=[6]))
    shifted = encoder.get_dist_params(TensorDict(pixels=still, batch_size=[6]))["latent_loc"]
    torch.testing.assert_close(shifted, shifted[:1].expand(6, -1), rtol=0, atol=1e-3)


def test_statistics_move_when_told_for_encoder_and_target_alike() -> None:
    config = AgentConfig({"observation": 3}, (-1.0,), (1.0,), latent_dim=4, hidden_dim=8)
    agent = ALMAgent(config, encoder=MLPEncoder(3, 4, 8, normalize=True))
    loss = ALMLoss(**agent.networks())
    target_update = SoftUpdate(loss, tau=0.5)
    data = TensorDict(observation=3 + torch.randn(50, 3), batch_size=[50])
    agent.update_statistics(data)
    target_update.step()
    mean = data["observation"].mean(0)
    for params in (loss.encoder_params, loss.target_encoder_params):
        found = params["module", "0", "module", "norms", "0", "mean"]
        torch.testing.assert_close(found, mean)
    again = ALMLoss(**agent.networks())
    again.load_state_dict(loss.state_dict())
    ALMAgent(config).update_statistics(data)  # an encoder without any lets it pass


# ------------------------------------------------------------------ frozen, and specs


def test_a_frozen_module_is_neither_trained_nor_changed() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 5, 4), nn.BatchNorm2d(2))
    encoder = FrozenEncoder(module, (3, 20, 20), 4, 8)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    encoder.train()
    params = encoder.get_dist_params(TensorDict(pixels=images(2, 3), batch_size=[2, 3]))
    params["latent_loc"].sum().backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    config = AgentConfig({}, (-1.0,), (1.0,), latent_dim=4, hidden_dim=8)
    loss = ALMLoss(**ALMAgent(config, encoder=encoder).networks())
    trained = {id(p) for group in loss.parameter_groups().values() for p in group}
    assert not trained & {id(p) for p in module.parameters()}
    weight = ("module", "0", "module", "0", "module", "0", "weight")
    copies = [loss.encoder_params[weight], loss.target_encoder_params[weight]]
    assert copies[0].data_ptr() == copies[1].data_ptr()  # one copy in memory
    with pytest.raises(ValueError, match=r"cannot read a batch of observations \(1, 2, 20, 20\)"):
        FrozenEncoder(module, (2, 20, 20))
    with pytest.raises(ValueError, match="reads one observation"):
        FrozenEncoder(module, (3, 20, 20), in_keys=["a", "b"])


SPEC = Composite(
    position=Unbounded(3),
    velocity=Unbounded(2),
    pixels=Unbounded((3, 20, 20), dtype=torch.uint8),
    depth=Unbounded((1, 20, 20)),
    step_count=Unbounded(1, dtype=torch.int64),
)


@pytest.mark.filterwarnings("ignore:the encoder reads the observations")
def test_sizes_come_from_the_spec() -> None:
    assert MLPEncoder.from_spec(SPEC, latent_dim=4).in_keys == ["position", "velocity"]
    assert IdentityEncoder.from_spec(SPEC).latent_dim == 5
    small = {"channels": 2, "hidden_dim": 8}
    assert PixelEncoder.from_spec(SPEC, in_keys=["depth"], **small).in_keys == ["depth"]
    everything = MultiInputEncoder.from_spec(SPEC, **small)
    assert set(everything.in_keys) == {"position", "velocity", "pixels", "depth"}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PixelEncoder.from_spec(SPEC), "images have different.*use MultiInputEncoder"),
        (
            lambda: WindowEncoder.from_spec(SPEC),
            "no observation of 2 dimensions; found .*add a transform",
        ),
        (
            lambda: MLPEncoder.from_spec(SPEC, in_keys=["pixels"]),
            "no observation 'pixels' of 1 dimensions; found",
        ),
        (
            lambda: MLPEncoder.from_spec(SPEC, in_keys=["angle"]),
            "no observation 'angle' of 1 dimensions",
        ),
        (lambda: RecurrentEncoder.from_spec(SPEC), r"append alm_torchrl.modules.state_primer"),
    ],
)
def test_a_spec_that_does_not_fit_is_named(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


# ------------------------------------------------------------------ observations of other numbers


def mixed_spec() -> Composite:
    return Composite(
        vector=Unbounded((2,)),
        goal=OneHot(4),
        bits=Binary(3, dtype=torch.int8),
        counts=Bounded(0, 9, (2,), dtype=torch.int32),
        flags=Unbounded((2,), dtype=torch.bool),
        bytes=Unbounded((5,), dtype=torch.uint8),
        step_count=Unbounded((1,), dtype=torch.int64),
    )


READ = {"vector": 2, "goal": 4, "bits": 3, "counts": 2, "flags": 2, "bytes": 5}


class Mixed(EnvBase):
    """Observes numbers of every kind."""

    def __init__(self, **more: TensorSpec) -> None:
        super().__init__()
        self.observation_spec = mixed_spec().update(more)
        self.action_spec = Bounded(-1, 1, (1,))
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict=None, **kwargs):
        return self.observation_spec.rand()

    def _step(self, tensordict):
        ends = {"reward": torch.zeros(1), "done": torch.zeros(1, dtype=torch.bool)}
        return self.observation_spec.rand().update(ends)

    def _set_seed(self, seed):
        torch.manual_seed(seed)


def test_vectors_of_every_kind_are_read_in_both_paths() -> None:
    agent = ALMAgent.from_env(Mixed(), latent_dim=4, hidden_dim=8, dynamics_hidden_dim=8)
    assert agent.config.observation_dims == READ
    data = Mixed().rollout(4)
    for encoder in (
        agent.encoder,
        *(
            kind.from_spec(mixed_spec(), latent_dim=18, hidden_dim=8, normalize=normalize)
            for kind in (MLPEncoder, LinearEncoder, IdentityEncoder, MultiInputEncoder)
            for normalize in (False, True)
        ),
    ):
        assert list(encoder.in_keys) == list(READ)
        encoder.update_statistics(data)
        check_encoder(encoder, mixed_spec())
        goal = encoder.get_dist(data).mean
        data["goal"] = data["goal"].roll(1, -1)
        assert not torch.equal(encoder.get_dist(data).mean, goal)


@pytest.mark.parametrize(
    "encoder",
    [
        MLPEncoder(3, 4, 8, in_keys=["vector"], normalize=True),
        LinearEncoder(3, 4, in_keys=["vector"]),
        PixelEncoder((3, 20, 20), 4, 8, channels=2),
        MultiInputEncoder({"vector": (3,), "pixels": (3, 20, 20)}, 4, 8, channels=2),
        WindowEncoder(3, 4, 8),
        RecurrentEncoder(3, 4, 8, in_keys=["vector"]),
        FrozenEncoder(nn.Flatten(), (3,), 4, 8, in_keys=["vector"]),
        FrozenEncoder(nn.Linear(3, 6), (3,), 4, 8, in_keys=["vector"]),
    ],
    ids=lambda encoder: type(encoder).__name__,
)
def test_double_precision_is_cast_to_the_dtype_of_the_weights(encoder: nn.Module) -> None:
    single = TensorDict(
        vector=torch.randn(5, 3),
        pixels=torch.rand(5, 3, 20, 20),
        history=torch.randn(5, 4, 3),
        recurrent_state=torch.zeros(5, 1, 8),
        batch_size=[5],
    )
    double = single.double()
    double["recurrent_state"] = single["recurrent_state"]
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        found, wanted = encoder(double)["latent"], encoder(single)["latent"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)
    assert double["vector"].dtype == torch.float64


def test_one_hot_alone_is_read() -> None:
    encoder = MLPEncoder.from_spec(Composite(goal=OneHot(4)), latent_dim=4, hidden_dim=8)
    assert encoder(goal=torch.eye(4, dtype=torch.int64))[-1].shape == (4, 4)


@pytest.mark.parametrize(
    "path", [ALMAgent.from_env, lambda env: MLPEncoder.from_spec(env.observation_spec)]
)
def test_what_is_not_read_is_said(path) -> None:
    env = Mixed(board=Unbounded((3, 3)), image=Unbounded((3, 20, 20), dtype=torch.uint8))
    with pytest.warns(UserWarning, match=r"ignores .*'board': \(3, 3\), 'image'.*; choose"):
        path(env)


def test_a_discrete_goal_of_a_gymnasium_environment_is_read() -> None:
    gymnasium = pytest.importorskip("gymnasium")

    class Reach(gymnasium.Env):
        observation_space = gymnasium.spaces.Dict(
            place=gymnasium.spaces.Box(-1, 1, (2,)), goal=gymnasium.spaces.Discrete(3)
        )
        action_space = gymnasium.spaces.Box(-1, 1, (2,))

        def reset(self, *, seed=None, options=None):
            return {"place": np.zeros(2, np.float32), "goal": 2}, {}

    env = make_env(Reach)
    agent = ALMAgent.from_env(env, latent_dim=4, hidden_dim=8, dynamics_hidden_dim=8)
    assert agent.config.observation_dims == {"goal": 3, "place": 2}
    assert env.reset()["goal"].tolist() == [0, 0, 1]


def test_integers_are_joined_with_actions_and_noise_as_they_are() -> None:
    """Neither is rounded to an integer."""
    gymnasium = pytest.importorskip("gymnasium")

    class Cell(gymnasium.Env):
        observation_space = gymnasium.spaces.Discrete(3)
        action_space = gymnasium.spaces.Box(-1, 1, (2,))

        def reset(self, *, seed=None, options=None):
            return 1, {}

        def step(self, action):
            return 2, 0.0, False, False, {}

    data = make_env(Cell, distractors=2, history=2, history_actions=True, seed=0).rollout(3)
    assert torch.equal(data["next", "history"][:, -1, 5:], data["action"])
    noise = data["observation"][:, 3:]
    assert not torch.equal(noise, noise.round())


@pytest.mark.filterwarnings("ignore:the encoder reads the observations")
def test_nothing_of_an_agent_is_of_a_type_that_an_apple_gpu_lacks() -> None:
    encoder = MultiInputEncoder.from_spec(mixed_spec(), latent_dim=4, hidden_dim=8)
    agent = ALMAgent.from_env(Mixed(), encoder=encoder, hidden_dim=8, dynamics_hidden_dim=8)
    assert {t.dtype for t in agent.state_dict().values()} <= {torch.float32, torch.int64}


def test_running_statistics_count_exactly_over_a_long_training() -> None:
    norm = RunningNorm(1)
    norm.count.fill_(2**24)
    norm.update(torch.zeros(1, 1))
    assert norm.count.item() == 2**24 + 1

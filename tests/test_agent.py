"""The agent: built from specs, its policy, saved and loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, RenameTransform, WorldModelEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from alm_torchrl.agent import AgentConfig, ALMAgent
from alm_torchrl.data import make_collector
from alm_torchrl.envs import make_env
from alm_torchrl.modules import (
    Actor,
    CategoricalHead,
    ContinuationModel,
    FixedScaleHead,
    GaussianHead,
    LatentDynamics,
    LatentModule,
    MLPEncoder,
    NoiseSchedule,
    QValueEnsemble,
    RewardModel,
)
from alm_torchrl.objectives import ALMLoss

SIZES = {"latent_dim": 4, "hidden_dim": 8, "dynamics_hidden_dim": 12}
pytestmark = pytest.mark.filterwarnings("ignore:the encoder reads the observations")


class Body(EnvBase):
    """Two vector observations, an image, and an action range that is not symmetric."""

    def __init__(self, action_spec=None) -> None:
        super().__init__()
        self.observation_spec = Composite(
            position=Unbounded((3,)), velocity=Unbounded((2,)), image=Unbounded((3, 8, 8))
        )
        self.action_spec = action_spec or Bounded(
            low=torch.tensor([-1.0, 0.0]), high=torch.tensor([1.0, 4.0]), shape=(2,)
        )
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict=None, **kwargs):
        return self.observation_spec.rand()

    def _step(self, tensordict):
        ends = {"reward": torch.zeros(1), "done": torch.zeros(1, dtype=torch.bool)}
        return self.observation_spec.rand().update(ends)

    def _set_seed(self, seed):
        torch.manual_seed(seed)


def observations(batch: int = 6) -> TensorDict:
    return TensorDict(
        position=torch.randn(batch, 3), velocity=torch.randn(batch, 2), batch_size=[batch]
    )


@pytest.fixture
def agent() -> ALMAgent:
    torch.manual_seed(0)
    return ALMAgent.from_env(Body(), **SIZES)


def test_sizes_and_ranges_come_from_the_specs(agent: ALMAgent) -> None:
    assert agent.config.observation_dims == {"position": 3, "velocity": 2}
    assert agent.config.action_low == (-1.0, 0.0)
    assert agent.config.action_high == (1.0, 4.0)
    assert agent.encoder(observations())["latent"].shape == (6, 4)
    rollout = Body().rollout(200, agent.policy())
    assert (rollout["action"] >= torch.tensor([-1.0, 0.0])).all()
    assert (rollout["action"] <= torch.tensor([1.0, 4.0])).all()
    assert rollout["action"][:, 1].amax() > 3  # the whole of a range wider than +-1 is reached


@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_mujoco_task_single_and_vectorized(num_envs: int) -> None:
    env = make_env("Humanoid-v5", num_envs=num_envs, seed=0)
    agent = ALMAgent.from_env(env, **SIZES)
    assert agent.config.observation_dims == {"observation": 348}
    assert agent.config.action_high == pytest.approx((0.4,) * 17)
    rollout = env.rollout(3, agent.policy())
    assert rollout["action"].shape == (*env.batch_size, rollout.shape[-1], 17)


def test_the_policy_writes_the_action_alone(agent: ALMAgent) -> None:
    out = agent.policy()(observations())
    assert set(out.keys()) == {"position", "velocity", "action"}


def test_without_exploration_the_latent_is_still_drawn_and_the_action_is_the_mean(
    agent: ALMAgent,
) -> None:
    state, policy = observations(), agent.policy()
    for mode in (ExplorationType.DETERMINISTIC, ExplorationType.MEAN, ExplorationType.MODE):
        with torch.no_grad(), set_exploration_type(mode):
            torch.manual_seed(1)
            action = policy(state.clone())["action"]
            torch.manual_seed(1)
            drawn = agent.encoder.get_dist(state).rsample()
            params = agent.actor.get_dist_params(TensorDict(latent=drawn, batch_size=[6]))
            torch.testing.assert_close(action, params["action_loc"])
            assert not torch.equal(action, policy(state.clone())["action"])


def test_with_the_mean_latent_equal_observations_have_equal_actions(agent: ALMAgent) -> None:
    state, policy = observations(), agent.policy(latent="mean")
    with torch.no_grad():
        action = policy(state.clone())["action"]
        assert torch.equal(action, policy(state.clone())["action"])
        loc = agent.encoder.get_dist(state).mean
        params = agent.actor.get_dist_params(TensorDict(latent=loc, batch_size=[6]))
        torch.testing.assert_close(action, params["action_loc"])
        with set_exploration_type(ExplorationType.RANDOM):  # the action has noise all the same
            assert not torch.equal(action, policy(state.clone())["action"])
    with pytest.raises(ValueError, match="latent must be 'sample' or 'mean', not 'mode'"):
        agent.policy(latent="mode")


def test_discrete_latents_have_a_most_likely_value_for_the_mean() -> None:
    head = {"encoder": {"head": CategoricalHead(2)}}
    policy = ALMAgent.from_env(Body(), **SIZES, network_kwargs=head).policy(latent="mean")
    state = observations()
    assert torch.equal(policy(state.clone())["action"], policy(state.clone())["action"])


def test_the_noise_is_for_collectors_alone(agent: ALMAgent, tmp_path: Path) -> None:
    """A rollout acts as an evaluation does; a collector explores with the noise of the file."""
    agent.noise.scale.fill_(100.0)  # so that an action with noise is at an end of the range
    agent.save(tmp_path / "agent.pt")
    env, policy = Body(), ALMAgent.load(tmp_path / "agent.pt").policy()

    def at_an_end(data: TensorDict) -> float:
        low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0])
        inside = (data["action"] > low + 1e-3) & (data["action"] < high - 1e-3)
        return 1 - inside.float().mean().item()

    assert at_an_end(env.rollout(50, policy)) < 0.2
    (collected,) = make_collector(env, policy, frames_per_batch=50, total_frames=50)
    assert at_an_end(collected) > 0.9


def test_acting_noise_is_scheduled_and_not_clipped(agent: ALMAgent) -> None:
    latent = torch.zeros(4000, 4)
    mean = agent.actor.get_dist_params(TensorDict(latent=latent, batch_size=[4000]))["action_loc"]
    agent.noise.advance(50_000)  # half of the way from 1.0 to 0.1
    acting = agent.actor.acting()
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        noise = acting(TensorDict(latent=latent, batch_size=[4000]))["action"] - mean
        clipped = agent.actor(TensorDict(latent=latent, batch_size=[4000]))["action"] - mean
    assert noise[:, 0].abs().max() > 0.5
    assert clipped[:, 0].abs().max() <= 0.3 + 1e-6
    assert float(agent.noise.scale) == pytest.approx(0.55)


def test_loss_and_policy_share_parameters_and_noise(agent: ALMAgent) -> None:
    loss = ALMLoss(**agent.networks())
    state = observations()
    torch.manual_seed(0)
    before = agent.policy()(state.clone())["action"]
    with torch.no_grad():
        for parameter in loss.actor_params.parameters():
            parameter.add_(0.1)
    torch.manual_seed(0)
    assert not torch.equal(before, agent.policy()(state.clone())["action"])
    agent.noise.advance(1000)
    buffers = dict(loss.actor_params.named_buffers())
    assert any(torch.equal(b, agent.noise.scale) for b in buffers.values() if b.ndim == 0)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"latent": 3}, TypeError, "unknown option latent"),
        ({"action_spec": Categorical(3)}, TypeError, "bounded continuous"),
        ({"action_spec": Unbounded((2,))}, TypeError, "bounded continuous"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, error: type, says: str) -> None:
    env = Body(change.pop("action_spec", None))
    with pytest.raises(error, match=says):
        ALMAgent.from_env(env, **change)


def test_nested_keys_of_an_environment(tmp_path: Path) -> None:
    names = (["observation"], [("agents", "observation")], ["action"], [("agents", "action")])
    env = make_env("Pendulum-v1", seed=0).append_transform(RenameTransform(*names))
    agent = ALMAgent.from_env(env, **SIZES, continuation=True)
    assert agent.config.observation_dims == {("agents", "observation"): 3}
    assert agent.config.action_key == ("agents", "action")
    assert agent.config.action_high == (2.0,)
    policy = agent.policy()
    assert policy.in_keys == [("agents", "observation")]
    assert policy.out_keys == [("agents", "action")]
    rollout = env.rollout(12, policy)
    assert rollout["agents", "action"].abs().max() <= 2
    loss = ALMLoss(**agent.networks(), horizon=4)
    SoftUpdate(loss, tau=0.1)
    assert loss.tensor_keys.action == ("agents", "action")
    out = loss(rollout.reshape(-1, 4))
    assert all(out[key].isfinite() for key in loss.out_keys)
    agent.save(tmp_path / "agent.pt")
    agent.save_pretrained(tmp_path / "folder")
    for path in ("agent.pt", "folder"):
        loaded = ALMAgent.load(tmp_path / path)
        assert loaded.config == agent.config
        assert loaded.policy().out_keys == [("agents", "action")]
        actions = [one.policy(latent="mean")(rollout[0].clone()) for one in (agent, loaded)]
        assert torch.equal(*(action["agents", "action"] for action in actions))


def test_one_action_of_several_is_refused() -> None:
    one = Bounded(low=-torch.ones(2), high=torch.ones(2), shape=(2,))
    env = Body()
    env.action_spec = Composite(first=one, second=one.clone())
    with pytest.raises(
        TypeError, match="needs one bounded continuous action vector, got Composite"
    ):
        ALMAgent.from_env(env)


def test_observations_of_double_precision() -> None:
    env = Body()
    env.observation_spec = Composite(
        position=Unbounded((3,), dtype=torch.float64), velocity=Unbounded((2,), dtype=torch.float64)
    )
    torch.manual_seed(0)
    agent = ALMAgent.from_env(env, **SIZES)
    rollout = env.rollout(6, agent.policy())
    assert rollout["position"].dtype == torch.float64
    assert rollout["action"].dtype == torch.float32
    loss = ALMLoss(**agent.networks(), horizon=3)
    SoftUpdate(loss, tau=0.1)
    out = loss(rollout.reshape(-1, 3))
    assert all(out[key].isfinite() for key in loss.out_keys)
    single = rollout.apply(lambda v: v.float() if v.is_floating_point() else v)
    found = [agent.policy(latent="mean")(td.clone())["action"] for td in (rollout, single)]
    torch.testing.assert_close(*found)


def test_repr_is_short_and_says_what_is_inside(agent: ALMAgent) -> None:
    lines = repr(agent).splitlines()
    assert len(lines) == 9
    count = sum(p.numel() for p in agent.actor.parameters())
    assert f"  actor: Actor(latent -> action), {count:,} parameters" in lines
    assert f"  {agent.config}" in lines


def test_images_alone_ask_for_an_encoder() -> None:
    env = Body()
    env.observation_spec = Composite(image=Unbounded((3, 8, 8)))
    with pytest.raises(ValueError, match="of 1 dimensions; found .*image.*another encoder"):
        ALMAgent.from_env(env)
    encoder = LatentModule(nn.Sequential(nn.Flatten(-3), nn.Linear(192, 8)), in_keys=["image"])
    agent = ALMAgent.from_env(env, encoder=encoder, **SIZES)
    assert agent.policy()(image=torch.randn(5, 3, 8, 8)).shape == (5, 2)


def act(agent: ALMAgent) -> torch.Tensor:
    torch.manual_seed(3)
    state = TensorDict(position=torch.ones(4, 3), velocity=torch.ones(4, 2), batch_size=[4])
    return agent.policy()(state)["action"]


def test_saved_and_loaded_it_acts_the_same(agent: ALMAgent, tmp_path: Path) -> None:
    agent.noise.advance(123)
    agent.save(tmp_path / "agent.pt")
    loaded = ALMAgent.load(tmp_path / "agent.pt")
    assert loaded.config == agent.config
    assert torch.equal(act(loaded), act(agent))
    assert int(loaded.noise.step_count) == 123
    assert [p.name for p in tmp_path.iterdir()] == ["agent.pt"]


@pytest.mark.parametrize("own", [False, True])
def test_a_continuation_model_is_saved_with_the_rest(tmp_path: Path, own: bool) -> None:
    given = {"continuation_model": ContinuationModel(4, 8)} if own else {"continuation": True}
    agent = ALMAgent.from_env(Body(), normalize_mean=True, **SIZES, **given)
    assert "continuation_model" in agent.networks()
    assert "continuation_model" not in ALMAgent.from_env(Body(), **SIZES).networks()
    agent.save(tmp_path / "agent.pt")
    loaded = ALMAgent.load(tmp_path / "agent.pt")
    assert loaded.config == agent.config
    step = TensorDict({"next": {"latent": torch.randn(5, 4)}}, batch_size=[5])
    torch.testing.assert_close(
        loaded.continuation_model(step.clone())["continuation_logit"],
        agent.continuation_model(step)["continuation_logit"],
    )


@pytest.mark.parametrize("logit", [None, 100.0, -100.0])
def test_the_world_model_runs_in_an_imagined_environment(logit: float | None) -> None:
    agent = ALMAgent.from_env(Body(), continuation=logit is not None, **SIZES)
    if logit is not None:
        torch.nn.init.constant_(agent.continuation_model.module[-1].bias, logit)
    world_model, body = agent.world_model(), Body()
    specs = SimpleNamespace(
        action_spec=body.full_action_spec,
        reward_spec=body.full_reward_spec,
        done_spec=body.full_done_spec,
        batch_size=body.batch_size,
        device=body.device,
    )
    latents = Composite(latent=Unbounded((3, SIZES["latent_dim"])), shape=[3])
    env = WorldModelEnv(world_model, specs, observation_spec=latents, batch_size=[3])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        start = world_model.encode(observations(3))
        steps = env.rollout(4, agent.actor, tensordict=start, auto_reset=False)
        step = steps.select("latent", "action")
        following = agent.dynamics(step.clone())["next", "latent"]
        reward = agent.reward_model(step)["predicted_reward"]
    ended = logit == -100.0
    assert steps.shape == (3, 1 if ended else 4)
    torch.testing.assert_close(steps["next", "latent"], following)
    torch.testing.assert_close(steps["next", "reward"], reward)
    for flag in ("terminated", "done"):
        assert steps["next", flag].eq(ended).all()


def test_compiled_components_are_saved_as_they_are_without(agent: ALMAgent, tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in agent.state_dict().items()}
    for name in ("encoder", "dynamics", "qvalue_network", "actor"):
        setattr(agent, name, torch.compile(getattr(agent, name)))
    agent.save(tmp_path / "agent.pt")
    loaded = ALMAgent.load(tmp_path / "agent.pt")
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    loaded.noise.advance(7)
    agent.load_state_dict(loaded.state_dict())
    assert int(agent.noise.step_count) == 7


def test_a_save_that_fails_keeps_the_old_file(
    agent: ALMAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "agent.pt"
    agent.save(path)

    def full_disk(content: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        agent.save(path)
    assert torch.equal(act(ALMAgent.load(path)), act(agent))
    assert [found.name for found in tmp_path.iterdir()] == ["agent.pt"]


def test_components_of_ones_own_are_passed_again(tmp_path: Path) -> None:
    def own() -> LatentModule:
        return LatentModule(nn.Linear(3, 8), in_keys=["position"])

    agent = ALMAgent.from_env(Body(), encoder=own(), **SIZES)
    agent.save(tmp_path / "agent.pt")
    with pytest.raises(ValueError, match="pass encoder=... to load"):
        ALMAgent.load(tmp_path / "agent.pt")
    assert torch.equal(act(ALMAgent.load(tmp_path / "agent.pt", encoder=own())), act(agent))
    with pytest.raises(ValueError, match="do not fit the networks"):
        ALMAgent.load(tmp_path / "agent.pt", encoder=MLPEncoder(3, in_keys=["position"]))


class OwnHead(GaussianHead):
    """A head of the user's."""


def test_dynamics_are_rebuilt_for_the_head_of_ones_own_encoder(tmp_path: Path) -> None:
    def own() -> LatentModule:
        return LatentModule(nn.Linear(3, 8), in_keys=["position"], head=OwnHead(loc_bound=5.0))

    given = {"encoder": own(), "network_kwargs": {"dynamics": {"activation_class": "SiLU"}}}
    agent = ALMAgent.from_env(Body(), **given, **SIZES)
    agent.save(tmp_path / "agent.pt")
    with pytest.raises(ValueError, match=r"pass encoder=\.\.\. to load"):
        ALMAgent.load(tmp_path / "agent.pt")
    loaded = ALMAgent.load(tmp_path / "agent.pt", encoder=own())
    assert loaded.dynamics.head == OwnHead(loc_bound=5.0)
    assert str(loaded) == str(agent)
    loaded.save(tmp_path / "again.pt")
    again = ALMAgent.load(tmp_path / "again.pt", encoder=own())
    step = TensorDict(latent=torch.randn(5, 4), action=torch.rand(5, 2), batch_size=[5])
    expected = agent.dynamics.get_dist(step.clone()).mean
    assert torch.equal(again.dynamics.get_dist(step).mean, expected)

    dynamics = LatentDynamics(4, 2, 6, head=OwnHead(loc_bound=5.0))  # of another width
    ALMAgent.from_env(Body(), **SIZES, encoder=own(), dynamics=dynamics).save(tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"pass dynamics=\.\.\. to load"):
        ALMAgent.load(tmp_path / "own.pt", encoder=own())


def test_an_encoder_is_measured_and_checked_before_anything_is_built() -> None:
    agent = ALMAgent.from_env(Body(), encoder=MLPEncoder(3, 6, 8, in_keys=["position"]))
    assert agent.config.latent_dim == agent.dynamics.latent_dim == 6
    with pytest.raises(ValueError, match=r"reads 'pose', which is not in the observation spec"):
        ALMAgent.from_env(Body(), encoder=MLPEncoder(3, 6, 8, in_keys=["pose"]))
    with pytest.raises(ValueError, match=r"size 6, .* latent_dim=5: build it with 5, or pass"):
        ALMAgent.from_env(Body(), encoder=MLPEncoder(3, 6, 8, in_keys=["position"]), latent_dim=5)
    discrete = MLPEncoder(3, 8, 8, in_keys=["position"], head=CategoricalHead(4))
    with pytest.raises(ValueError, match=r"build the dynamics with head=encoder\.head"):
        ALMAgent.from_env(Body(), encoder=discrete, dynamics=LatentDynamics(8, 2, 8))


def test_a_component_that_this_release_does_not_know_is_named(
    agent: ALMAgent, tmp_path: Path
) -> None:
    path = tmp_path / "agent.pt"
    agent.save(path)
    content = torch.load(path, weights_only=True)
    content["networks"]["encoder"]["component"] = "NewEncoder"
    torch.save(content, path)
    with pytest.raises(ValueError, match="no component 'NewEncoder'; upgrade"):
        ALMAgent.load(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(agent: ALMAgent, tmp_path: Path, share: float) -> None:
    path = tmp_path / "agent.pt"
    agent.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"agent\.pt is damaged or was not written by"):
        ALMAgent.load(path)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_no_code_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": Payload()}, "agent.pt")
    with pytest.raises(ValueError, match="is damaged or was not written"):
        ALMAgent.load("agent.pt")
    assert not Path("touched").exists()


def test_other_files_are_refused(agent: ALMAgent, tmp_path: Path) -> None:
    path = tmp_path / "agent.pt"
    with pytest.raises(FileNotFoundError, match=r"agent\.pt does not exist"):
        ALMAgent.load(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="was not written by ALMAgent.save"):
        ALMAgent.load(path)
    agent.save(path)
    content = torch.load(path, weights_only=True)
    for version in (1, 99):
        torch.save({**content, "version": version}, path)
        with pytest.raises(ValueError, match=f"format version {version}, this release reads 3"):
            ALMAgent.load(path)


def test_every_network_is_rebuilt_with_its_own_arguments(tmp_path: Path) -> None:
    given = {
        "qvalue_network": QValueEnsemble(4, 2, 6, num_networks=3),
        "reward_model": RewardModel(4, 2, 7, depth=3, activation_class=nn.SiLU),
        "actor": Actor(4, [-1.0, 0.0], [1.0, 4.0], 5, noise=NoiseSchedule(num_steps=7)),
    }
    agent = ALMAgent.from_env(Body(), **SIZES, **given)
    agent.noise.advance(3)
    agent.save(tmp_path / "agent.pt")
    loaded = ALMAgent.load(tmp_path / "agent.pt")
    assert loaded.noise.num_steps == 7
    assert str(loaded) == str(agent)
    assert torch.equal(act(loaded), act(agent))


def test_each_network_has_its_own_depth_activation_and_norm(tmp_path: Path) -> None:
    names = ["encoder", "dynamics", "reward_model", "classifier", "qvalue_network", "actor"]
    names.append("continuation_model")
    options = {"depth": 3, "activation_class": nn.SiLU, "norm_class": nn.RMSNorm, "hidden_dim": 6}
    plain = ALMAgent.from_env(Body(), continuation=True, **SIZES)
    for name in names:
        agent = ALMAgent.from_env(
            Body(), continuation=True, **SIZES, network_kwargs={name: options}
        )
        for other, network in agent.networks().items():
            changed = any(isinstance(layer, nn.SiLU) for layer in network.modules())
            assert changed == (other == name)
            if not changed:
                assert str(network) == str(plain.networks()[other])
        layers = list(agent.networks()[name].modules())
        copies = 2 if name == "qvalue_network" else 1
        assert sum(isinstance(layer, nn.Linear) for layer in layers) == 4 * copies
        assert any(isinstance(layer, nn.RMSNorm) for layer in layers)
        agent.save(tmp_path / "agent.pt")
        loaded = ALMAgent.load(tmp_path / "agent.pt")
        assert loaded.config == agent.config
        assert str(loaded) == str(agent)
        assert torch.equal(act(loaded), act(agent))


def test_network_kwargs_are_checked() -> None:
    with pytest.raises(
        ValueError, match="unknown networks: 'policy'; choose from encoder, dynamics"
    ):
        ALMAgent.from_env(Body(), network_kwargs={"policy": {"depth": 3}})
    with pytest.raises(ValueError, match="no layer 'Swish'; pass the class or a name"):
        ALMAgent.from_env(Body(), network_kwargs={"actor": {"activation_class": "Swish"}})
    with pytest.raises(TypeError, match="'width'"):
        ALMAgent.from_env(Body(), network_kwargs={"actor": {"width": 3}})
    head = {"encoder": {"head": CategoricalHead(2)}}
    assert ALMAgent.from_env(Body(), **SIZES, network_kwargs=head).dynamics.head == CategoricalHead(
        2
    )


def test_an_unknown_component_is_refused() -> None:
    config = AgentConfig({"observation": 3}, (-1.0,), (1.0,), **SIZES)
    with pytest.raises(TypeError, match="decoder"):
        ALMAgent(config, decoder=nn.Identity())


def test_numbers_of_numpy_are_saved_as_pythons(tmp_path: Path) -> None:
    size = np.prod((2, 2))
    sizes = {"latent_dim": size, "hidden_dim": np.int32(8), "dynamics_hidden_dim": np.int64(12)}
    encoder = MLPEncoder(
        np.int64(5), size, np.int32(8), in_keys=["x"], head=FixedScaleHead(np.float64(0.5))
    )
    config = AgentConfig(
        {"x": np.int64(5)},
        np.array([-1.0, 0.0]),
        torch.tensor([1.0, 4.0]),
        **sizes,
        noise_clip=np.float32(0.25),
        scale_to_range=np.bool_(True),
    )
    assert config == AgentConfig(
        {"x": 5}, (-1.0, 0.0), (1.0, 4.0), 4, 8, 12, scale_to_range=True, noise_clip=0.25
    )
    assert type(config.scale_to_range) is bool
    for agent in (ALMAgent(config), ALMAgent(config, encoder=encoder)):
        agent.save(tmp_path / "agent.pt")
        again = ALMAgent.load(tmp_path / "agent.pt")
        assert again.config == config
        td = TensorDict(x=torch.randn(3, 5), batch_size=[3])
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            torch.manual_seed(0)
            expected = agent.policy()(td.clone())["action"]
            torch.manual_seed(0)
            assert torch.equal(again.policy()(td.clone())["action"], expected)


class Counting(MLPEncoder):
    """An encoder of the user's, whose state cannot be read back."""

    def get_extra_state(self):
        return np.int64(3)

    def set_extra_state(self, state) -> None:
        pass


def test_an_agent_that_could_not_be_loaded_does_not_replace_one_that_can(
    agent: ALMAgent, tmp_path: Path
) -> None:
    agent.save(tmp_path / "agent.pt")
    other = ALMAgent.from_env(Body(), **SIZES, encoder=Counting(3, 4, 8, in_keys=["position"]))
    with pytest.raises(ValueError, match=r"could not be read again, .* \(.*numpy.*scalar"):
        other.save(tmp_path / "agent.pt")
    assert torch.equal(act(ALMAgent.load(tmp_path / "agent.pt")), act(agent))
    assert [path.name for path in tmp_path.iterdir()] == ["agent.pt"]


WRONG = {
    "no version": {"version": None},
    "version as text": {"version": "2"},
    "version as a tensor": {"version": torch.zeros(3)},
    "no config": {"config": None},
    "config of another kind": {"config": [3, 4]},
    "unknown field": {"config": {"observation_dims": {"x": 3}, "color": "red"}},
    "a field is missing": {"config": {"observation_dims": {"x": 3}}},
    "sizes as text": {
        "config": {"observation_dims": {"x": "3"}, "action_low": ["a"], "action_high": ["b"]}
    },
    "sizes beyond memory": {
        "networks": {
            "encoder": {"component": "MLPEncoder", "observation_dim": 5, "hidden_dim": 10**12}
        }
    },
    "no weights": {"state_dict": None},
    "weights of another kind": {"state_dict": [torch.zeros(3)]},
    "weights that are none": {"state_dict": {"encoder.weight": "heavy"}},
    "weights of another agent": {"state_dict": {"encoder.weight": torch.zeros(3)}},
    "no networks": {"networks": None},
    "networks of another kind": {"networks": 3},
    "a network with another argument": {"networks": {"encoder": {"component": "MLPEncoder"}}},
    "a network that is none": {"networks": {"encoder": {"component": "GaussianHead"}}},
    "a network as text": {"networks": {"encoder": "MLPEncoder"}},
    "a class as a list": {"networks": {"encoder": {"component": ["x"]}}},
    "an unknown network": {"networks": {"decoder": {"component": "GaussianHead"}}},
    "an unknown activation": {
        "networks": {
            "encoder": {"component": "MLPEncoder", "observation_dim": 5, "activation_class": "Not"}
        }
    },
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_makes_no_agent_is_a_value_error_of_one_line(
    agent: ALMAgent, tmp_path: Path, change: dict
) -> None:
    agent.save(tmp_path / "agent.pt")
    content = torch.load(tmp_path / "agent.pt", weights_only=True) | change
    torch.save(content, tmp_path / "agent.pt")
    with pytest.raises(ValueError, match=r"agent\.pt") as raised:
        ALMAgent.load(tmp_path / "agent.pt")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", "list", "folder"])
def test_a_foreign_file_is_a_value_error(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "agent.pt"
    if content == "folder":
        path.mkdir()
    elif content == "list":
        torch.save([1, 2], path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="not written by ALMAgent.save"):
        ALMAgent.load(path)

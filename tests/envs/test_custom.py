"""Custom environments, by class, function or import path, and invalid ones."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrl.envs import Compose, GymWrapper, ObservationNorm, SerialEnv, VecNormV2
from torchrl.envs.utils import check_env_specs

from alm_torchrl.agent import ALMAgent
from alm_torchrl.data import make_collector
from alm_torchrl.envs import EnvironmentFailedError, make_env, random_states, set_random_states
from alm_torchrl.training import ExperienceStream
from tests.data.counting import CountingEnv

gymnasium = pytest.importorskip("gymnasium")
spaces = gymnasium.spaces


class Drift(gymnasium.Env):
    """A point that moves with the action."""

    def __init__(self, size: int = 3, bound: float = 1.0, render_mode: str | None = None) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)
        self.action_space = gymnasium.spaces.Box(-bound, bound, (size,), np.float32)
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point = self.np_random.standard_normal(self.observation_space.shape)
        return self.point, {}

    def step(self, action):
        self.point = self.point + 0.1 * action
        return self.point, -float(np.abs(self.point).sum()), False, False, {}

    def render(self):
        if self.render_mode is not None:
            shade = int(np.clip(128 + 40 * self.point[0], 0, 255))
            return np.full((20, 30, 3), shade, np.uint8)
        return None


class Mine:
    """A namespace, for an import path with two attributes."""

    make = staticmethod(partial(Drift, size=2))


drift = Drift()
MODULE = "my_tasks.drift"


@pytest.fixture(autouse=True)
def _module(monkeypatch, tmp_path: Path) -> None:
    """A package ``my_tasks`` with the module ``drift`` that has this module's names."""
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks/__init__.py").touch()
    (tmp_path / "my_tasks/broken.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, MODULE, sys.modules[__name__])
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "my_tasks"]:
        if name != MODULE:
            del sys.modules[name]


# -------------------------------------------------------------------------------- creation


@pytest.mark.parametrize("task", [Drift, f"{MODULE}:Drift"])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_gymnasium_class(task, num_envs):
    env = make_env(task, seed=0, num_envs=num_envs, size=4)
    check_env_specs(env)
    data = env.rollout(3)
    assert data["observation"].shape[-1] == 4
    assert data["observation"].dtype == torch.float32
    assert torch.allclose(
        data["next", "episode_reward"], data["next", "reward"].cumsum(-2), atol=1e-5
    )


@pytest.mark.parametrize("task", [CountingEnv, "tests.data.counting:CountingEnv"])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_an_env_base(task, num_envs):
    env = make_env(task, seed=0, num_envs=num_envs, length=5)
    check_env_specs(env)
    data = env.rollout(10, break_when_any_done=False).reshape(num_envs, 10)
    assert data["next", "done"][:, 4].all()
    agent = ALMAgent.from_env(env, latent_dim=4, hidden_dim=8)
    assert env.rollout(3, agent.policy())["action"].shape[-1] == 2


def test_functions():
    assert make_env(f"{MODULE}:Mine.make").observation_spec["observation"].shape == (2,)
    assert make_env(lambda: Drift(size=5)).observation_spec["observation"].shape == (5,)


def test_seeds_and_generators():
    def start(seed):
        return make_env(Drift, seed=seed, num_envs=2).reset()["observation"]

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
    env = make_env(Drift, seed=0)
    states = random_states(env)
    expected = env.reset()["observation"]
    set_random_states(env, states)
    assert torch.equal(env.reset()["observation"], expected)


def test_an_env_base_is_seeded_from_torch_and_its_noise_is_restored():
    env = make_env(CountingEnv, seed=0, distractors=2)
    states = random_states(env)
    assert len(states) == 1
    expected = env.reset()["observation"][3:]
    torch.manual_seed(5)
    set_random_states(env, states)
    observation = env.reset()["observation"]
    assert torch.equal(observation[3:], expected)
    torch.manual_seed(5)
    env.set_seed(int(torch.randint(2**31 - 1, ())))
    assert env.reset()["observation"][0] == observation[0]


def test_options_of_a_custom_environment():
    env = make_env(
        Drift, seed=0, render_mode="rgb_array", pixels=(10, 15), proprioception=True,
        action_repeat=2, distractors=3, history=4, history_actions=True,
    )  # fmt: skip
    check_env_specs(env)
    data = env.rollout(3)
    assert data["pixels"].shape == (3, 9, 10, 15)  # scaled from 20 by 30
    assert data["history"].shape == (3, 4, 9)
    shade = (128 + 40 * data["observation"][:, 0]).clamp(0, 255)
    assert torch.allclose(data["pixels"][:, -1, 0, 0].float(), shade, atol=1.01)
    moved = data["next", "observation"] - data["observation"]
    assert torch.allclose(moved[:, :3], 0.2 * data["action"], atol=1e-5)


# ------------------------------------------------------------------------------- shared memory


class Reused(gymnasium.Env):
    """Reuses one array (and one dict) for observations, and changes its action in place."""

    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, nested: bool = False) -> None:
        self.point = np.zeros(2, np.float32)
        self.seen = {"observation": self.point, "goal": self.point} if nested else self.point
        space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
        both = gymnasium.spaces.Dict(observation=space, goal=space)
        self.observation_space = both if nested else space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point[:] = 0
        return self.seen, {}

    def step(self, action):
        self.point += 1
        action[:] = 0
        return self.seen, 1.0, False, False, {}


class SameTensors(CountingEnv):
    """Returns one tensor each for observation, reward and flags."""

    def _reset(self, tensordict=None, **kwargs):
        self.returned = super()._reset(tensordict, **kwargs).set("reward", torch.zeros(1))
        return self.returned.exclude("reward")

    def _step(self, tensordict):
        new = super()._step(tensordict)
        tensordict["action"].zero_()
        self.returned.apply_(lambda old, value: old.copy_(value), new)
        return self.returned.copy()


@pytest.mark.parametrize("task", [Reused, partial(Reused, nested=True), SameTensors])
@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("history", [0, 3])
def test_reused_arrays_and_tensors_are_copied(task, num_envs, frames, history):
    env = make_env(task, num_envs=num_envs, history=history, history_actions=history > 0)
    collector = make_collector(
        env, None, frames_per_batch=frames * num_envs, total_frames=5 * num_envs
    )
    data = torch.cat([batch.reshape(num_envs, -1) for batch in collector], 1)
    counted = data["observation"][..., -1:]
    assert counted[0].flatten().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(data["next", "observation"][..., -1:], counted + 1)
    assert (data["action"] != 0).all()
    if task is SameTensors:
        assert torch.equal(data["next", "reward"], data["action"].sum(-1, keepdim=True))
    if history:
        newest = data["next", "history"][:, :, -1]
        size = data["observation"].shape[-1]
        assert torch.equal(newest[..., :size], data["next", "observation"])
        assert torch.equal(newest[..., size:], data["action"])


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("no_such_module:make", "there is no module 'no_such_module'.*PYTHONPATH"),
        ("my_tasks.absent:make", "there is no module 'my_tasks.absent'"),
        (f"{MODULE}:absent", f"the module '{MODULE}' has no 'absent'"),
        (f"{MODULE}:Mine.absent", "has no 'Mine.absent'"),
        (f"{MODULE}:drift", "is a Drift: give the path of a class or a function"),
        (dict, "dict creates a dict, which is neither a torchrl.envs.EnvBase nor a gymnasium.Env"),
        (lambda: SerialEnv(2, CountingEnv), r"creates a batch of environments \[2\].*num_envs"),
        (partial(Drift, bound=np.inf), "has an unbounded 'action': use a space with finite bounds"),
    ],
)
def test_invalid_environments_are_refused(task, message):
    with pytest.raises(ValueError, match=message):
        make_env(task)


def test_a_missing_dependency_of_a_module_is_named():
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        make_env("my_tasks.broken:make")


def test_action_repeat_and_pixels_are_refused_for_an_env_base():
    with pytest.raises(ValueError, match="an EnvBase repeats actions in its own _step"):
        make_env(CountingEnv, action_repeat=2)
    with pytest.raises(ValueError, match="write frames to 'pixels' in the environment"):
        make_env(CountingEnv, pixels=84)


def test_an_environment_without_frames_is_refused():
    with pytest.raises(TypeError, match="render_mode='rgb_array'"):
        make_env(Drift, pixels=84)


def test_options_for_a_missing_entry_are_refused():
    class Scattered(Drift):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = gymnasium.spaces.Dict(place=self.observation_space)

        def reset(self, **options):
            observation, info = super().reset(**options)
            return {"place": observation}, info

    with pytest.raises(ValueError, match=r"change the entry 'observation'.*observes \['place'\]"):
        make_env(Scattered, history=4)


def test_unknown_arguments_are_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'gravity'"):
        make_env(Drift, gravity=1)


def test_gymnasium_environments_are_wrapped_by_torchrl():
    assert isinstance(make_env(Drift).base_env, GymWrapper)


def test_running_statistics_of_an_environment_are_refused():
    for transform in (VecNormV2(["observation"]), Compose(VecNormV2(["observation"]))):
        with pytest.raises(
            ValueError, match="VecNormV2 keeps running.*normalize=True.*Observation"
        ):
            make_env(Drift, transforms=[transform])
    fixed = ObservationNorm(loc=1.0, scale=0.5, in_keys=["observation"], standard_normal=True)
    both = [make_env(Drift, seed=0, transforms=[fixed]).reset()["observation"] for _ in range(2)]
    assert torch.equal(*both)


# --------------------------------------------------------------------------- unusual cases


class Acts(gymnasium.Env):
    """Observes its last action, flattened; returns flags as integers."""

    def __init__(self, space) -> None:
        self.action_space = space
        size = gymnasium.spaces.flatdim(space)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        seen = gymnasium.spaces.flatten(self.action_space, action).astype(np.float32)
        return seen, 1.0, 1, 0, {}


BOX = gymnasium.spaces.Box


@pytest.mark.parametrize(
    "space",
    [
        BOX(-1, 2, ()),
        BOX(-1, 1, (2, 3)),
        BOX(-0.1, 0.1, (3,), np.float16),
        gymnasium.spaces.Dict(push=BOX(-1, 1, (2,))),
        gymnasium.spaces.Dict(push=BOX(-1, 1, (2,)), turn=BOX(0, 5, (2, 2))),
    ],
)
def test_continuous_actions_become_one_vector(space):
    env = make_env(Acts, space=space)
    agent = ALMAgent.from_env(env, latent_dim=4, hidden_dim=8, dynamics_hidden_dim=8)
    for policy in (None, agent.policy()):
        data = env.rollout(4, policy, break_when_any_done=False)
        assert data["action"].shape == (4, gymnasium.spaces.flatdim(space))
        torch.testing.assert_close(data["next", "observation"], data["action"], atol=1e-3, rtol=0)
        assert data["next", "terminated"].all()


def test_the_range_of_all_float32_numbers_is_unbounded():
    with pytest.raises(ValueError, match="has an unbounded 'action'"):
        make_env(Drift, bound=float(np.finfo(np.float32).max))


class Broken(Drift):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        if where == "made":
            raise KeyError("no such joint")

    def close(self):
        if self.where == "closed":
            raise RuntimeError("the motor is stuck")


def test_failures_on_creating_and_closing():
    with pytest.raises(EnvironmentFailedError, match="cannot create Broken: KeyError: 'no such"):
        make_env(Broken, where="made")
    with pytest.raises(EnvironmentFailedError, match="RuntimeError: the motor is stuck"):
        make_env(Broken, where="closed", num_envs=2)
    env = make_env(Broken, where="closed")
    experience = ExperienceStream(make_collector(env, None), None, total_steps=1)
    with pytest.warns(UserWarning, match="failed on closing: RuntimeError: the motor is"):
        experience.shutdown()


@pytest.mark.parametrize("name", ["Registered-v0", "RegisteredWithoutVersion", "mine/Named-v1"])
def test_a_module_that_registers_a_task(name, tmp_path):
    text = f"import gymnasium\ngymnasium.register({name!r}, entry_point='{MODULE}:Drift')\n"
    (tmp_path / "my_tasks/registers.py").write_text(text)
    env = make_env(f"my_tasks.registers:{name}", seed=0, size=4, num_envs=2)
    assert env.rollout(2)["observation"].shape == (2, 2, 4)
    with pytest.raises(ValueError, match="unknown Gymnasium task 'my_tasks.registers:Absent-v0'"):
        make_env("my_tasks.registers:Absent-v0")
    with pytest.raises(ValueError, match="unknown Gymnasium task.*No module named"):
        make_env("my_tasks.not_there:Absent-v0")


VECTOR = spaces.Box(-1, 1, (3,), np.float32)
ODD_SPACES = {
    "begins at 1": (spaces.Discrete(3, start=1), 3),
    "binary matrix": (spaces.MultiBinary((2, 2)), 4),
    "discrete matrix": (spaces.MultiDiscrete([[2, 3], [2, 2]]), 9),
    "discrete from 1": (spaces.MultiDiscrete([2, 3], start=[1, 1]), 5),
    "half precision": (spaces.Box(-1, 1, (2,), np.float16), 2),
    "tuple": (spaces.Tuple((VECTOR, spaces.Discrete(2, start=-1))), 5),
}


class Odd(gymnasium.Env):
    def __init__(self, space: spaces.Space) -> None:
        self.observation_space = space
        self.action_space = VECTOR

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(0)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, False, False, {}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ODD_SPACES)
def test_spaces_that_torchrl_does_not_support_are_converted(name: str, nested: bool) -> None:
    space, size = ODD_SPACES[name]
    wanted = size
    if nested:
        space, wanted = spaces.Dict(vector=VECTOR, odd=space), size + 3
    env = make_env(partial(Odd, space))
    agent = ALMAgent.from_env(env, latent_dim=4, hidden_dim=8, dynamics_hidden_dim=8)
    assert sum(agent.config.observation_dims.values()) == wanted
    rollout = env.rollout(20, agent.policy())
    assert rollout.shape == (20,)
    if name == "begins at 1" and not nested:
        space.seed(0)
        first = int(space.sample()) - 1
        assert rollout["observation"][0].argmax() == first

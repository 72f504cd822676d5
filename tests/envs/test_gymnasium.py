"""Gymnasium tasks: specs, seeds, ends of episodes, rendering, and errors."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.envs import make_env, random_states, set_random_states

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")

TRUNCATED_ANT = {"include_cfrc_ext_in_observation": False}
TRUNCATED_HUMANOID = {
    f"include_{name}_in_observation": False
    for name in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
}
TASKS = [
    ("HalfCheetah-v5", {}, 17, 6, 1.0),
    ("Ant-v5", TRUNCATED_ANT, 27, 8, 1.0),
    ("Ant-v5", {}, 105, 8, 1.0),
    ("Humanoid-v5", TRUNCATED_HUMANOID, 45, 17, 0.4),
    ("Humanoid-v5", {}, 348, 17, 0.4),
]


# ------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(("task", "options", "observation", "action", "bound"), TASKS)
def test_specs_of_the_tasks(task, options, observation, action, bound):
    env = make_env(task, seed=0, **options)
    assert env.observation_spec["observation"].shape == (observation,)
    assert env.observation_spec["observation"].dtype == torch.float32
    assert env.action_spec.shape == (action,)
    assert env.action_spec.dtype == torch.float32
    assert torch.allclose(env.action_spec.space.low, torch.tensor(-bound))
    assert torch.allclose(env.action_spec.space.high, torch.tensor(bound))
    rollout = env.rollout(3)
    assert rollout["observation"].dtype == rollout["next", "reward"].dtype == torch.float32
    env.close()


@pytest.mark.parametrize("num_envs", [1, 3])
def test_specs_hold(num_envs):
    env = make_env("Hopper-v5", seed=0, num_envs=num_envs)
    check_env_specs(env)
    assert env.batch_size == (() if num_envs == 1 else (3,))
    env.close()


@pytest.mark.parametrize(
    ("task", "options"), [("HalfCheetah-v5", {}), ("Humanoid-v5", TRUNCATED_HUMANOID)]
)
@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_task_feeds_the_replay_buffer(task, options, num_envs):
    torch.manual_seed(0)
    env = make_env(task, seed=0, num_envs=num_envs, **options)
    collector = make_collector(env, None, frames_per_batch=10 * num_envs, total_frames=80)
    buffer = make_replay_buffer(60, batch_size=40, num_envs=num_envs, seed=0)
    for batch in collector:
        buffer.extend(batch)
    collector.shutdown()
    windows = torch.cat([buffer.sample() for _ in range(5)])
    joined = windows["validity_mask"][:, 1:]
    assert joined.float().mean() > 0.7
    follows = windows["next", "observation"][:, :-1] == windows["observation"][:, 1:]
    assert follows[joined].all()
    assert len(buffer) == 60


# ---------------------------------------------------------------------- episodes and returns


def play(env, frames: int):
    torch.manual_seed(0)
    return env.rollout(frames, break_when_any_done=False)


def test_a_time_limit_is_not_a_termination():
    data = play(make_env("HalfCheetah-v5", seed=0, max_episode_steps=5), 20)["next"]
    ends = (torch.arange(20) % 5 == 4).unsqueeze(-1)
    assert torch.equal(data["truncated"], ends)
    assert torch.equal(data["done"], ends)
    assert not data["terminated"].any()


def test_a_fall_is_a_termination():
    data = play(make_env("Hopper-v5", seed=0), 200)["next"]
    assert data["terminated"].sum() > 2
    assert not data["truncated"].any()
    assert torch.equal(data["done"], data["terminated"])


def test_a_fall_at_the_time_limit_is_both():
    free = play(make_env("Hopper-v5", seed=0), 200)["next", "terminated"]
    first = int(free.squeeze(-1).nonzero()[0]) + 1
    data = play(make_env("Hopper-v5", seed=0, max_episode_steps=first), first)["next"]
    assert data["terminated"][-1]
    assert data["truncated"][-1]


@pytest.mark.parametrize("num_envs", [1, 2])
def test_episode_reward_is_the_sum_of_the_episode(num_envs):
    data = play(make_env("Hopper-v5", seed=0, num_envs=num_envs), 120)
    data = data.reshape(num_envs, -1)
    running = torch.zeros(num_envs, 1)
    for step in data.unbind(1):
        running = running + step["next", "reward"]
        assert torch.allclose(step["next", "episode_reward"], running, atol=1e-4)
        running = running.masked_fill(step["next", "done"], 0)
    assert data["next", "done"].any(1).all()


# ------------------------------------------------------------------------------ seeds, batches


@pytest.mark.parametrize("num_envs", [1, 2])
def test_sizes_and_seed_may_be_numpy_integers(num_envs):
    options = {"num_envs": num_envs, "seed": 3, "action_repeat": 2}
    plain = make_env("Pendulum-v1", **options).reset()
    other = make_env("Pendulum-v1", **{k: np.int64(v) for k, v in options.items()}).reset()
    assert torch.equal(plain["observation"], other["observation"])


def test_the_seed_determines_the_start():
    def start(seed):
        return make_env("Ant-v5", seed=seed).reset()["observation"]

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))


def test_environments_of_a_batch_differ_and_repeat():
    def start(seed):
        return make_env("Ant-v5", seed=seed, num_envs=3).reset()["observation"]

    assert start(3).unique(dim=0).shape[0] == 3
    assert torch.equal(start(3), start(3))


def test_parallel_and_serial_environments_are_equal():
    serial = make_env("Ant-v5", seed=1, num_envs=2, **TRUNCATED_ANT)
    expected = play(serial, 5)
    serial.close()
    parallel = make_env("Ant-v5", seed=1, num_envs=2, parallel=True, **TRUNCATED_ANT)
    try:
        data = play(parallel, 5)
    finally:
        parallel.close()
    assert data.shape == (2, 5)
    for key in ("observation", "action", ("next", "reward"), ("next", "episode_reward")):
        assert torch.equal(data[key], expected[key])


def test_arguments_are_passed_to_the_task_and_not_to_torchrl():
    env = make_env("HalfCheetah-v5", frame_skip=2)
    assert env.unwrapped.frame_skip == 2  # TorchRL's GymEnv would repeat actions instead
    reward = make_env("HalfCheetah-v5", seed=0, forward_reward_weight=0.0, ctrl_cost_weight=0.0)
    assert play(reward, 5)["next", "reward"].eq(0).all()


# ---------------------------------------------------------------------------------- rendering


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a new process with this process's import path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_frames_for_videos():
    code = """
from recipes.script import prepare_script
prepare_script()  # MuJoCo chooses its renderer when it is imported
import sys, torch
from alm_torchrl.envs import make_env
data = make_env("HalfCheetah-v5", seed=0, from_pixels=True, width=64, height=48).rollout(2)["next"]
if "pixels" not in data.keys():
    sys.exit(77)
assert data["pixels"].shape == (2, 48, 64, 3), data["pixels"].shape
assert data["pixels"].dtype == torch.uint8
assert data["pixels"].float().std() > 10
assert data["observation"].shape == (2, 17)
assert data["observation"].dtype == torch.float32
"""
    done = run(code)
    if done.returncode == 77:
        pytest.skip("no off-screen rendering here")
    assert done.returncode == 0, done.stderr


def test_a_machine_that_cannot_render_gets_a_warning(monkeypatch):
    def fail(self):
        raise RuntimeError("no\n  display")

    monkeypatch.setattr("gymnasium.envs.mujoco.MujocoEnv.render", fail)
    with pytest.warns(
        UserWarning, match=r"HalfCheetah-v5.*\(RuntimeError: no display\).*MUJOCO_GL"
    ) as caught:
        env = make_env("HalfCheetah-v5", seed=0, from_pixels=True)
    assert all(warning.filename == __file__ for warning in caught)
    assert "pixels" not in env.reset().keys()  # noqa: SIM118


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("HalfCheeta-v5", r"'HalfCheeta-v5': did you mean HalfCheetah-v5\?"),
        ("halfcheetah-v5", r"did you mean HalfCheetah-v5"),
        ("Hopper", r"did you mean Hopper-v5"),
        ("HalfCheetah-v9", r"did you mean HalfCheetah-v5"),
        ("Zyx-v0", r"unknown Gymnasium task 'Zyx-v0'"),
        ("no_such_module:Task-v0", r"unknown Gymnasium task"),
    ],
)
def test_an_unknown_task_is_refused_with_a_suggestion(task, message):
    with pytest.raises(ValueError, match=message) as error:
        make_env(task)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_an_unknown_argument_is_named(num_envs):
    with pytest.raises(ValueError, match=r"^HalfCheetah-v5 does not take the argument 'gravityy'$"):
        make_env("HalfCheetah-v5", num_envs=num_envs, gravityy=1)


def test_fewer_than_one_environment():
    with pytest.raises(ValueError, match="num_envs must be at least 1, not 0"):
        make_env("HalfCheetah-v5", num_envs=0)


def test_missing_gymnasium_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install 'alm-torchrl\[recipes\]'"):
        make_env("HalfCheetah-v5")


@pytest.mark.parametrize("error", [ImportError, gymnasium.error.DependencyNotInstalled])
def test_missing_mujoco_names_the_command(monkeypatch, error):
    def fail(*arguments, **options):
        raise error("mujoco is\nnot there")

    monkeypatch.setattr(gymnasium, "make", fail)
    with pytest.raises(ImportError, match=r"HalfCheetah-v5.*not there.*pip install 'alm") as caught:
        make_env("HalfCheetah-v5")
    assert "\n" not in str(caught.value)


def test_other_errors_of_a_task_are_not_changed():
    with pytest.raises(TypeError):
        make_env("HalfCheetah-v5", frame_skip="two")


def test_mujoco_prints_no_deprecation(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make_env("HalfCheetah-v5", seed=0).reset()
    assert not list(tmp_path.iterdir())
    assert "deprecated" not in capfd.readouterr().err


def test_data_and_envs_need_no_extra():
    code = """
import sys
for name in ("gymnasium", "gym", "mujoco", "lightning", "hydra", "matplotlib"):
    sys.modules[name] = None  # as if it were not installed
import alm_torchrl.data
import alm_torchrl.envs
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_make_env_can_be_sent_to_a_worker():
    import cloudpickle

    create = partial(make_env, "Pendulum-v1", seed=2)
    copy = cloudpickle.loads(cloudpickle.dumps(create))
    assert torch.equal(copy().reset()["observation"], create().reset()["observation"])


def test_one_seed_for_each_environment() -> None:
    together = make_env("HalfCheetah-v5", seed=[3, 4], num_envs=2)
    start = together.reset()["observation"]
    for index, seed in enumerate((3, 4)):
        apart = make_env("HalfCheetah-v5", seed=seed).reset()["observation"]
        assert torch.equal(start[index], apart)
    with pytest.raises(ValueError, match="got 3 seeds for num_envs=2"):
        make_env("HalfCheetah-v5", seed=[1, 2, 3], num_envs=2)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_random_states_are_restored(num_envs: int) -> None:
    env, other = (make_env("HalfCheetah-v5", seed=s, num_envs=num_envs) for s in (0, 5))
    env.reset()
    states = random_states(env)
    assert len(states) == num_envs
    expected = env.reset()["observation"]
    other.reset()
    set_random_states(other, states)
    assert torch.equal(other.reset()["observation"], expected)
    with pytest.raises(ValueError, match="3 states for"):
        set_random_states(other, [*states, *states, *states][:3])


def test_without_states_an_environment_is_seeded_from_torch() -> None:
    env = make_env("HalfCheetah-v5", seed=0)
    observations = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        set_random_states(env, [])
        observations.append(env.reset()["observation"])
    assert torch.equal(observations[0], observations[1])
    assert not torch.equal(observations[0], observations[2])


def test_random_states_of_unstarted_and_closed_environments() -> None:
    env, other = (make_env("Pendulum-v1", num_envs=2) for _ in range(2))
    assert random_states(env) == []
    env.reset()
    states = random_states(env)
    expected = env.reset()["observation"]
    set_random_states(other, states)
    assert torch.equal(other.reset()["observation"], expected)
    env.close()
    assert random_states(env) == []

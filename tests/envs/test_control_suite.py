"""The DeepMind Control Suite, in a separate virtual environment: `pip install '.[dmc]'`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch
from torchrl.envs.utils import check_env_specs

from alm_torchrl.agent import ALMAgent
from alm_torchrl.envs import frame_stacks, make_env, random_states, set_random_states
from recipes.script import prepare_script

prepare_script()  # dm_control chooses its renderer when it is imported
needs_dm_control = pytest.mark.skipif(
    find_spec("dm_control") is None, reason="dm_control is not installed: pip install '.[dmc]'"
)


def test_without_dm_control_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(ImportError, match=r"dm_control/cheetah-run.*alm-torchrl\[dmc\].*separate"):
        make_env("dm_control/cheetah-run")


@needs_dm_control
@pytest.mark.parametrize(
    ("task", "observation", "positions", "action"),
    [
        ("cheetah-run", 17, 8, 6),
        ("cartpole-swingup", 5, 3, 1),
        ("humanoid-run", 67, 37, 21),
        ("ball_in_cup-catch", 8, 4, 2),
        ("manipulator-bring_ball", 44, 33, 5),
        ("dog-walk", 223, 147, 38),
    ],
)
@pytest.mark.parametrize("num_envs", [1, 2])
def test_tasks_have_one_observation_in_the_suites_order(
    task, observation, positions, action, num_envs
):
    env = make_env(f"dm_control/{task}", seed=0, num_envs=num_envs)
    check_env_specs(env)
    lead = () if num_envs == 1 else (2,)
    assert env.observation_spec["observation"].shape == (*lead, observation)
    assert env.action_spec_unbatched.shape == (action,)
    data = env.rollout(3)
    assert data["observation"].dtype == data["next", "reward"].dtype == torch.float32
    assert set(data.keys()) - {"next", "action"} == {
        "observation", "episode_reward", "done", "terminated", "truncated",
    }  # fmt: skip
    hidden = make_env(f"dm_control/{task}", seed=0, mask_velocities=True)
    assert hidden.observation_spec["observation"].shape == (positions,)
    if num_envs == 1:
        agent = ALMAgent.from_env(env, latent_dim=4, hidden_dim=8)
        assert env.rollout(3, agent.policy())["action"].shape == (3, action)


@needs_dm_control
def test_time_limit_and_action_repeat():
    options = {"task_kwargs": {"time_limit": 0.4}, "action_repeat": 4}  # 40 control steps
    data = make_env("dm_control/cheetah-run", seed=0, **options).rollout(100)
    assert len(data) == 10
    assert data["next", "truncated"][-1]
    assert not data["next", "terminated"].any()


@needs_dm_control
def test_seeds_and_generators():
    def start(seed):
        return make_env("dm_control/cheetah-run", seed=seed, num_envs=2).reset()["observation"]

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
    env = make_env("dm_control/cheetah-run", seed=0, distractors=3)
    states = random_states(env)
    assert len(states) == 2
    expected = env.reset()["observation"]
    env.reset()
    set_random_states(env, states)
    assert torch.equal(env.reset()["observation"], expected)


@needs_dm_control
def test_pixels_and_history():
    try:
        env = make_env("dm_control/cheetah-run", seed=0, pixels=(12, 16), history=4)
    except OSError as error:
        pytest.skip(f"no off-screen rendering here: {error}")
    check_env_specs(env)
    data = env.rollout(4)
    assert data["pixels"].shape == (4, 9, 12, 16)
    assert data["pixels"].dtype == torch.uint8
    assert data["pixels"].float().std() > 10
    assert not torch.equal(data["pixels"][0], data["pixels"][-1])
    assert data["history"].shape == (4, 4, 17)
    assert "observation" not in data.keys()  # noqa: SIM118
    assert frame_stacks(env) == {"history": 4, "pixels": 3}
    video = make_env("dm_control/cheetah-run", seed=0, from_pixels=True).rollout(2)
    assert video["pixels"].shape == (2, 240, 320, 3)


@needs_dm_control
@pytest.mark.parametrize("task", ["cheetah-runn", "cheetah", "cheetah-run-v0"])
def test_an_unknown_task_is_refused_with_a_suggestion(task):
    with pytest.raises(ValueError, match=r"did you mean dm_control/cheetah-run"):
        make_env(f"dm_control/{task}")


@needs_dm_control
def test_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="cheetah-run does not take these arguments.*gravity"):
        make_env("dm_control/cheetah-run", gravity=1)

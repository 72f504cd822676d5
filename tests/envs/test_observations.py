"""Options of the observation: pixels, velocity masks, distractors and history."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torchrl.envs import CatFrames, TransformedEnv
from torchrl.envs.utils import check_env_specs

from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.envs import Distractors, frame_stacks, make_env, random_states, set_random_states
from recipes.script import prepare_script
from tests.data.counting import CountingEnv

pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")


def play(env, frames: int, seed: int = 0):
    torch.manual_seed(seed)
    return env.rollout(frames, break_when_any_done=False)


# ------------------------------------------------------------------------------------- pixels


@pytest.fixture(scope="module", autouse=True)
def _renderer():
    """Chooses the renderer of MuJoCo before the first frame."""
    before = os.environ.get("MUJOCO_GL")
    prepare_script()
    yield
    if before is None:
        os.environ.pop("MUJOCO_GL", None)


@pytest.fixture(scope="module")
def renders(_renderer) -> None:
    try:
        make_env("HalfCheetah-v5", pixels=8)
    except OSError as error:
        pytest.skip(f"no off-screen rendering here: {error}")


@pytest.mark.parametrize("num_envs", [1, 2])
def test_pixels_in_place_of_the_vector(renders, num_envs):
    env = make_env("HalfCheetah-v5", seed=0, num_envs=num_envs, pixels=(12, 16))
    check_env_specs(env)
    data = play(env, 4).reshape(num_envs, 4)
    assert "observation" not in data.keys()  # noqa: SIM118
    for step in (data, data["next"]):
        assert step["pixels"].shape == (num_envs, 4, 9, 12, 16)
        assert step["pixels"].dtype == torch.uint8
    assert data["pixels"].float().std() > 10  # not an empty image
    assert frame_stacks(env) == {"pixels": 3}
    env.close()


def test_a_stack_is_the_last_frames_and_begins_with_the_first(renders):
    data = play(make_env("HalfCheetah-v5", seed=0, pixels=16, max_episode_steps=4), 8)
    frames, after = (d["pixels"].unflatten(1, (3, 3)) for d in (data, data["next"]))
    assert torch.equal(after[:, :2], frames[:, 1:])
    assert not torch.equal(after[:, 2], after[:, 1])  # it moves
    for first in (0, 4):
        assert (frames[first] == frames[first, :1]).all()
    assert torch.equal(frames[1:4], after[:3])
    assert not torch.equal(frames[4], after[3])  # the frame after the last action is no other's


def test_the_frames_are_those_of_the_simulator(renders):
    env = make_env("HalfCheetah-v5", seed=0, pixels=16, frame_stack=1, proprioception=True)
    data = play(env, 3)
    assert data["observation"].shape == (3, 17)
    shown = torch.from_numpy(env.base_env.base_env._env.render().copy()).permute(2, 0, 1)
    assert torch.equal(data["next", "pixels"][-1], shown)


def test_frames_of_several_environments_equal_those_of_each(renders):
    together = play(make_env("HalfCheetah-v5", seed=[3, 4], num_envs=2, pixels=16), 3)
    for index, seed in enumerate((3, 4)):
        alone = make_env("HalfCheetah-v5", seed=[seed], pixels=16)
        torch.manual_seed(0)
        step = alone.reset()
        for time in range(3):
            assert torch.equal(step["pixels"], together["pixels"][index, time])
            step = alone.step(step.set("action", together["action"][index, time]))["next"]


def test_frames_of_other_sizes_are_resized(renders):
    pytest.importorskip("pygame")
    env = make_env("Pendulum-v1", seed=0, pixels=24)
    data = env.rollout(3)
    assert data["pixels"].shape == (3, 9, 24, 24)
    assert data["pixels"].float().std() > 10


def test_pixels_through_the_replay_buffer(renders):
    torch.manual_seed(0)
    env = make_env("HalfCheetah-v5", seed=0, num_envs=2, pixels=8, history=4, max_episode_steps=6)
    collector = make_collector(env, None, frames_per_batch=2)
    compact, plain = (
        make_replay_buffer(20, batch_size=20, num_envs=2, seed=0, frame_stacks=stacks)
        for stacks in (frame_stacks(env), None)
    )
    assert frame_stacks(env) == {"pixels": 3, "history": 4}
    for _, data in zip(range(15), collector, strict=False):
        compact.extend(data)
        plain.extend(data)
    collector.shutdown()
    ours, theirs = compact.sample(), plain.sample()
    for key, leaf in theirs.items(True, True):
        assert torch.equal(ours[key], leaf)


def test_pixels_that_cannot_be_rendered_raise(monkeypatch):
    def fail(self):
        raise RuntimeError("no\n  display")

    monkeypatch.setattr("gymnasium.envs.mujoco.MujocoEnv.render", fail)
    with pytest.raises(
        OSError, match=r"HalfCheetah-v5.*\(RuntimeError: no display\).*MUJOCO_GL"
    ) as error:
        make_env("HalfCheetah-v5", pixels=84)
    assert "\n" not in str(error.value)


def test_a_machine_without_a_renderer_says_what_to_set():
    code = "from alm_torchrl.envs import make_env; make_env('HalfCheetah-v5', pixels=84)"
    environment = {k: v for k, v in os.environ.items() if k != "DISPLAY"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "MUJOCO_GL": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "OSError: cannot render HalfCheetah-v5" in done.stderr
    assert "set the environment variable MUJOCO_GL to egl" in done.stderr


# ------------------------------------------------------------------------------ action repeat


def test_an_action_is_repeated_and_its_rewards_are_summed():
    once = make_env("HalfCheetah-v5", seed=0)
    twice = make_env("HalfCheetah-v5", seed=0, action_repeat=2)
    action = 0.3 * torch.ones(6)
    start, other = once.reset(), twice.reset()
    assert torch.equal(start["observation"], other["observation"])
    reward = 0
    for _ in range(2):
        start = once.step(start.set("action", action))["next"]
        reward = reward + start["reward"]
    other = twice.step(other.set("action", action))["next"]
    assert torch.equal(start["observation"], other["observation"])
    assert torch.allclose(other["reward"], reward)


def test_action_repeat_ends_with_the_episode():
    data = play(make_env("HalfCheetah-v5", seed=0, action_repeat=4, max_episode_steps=6), 4)
    assert data["next", "truncated"].flatten().tolist() == [False, True, False, True]


# ----------------------------------------------------------------------------- positions alone

POSITIONS = {
    "HalfCheetah-v5": (8, 1), "Hopper-v5": (5, 1), "Walker2d-v5": (8, 1), "Ant-v5": (13, 2),
    "Humanoid-v5": (22, 2), "Swimmer-v5": (3, 2), "InvertedPendulum-v5": (2, 0),
}  # fmt: skip


@pytest.mark.parametrize("task", POSITIONS)
def test_velocities_are_removed(task):
    """The observation is the simulator's positions."""
    names = ("cfrc_ext",) if task == "Ant-v5" else ()
    names = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext") if task == "Humanoid-v5" else names
    options = {f"include_{name}_in_observation": False for name in names}
    env = make_env(task, seed=0, mask_velocities=True, **options)
    kept, hidden = POSITIONS[task]
    observation = play(env, 3)["next", "observation"][-1]
    simulator = env.base_env.base_env._env.unwrapped.data
    assert torch.equal(observation, torch.tensor(simulator.qpos[hidden:]).float())
    assert observation.shape == (kept,)


def test_velocities_are_found_in_any_place():
    env = make_env("Humanoid-v5", seed=0, mask_velocities=True)
    observation = play(env, 2)["next", "observation"][-1]
    whole = env.base_env.base_env._env.unwrapped
    sizes = whole.observation_structure
    assert len(observation) == 348 - sizes["qvel"] - sizes["cvel"]
    expected = [whole.data.qpos[2:], whole.data.cinert[1:].flatten()]
    expected += [whole.data.qfrc_actuator[6:], whole.data.cfrc_ext[1:].flatten()]
    expected = torch.cat([torch.tensor(part) for part in expected]).float()
    assert torch.equal(observation, expected)
    visible = make_env(
        "HalfCheetah-v5", mask_velocities=True, exclude_current_positions_from_observation=False
    )
    assert visible.observation_spec["observation"].shape == (9,)


# -------------------------------------------------------------------------------- distractors


def test_distractors_are_standard_noise_after_the_observation():
    env = make_env("Hopper-v5", seed=0, distractors=64)
    check_env_specs(env)
    env.set_seed(0)
    data = play(env, 300)
    plain = play(make_env("Hopper-v5", seed=0), 300)
    assert torch.equal(data["observation"][:, :11], plain["observation"])  # nothing else changes
    assert torch.equal(data["next", "reward"], plain["next", "reward"])
    noise = data["next", "observation"][:, 11:]
    assert noise.shape == (300, 64)
    assert abs(float(noise.mean())) < 4 / (300 * 64) ** 0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / (300 * 64)) ** 0.5
    assert float(torch.corrcoef(noise.T).triu(1).abs().max()) < 0.35
    assert noise.unique(dim=0).shape[0] == 300


def test_distractors_follow_the_seed_and_differ_between_environments():
    def noise(seed, num_envs=2):
        env = make_env("Hopper-v5", seed=seed, num_envs=num_envs, distractors=3)
        return play(env, 4)["observation"].reshape(num_envs, 4, -1)[..., 11:]

    assert torch.equal(noise(1), noise(1))
    assert not torch.equal(noise(1), noise(2))
    assert not torch.equal(noise(1)[0], noise(1)[1])
    assert torch.equal(noise([5, 6])[0], noise([5], 1)[0])


def test_set_seed_seeds_the_noise():
    env = make_env("Hopper-v5", seed=0, num_envs=2, distractors=3)
    starts = []
    for seed in (7, 7, 8):
        env.set_seed(seed)
        starts.append(env.reset()["observation"])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0][:, 11:], starts[2][:, 11:])


def test_noise_does_not_use_the_global_generator():
    env = make_env("Hopper-v5", seed=0, distractors=3)
    state = torch.get_rng_state()
    env.reset()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_the_state_of_the_noise_is_restored(num_envs):
    env, other = (make_env("Hopper-v5", seed=s, num_envs=num_envs, distractors=5) for s in (0, 1))
    play(env, 7)
    states = random_states(env)
    assert len(states) == 2 * num_envs
    expected = play(env, 9)
    other.reset()
    set_random_states(other, states)
    data = play(other, 9)
    assert torch.equal(data["observation"], expected["observation"])


# ------------------------------------------------------------------------------------ history


@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize("actions", [False, True])
def test_a_history_is_the_last_observations_and_actions(num_envs, actions):
    env = make_env(
        "HalfCheetah-v5", seed=0, num_envs=num_envs, history=4, history_actions=actions,
        max_episode_steps=6,
    )  # fmt: skip
    check_env_specs(env)
    env.set_seed(0)
    data = play(env, 12).reshape(num_envs, 12)
    history, after = data["history"], data["next", "history"]
    assert history.dtype == torch.float32
    assert history.shape == (num_envs, 12, 4, 23 if actions else 17)
    assert torch.equal(history[:, :, -1, :17], data["observation"])
    assert torch.equal(after[:, :, :-1], history[:, :, 1:])
    assert torch.equal(after[:, :, -1, :17], data["next", "observation"])
    if actions:
        assert torch.equal(after[:, :, -1, 17:], data["action"])
    for first in (0, 6):  # the first observation repeated, with no action
        assert torch.equal(history[:, first], history[:, first, -1:].expand(-1, 4, -1))
        assert (history[:, first, :, 17:] == 0).all()
    assert torch.equal(history[:, 1:6], after[:, :5])


def test_a_history_after_masks_and_distractors():
    env = make_env("HalfCheetah-v5", seed=0, mask_velocities=True, distractors=2, history=3)
    data = play(env, 5)
    assert data["history"].shape == (5, 3, 10)
    assert torch.equal(data["history"][:, -1], data["observation"])


# ------------------------------------------------------------------------ stacks of any origin


def test_frame_stacks_of_a_custom_environment():
    stack = CatFrames(4, -1, in_keys=["observation"], out_keys=["stacked"])
    assert frame_stacks(TransformedEnv(CountingEnv(), stack)) == {"stacked": 4}
    other = CatFrames(4, -1, in_keys=["pixels"])  # along another dimension than the first
    env = make_env("HalfCheetah-v5")
    assert frame_stacks(env) == {}
    assert other.N == 4


def test_frame_stacks_of_parallel_environments():
    env = make_env("HalfCheetah-v5", num_envs=2, parallel=True, history=8)
    try:
        assert frame_stacks(env) == {"history": 8}
    finally:
        env.close(raise_if_closed=False)


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixels": 0}, r"pixels must be the size of frames, such as 84 or \[84, 84\], not 0"),
        ({"pixels": 84, "frame_stack": 0}, "frame_stack must be at least 1, not 0"),
        ({"action_repeat": 0}, "action_repeat must be at least 1, not 0"),
        ({"distractors": -1}, "distractors must be at least 0, not -1"),
        ({"history": -1}, "history must be at least 0"),
        ({"history_actions": True}, "choose history=8"),
        ({"proprioception": True}, "choose pixels=84"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_env("HalfCheetah-v5", **options)


@pytest.mark.parametrize("task", ["Reacher-v5", "Pendulum-v1"])
def test_unknown_velocities_are_refused(task):
    with pytest.raises(ValueError, match=f"velocities in the observation of {task} are unknown"):
        make_env(task, mask_velocities=True)


def test_distractors_alone():
    env = TransformedEnv(CountingEnv(), Distractors(2, seed=0))
    check_env_specs(env)
    assert env.reset()["observation"].shape == (5,)

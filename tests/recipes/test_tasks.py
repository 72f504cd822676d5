"""The recipe's options for what is observed of a task reach the environments and the replay."""

from __future__ import annotations

import pytest
import torch
from torchrl.envs.utils import check_env_specs

from recipes.build import make_module
from recipes.config import env_options
from tests.recipes.test_recipes import RECIPES, SHORT, mistake, run

OBSERVED = [
    *("task.mask_velocities=true", "task.distractors=3", "task.history=4"),
    *("task.history_actions=true", "task.action_repeat=2"),
]


def test_by_default_the_task_is_observed_as_it_is(config) -> None:
    options = env_options(config("task=ant_truncated").task)
    kwargs = options.pop("include_cfrc_ext_in_observation")
    assert kwargs is False
    assert options == {
        "pixels": False, "frame_stack": 3, "proprioception": False, "action_repeat": 1,
        "mask_velocities": False, "distractors": 0, "history": 0, "history_actions": False,
    }  # fmt: skip


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_the_options_reach_training_evaluation_and_replay(config, num_seeds) -> None:
    options = config(*SHORT, *OBSERVED, f"num_seeds={num_seeds}", "+task.kwargs.frame_skip=2")
    module = make_module(options, torch.device("cpu"))
    experience = module.experience
    for env in (experience.collector.env, module.eval_env):
        assert env.observation_spec_unbatched["observation"].shape == (11,)
        assert env.observation_spec_unbatched["history"].shape == (4, 17)
    assert list(experience.replay.frames) == [("history",)]
    for _, windows in zip(range(2), experience, strict=False):
        lead = [8, 3] if num_seeds == 1 else [2, 8, 3]
        assert list(windows["next", "history"].shape) == [*lead, 4, 17]
        newest = windows["next", "history"][..., -1, :11]
        assert torch.equal(newest, windows["next", "observation"])
    check_env_specs(module.eval_env)


@pytest.mark.slow
def test_a_run_on_an_environment_of_ones_own_goes_on(tmp_path) -> None:
    own = ["task.id=tests.data.counting:CountingEnv", "task.name=counting", "task.history=4"]
    paths = f"{RECIPES.parent / 'src'}:{RECIPES.parent}"
    arguments = [*SHORT, *own, "run.folder=out", "resume=auto", "run.tensorboard=false"]
    first = run("mujoco.py", *arguments, cwd=tmp_path, PYTHONPATH=paths)
    assert first.returncode == 0, first.stderr
    more = run("mujoco.py", *arguments, "training.total_steps=12", cwd=tmp_path, PYTHONPATH=paths)
    assert more.returncode == 0, more.stderr
    assert "resuming at step 6" in more.stdout


def test_a_module_that_is_not_there_ends_a_run_in_one_line(tmp_path, monkeypatch) -> None:
    message = mistake(tmp_path, monkeypatch, "task.id=not_there.at_all:Task", "run.folder=out")
    assert message.startswith("ValueError: not_there.at_all:Task: there is no module 'not_there'")
    assert "PYTHONPATH" in message

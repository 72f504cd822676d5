"""Every declared option: its meaning, its values, its name in messages, help and documentation."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recipes.command_line import read_arguments
from recipes.config import Config
from recipes.option_checks import check_options
from recipes.option_help import CONF, help_text, markdown_table
from recipes.run_name import override_name, register_names
from recipes.schema import allowed, check_value, declarations, fixed

OPTIONS = dict(declarations(Config))
NUMBERS = [name for name, option in OPTIONS.items() if option.type.startswith(("int", "float"))]
CHOICES = [name for name, option in OPTIONS.items() if option.metadata["choices"]]


@pytest.fixture(scope="module")
def default() -> Config:
    register_names()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_object(compose("mujoco", overrides=["run.folder=unused"]))


def set_option(config: Config, name: str, value: object) -> Config:
    changed = copy.deepcopy(config)
    group, _, last = name.rpartition(".")
    setattr(getattr(changed, group) if group else changed, last, value)
    return changed


def test_every_option_has_a_type_that_is_checked() -> None:
    for name, option in OPTIONS.items():
        assert option.metadata["meaning"].strip(), name
        assert "\n" not in option.metadata["meaning"], name
        free = option.type.startswith(("bool", "dict", "list", "Any"))
        named = name in ("task.name", "task.id", "run.folder", "resume")
        assert bool(allowed(option)) != (free or named), name


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_range_is_refused_with_the_name_of_its_option(default, name: str) -> None:
    step = 1 if OPTIONS[name].type.startswith("int") else 1e-3
    limits = OPTIONS[name].metadata["limits"]
    outside = {"ge": -step, "gt": 0, "le": step, "lt": 0}
    values = [limits[limit] + outside[limit] for limit in limits] + [math.nan]
    for value in values:
        with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={value}')} must be ") as no:
            check_options(set_option(default, name, value))
        assert str(no.value).endswith(allowed(OPTIONS[name]))
    inside = {"ge": 0, "gt": step, "le": 0, "lt": -step}
    for limit, bound in limits.items():
        check_value(name, OPTIONS[name], bound + inside[limit])


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_refused_with_the_known_ones(default, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}=x is unknown: choose ") as no:
        check_options(set_option(default, name, "x"))
    for choice in OPTIONS[name].metadata["choices"]:
        check_value(name, OPTIONS[name], choice)
        assert choice in str(no.value)


@pytest.mark.parametrize("preset", ["paper", "quickstart", "fast", "pixels"])
def test_the_presets_are_allowed(config, preset: str) -> None:
    check_options(config(f"preset={preset}"))


def test_null_is_allowed_where_the_type_says_so() -> None:
    check_value("evaluation.max_steps", OPTIONS["evaluation.max_steps"], None)


def test_an_unknown_limit_is_a_mistake_in_the_declaration() -> None:
    with pytest.raises(TypeError, match="unknown limits: {'max'}"):
        fixed("width", 3, max=4)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_whole_number_can_be_written_as_a_power_of_ten(name: str) -> None:
    whole = OPTIONS[name].type.startswith("int")
    assert read_arguments([f"{name}=1e5,2.5"]) == [f"{name}={'100000' if whole else '1e5'},2.5"]


def test_no_arguments_stay_none() -> None:
    assert read_arguments([]) == []


def test_other_arguments_stay_as_they_are() -> None:
    arguments = ["-m", "seed=0,1", "hydra/launcher=basic", "--config-dir", "mine", "task=ant"]
    arguments += ["~task.kwargs.frames", "+task.kwargs.a=1e3", "++training.schedule._target_=a.b"]
    arguments += ["encoder=mlp", "encoder.build._target_=a.b", "run.folder=1e5", "--cfg=job"]
    assert read_arguments(arguments) == arguments


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("Pendulum-v1", "Pendulum-v1"),
        ("dm_control/cheetah-run", "dm_control_cheetah-run"),
        ("my_package.tasks:Point", "my_package.tasks_Point"),
    ],
)
def test_a_run_is_named_after_the_id_of_its_task(composed, task: str, name: str) -> None:
    options = composed(*read_arguments([f"task.id={task}", "seed=3"]))
    assert (options.task.id, options.task.name) == (task, name)
    assert re.fullmatch(rf"runs/{name}-quickstart-seed3-\d+-\d+", options.run.folder)
    named = read_arguments([f"task.id={task}", "task.name=mine"])
    assert composed(*named).task.name == "mine"
    assert override_name([f"task.id={task}", "task.name=mine"]) != override_name([]) == ""


def test_the_help_lists_every_option_with_the_values_of_the_command_line(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    register_names()
    text = help_text("mujoco", ["preset=paper", "training.batch_size=7"])
    lines = text.splitlines()
    for name in OPTIONS:
        assert sum(line.startswith(f"  {name}=") for line in lines) == 1, name
    assert "  training.batch_size=7 " in text
    assert "  agent.hidden_dim=512 " in text
    assert "fast, paper, pixels, quickstart" in text
    described = [line for line in lines if not re.match(r"  \S+=\S+$|\S", line)]
    assert max(map(len, described)) <= 80


def test_the_documentation_lists_every_option() -> None:
    rows = markdown_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(OPTIONS)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)


def test_the_command_line_is_read_before_pytorch_is_loaded() -> None:
    modules = "recipes.mujoco, recipes.pixels"
    command = f"import sys, {modules}; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", command], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"


def test_the_defaults_are_those_of_the_paper(config) -> None:
    paper = config("preset=paper")
    for name, option in OPTIONS.items():
        default = option.default
        if default not in (dataclasses.MISSING, "???") and "$" not in str(default):
            assert attrgetter(name)(paper) == default, name

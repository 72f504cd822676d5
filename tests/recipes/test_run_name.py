"""Runs that differ on the command line have folders that differ."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from recipes.config import Config
from recipes.run_name import override_name
from recipes.schema import declarations

TIME = r"-\d{8}-\d{6}"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "halfcheetah-quickstart-seed0"),
        (["task=ant", "preset=paper", "seed=3"], "ant-paper-seed3"),
        (["ablation=no_model"], "halfcheetah-quickstart-no_model-seed0"),
        (["learning_rates.actor=1e-3"], "halfcheetah-quickstart-learning_rates.actor_0.001-seed0"),
        (
            ["training.total_steps=9000", "resume=auto", "run.log_every=3"],
            "halfcheetah-quickstart-seed0",
        ),
        (["run.precision=bf16-mixed"], "halfcheetah-quickstart-run.precision_bf16-mixed-seed0"),
    ],
)
def test_a_folder_carries_what_was_overridden(composed, overrides: list[str], name: str) -> None:
    assert re.fullmatch(f"runs/{re.escape(name)}{TIME}", composed(*overrides).run.folder)


def test_a_folder_carries_every_option_that_has_a_part_in_what_is_learned() -> None:
    own_place = {"seed", "task.name", "task.paper_steps", "training.total_steps"}
    for name, option in declarations(Config):
        carried = override_name([f"{name}=1"]) != override_name([f"{name}=2"])
        assert carried == (option.metadata["kind"] != "free" and name not in own_place), name


def test_neither_order_nor_spelling_counts() -> None:
    assert override_name(["agent.hidden_dim=8", "learning_rates.actor=1e-3"]) == override_name(
        ["learning_rates.actor=0.001", "agent.hidden_dim=8"]
    )


def test_a_name_is_safe_for_file_systems_and_command_lines_and_short() -> None:
    """What is cut or replaced differs by its checksum still."""
    many = [f"agent.hidden_dim={n}" for n in (8, 9)]
    others = ["training.batch_size=8", "training.warmup_steps=20", "evaluation.episodes=1"]
    others += ["learning_rates.actor=1e-3", "objective.horizon=5"]
    names = [
        override_name(["+task.kwargs.camera='../a b'"]),
        override_name(["+task.kwargs.camera='../a/b'"]),
        override_name(["task.kwargs={a:1}"]),
        override_name(["task.kwargs={a:2}"]),
        override_name(["encoder.build._target_=a.b.c"]),
        *(
            override_name([*others, "learning_rates.actor=1e-3", "objective.horizon=5", one])
            for one in many
        ),
        *(override_name([f"task.id=module:Task{'x' * 300}{n}"]) for n in range(2)),
    ]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"-[A-Za-z0-9._-]{1,110}", name), name
    assert all(a != b for a, b in pairwise(names))


def test_a_name_can_be_given_as_an_option(composed) -> None:
    """The message "resume=FOLDER goes on" is to be copied as it is."""
    folder = composed(
        "learning_rates.actor=1e-3", "+task.kwargs.a=[1,2]", "task.pixels=84"
    ).run.folder
    assert composed(f"resume={folder}").resume == folder

"""What a run that goes on may change of its options, and what it says of it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from omegaconf import OmegaConf, open_dict

from recipes.config import Config
from recipes.run_config import ConfigRecord, find_changes, write_config
from recipes.saved_config import resumed_options
from recipes.schema import declarations


def test_every_option_says_whether_a_run_may_change_it() -> None:
    kinds = {name: option.metadata.get("kind") for name, option in declarations(Config)}
    leaves = OmegaConf.to_container(OmegaConf.structured(Config))
    missing = {name: value for name, value in leaves.items() if not isinstance(value, dict)}
    for group, options in leaves.items():
        if isinstance(options, dict):
            missing |= {f"{group}.{name}": value for name, value in options.items()}
    assert kinds.keys() == missing.keys()
    assert set(kinds.values()) == {"fixed", "noted", "free"}
    for name, kind in kinds.items():
        if name.startswith(("objective.", "agent.", "encoder.")):
            assert kind == "fixed", name
    for name in ("warmup_steps", "frames_per_batch", "num_envs", "updates_per_step"):
        assert kinds[f"training.{name}"] == "fixed"


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (
            "ablation=no_model",
            "objective.actor_objective=lambda_returns and cannot continue with value",
        ),
        ("ablation=horizon_5", "objective.horizon=3 and cannot continue with 5"),
        (
            "ablation=squared_distance",
            "objective.consistency=reverse_kl and cannot continue with squ",
        ),
        (
            "ablation=online_target",
            "objective.latent_target=moving_average and cannot continue with",
        ),
        (
            "ablation=learned_weight",
            "objective.consistency_level=None and cannot continue with 1.0",
        ),
        ("ablation=no_reward_term", "objective.reward_term=True and cannot continue with False"),
        (
            "ablation=no_consistency_reward",
            "objective.consistency_coeff=0.1 and cannot continue with",
        ),
        (
            "objective.short_windows=drop",
            "objective.short_windows=mask and cannot continue with drop",
        ),
        ("objective.gamma=0.9", "objective.gamma=0.99 and cannot continue with 0.9"),
        (
            "training.updates_per_step=2",
            "training.updates_per_step=1.0 and cannot continue with 2.0",
        ),
        ("training.warmup_steps=9", "training.warmup_steps=2000 and cannot continue with 9"),
        ("training.warmup_updates=9", "training.warmup_updates=0 and cannot continue with 9"),
        ("training.frames_per_batch=2", "training.frames_per_batch=1 and cannot continue with 2"),
        ("evaluation.ema_decay=0.9", "evaluation.ema_decay=0.0 and cannot continue with 0.9"),
        (
            "encoder=linear",
            "encoder.build={'_target_': 'alm_torchrl.modules.MLP",
        ),
        (
            "+training.optimizer.weight_decay=0.1",
            "training.optimizer={'_target_': 'torch.optim.Adam'}",
        ),
        (
            "+training.schedule._target_=torch.optim.lr_scheduler.LinearLR",
            "training.schedule={} and cannot continue with",
        ),
        (
            "learning_rates.encoder=1e-4",
            "learning_rates.encoder=None and cannot continue with 0.0001",
        ),
        ("task.pixels=84", "task.pixels=False and cannot continue with 84"),
        ("seed=1", "seed=0 and cannot continue with 1"),
    ],
)
def test_a_run_cannot_go_on_as_another(config, tmp_path: Path, option: str, says: str) -> None:
    write_config(tmp_path, config())
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} was trained with {says}")):
        find_changes(tmp_path, config(option))


def test_rates_of_a_schedule_cannot_change(config, tmp_path: Path) -> None:
    schedule = "+training.schedule._target_=torch.optim.lr_scheduler.LinearLR"
    write_config(tmp_path, config(schedule))
    with pytest.raises(ValueError, match="learning_rates.actor=0.001 and cannot continue with"):
        find_changes(tmp_path, config(schedule, "learning_rates.actor=1e-5"))


def test_what_may_change_is_noted_with_its_step(config, tmp_path: Path, capsys) -> None:
    write_config(tmp_path, config())
    assert find_changes(tmp_path, config()) == []
    later = config("learning_rates.actor=1e-5", "training.total_steps=9000", "run.log_every=7")
    changes = find_changes(tmp_path, later)
    assert changes == [
        {"option": "learning_rates.actor", "from": 0.001, "to": 1e-05},
        {"option": "training.total_steps", "from": 6000, "to": 9000},
    ]
    record = ConfigRecord(tmp_path, later, changes, step=4000)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml"}
    experience = MagicMock(updates=9000)
    experience.__len__.return_value = 9000  # nothing is left to do
    module = SimpleNamespace(experience=experience)
    record.on_train_start(SimpleNamespace(is_global_zero=True), module)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml"}
    assert find_changes(tmp_path, later) == changes
    experience.updates = 4000
    record.on_train_start(SimpleNamespace(is_global_zero=True), module)
    lines = (tmp_path / "changes.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 4000, **one} for one in changes]
    assert "from step 4000: learning_rates.actor=1e-05, 0.001 before" in capsys.readouterr().out
    assert find_changes(tmp_path, later) == []  # config.yaml is what trains now


def test_a_run_older_than_an_option_had_its_value_of_then(config, tmp_path: Path) -> None:
    """No option without such a value can be missing from a run's file."""
    now = config()
    whole = OmegaConf.to_container(OmegaConf.create(vars(now)))
    for name, option in declarations(Config):
        old = OmegaConf.create(whole)
        group, _, last = name.rpartition(".")
        del (OmegaConf.select(old, group) if group else old)[last]
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(old))
        if option.metadata["kind"] != "free" and option.metadata["before"] == "???":
            with pytest.raises(ValueError, match=f"lacks {name}: restore it from a copy"):
                find_changes(tmp_path, now)
        else:
            assert find_changes(tmp_path, now) == [], name


LEVEL = "a{0}: &a{0} [{1}]\n"
BOMB = "a0: &a0 [x]\n" + "".join(LEVEL.format(i, f"*a{i - 1}," * 9) for i in range(1, 10))


@pytest.mark.parametrize(
    "content",
    [
        *("", "# nothing\n", "- a\n- list\n", "text", "seed: [", "a: 1\na: 2\n", "\x00"),
        *(BOMB, "a: " + "[" * 20_000, "a: " + "9" * 5_000, "a: b\n" * 20_000, "\udcff"),
        "a: !!python/object/apply:os.mkdir ['executed']",
    ],
    ids=lambda content: content[:12],
)
def test_a_config_that_no_run_wrote_is_refused_at_once(
    config, tmp_path: Path, monkeypatch, content: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_bytes(content.encode(errors="surrogateescape"))
    start = time.monotonic()
    with pytest.raises(ValueError, match="config.yaml .*: restore it from a copy, or start") as no:
        find_changes(Path(), config())
    assert time.monotonic() - start < 5
    assert "\n" not in str(no.value)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_interpolations_of_a_file_are_not_followed(config, tmp_path: Path) -> None:
    old = OmegaConf.to_yaml(OmegaConf.create(vars(config())))
    (tmp_path / "config.yaml").write_text(old.replace("seed: 0", "seed: ${oc.env:HOME}", 1))
    with pytest.raises(ValueError, match=r"trained with seed=\$\{oc.env:HOME\} and cannot"):
        find_changes(tmp_path, config())


def test_a_missing_config_is_refused(config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.yaml is missing: restore it from a copy"):
        find_changes(tmp_path, config())


def resumed(composed, folder: Path, *given: str) -> Config:
    given = (*given, f"resume={folder}")
    options = composed(*given)
    with open_dict(options):
        del options["hydra"]
    return OmegaConf.to_object(resumed_options(options, given))


def test_a_folder_alone_has_the_options_of_its_run(config, composed, tmp_path: Path) -> None:
    options = (
        *("preset=paper", "task=walker2d", "seed=14", "ablation=horizon_5", "encoder=identity"),
        *("+agent.network_kwargs.dynamics.hidden_dim=7", "evaluation.every=500"),
    )
    started = config(*options, folder=tmp_path)
    write_config(tmp_path, started)
    same = resumed(composed, tmp_path)
    assert same.resume == str(tmp_path)
    same.resume = "never"
    assert same == started
    given = ("training.total_steps=7000", "+agent.network_kwargs.dynamics.hidden_dim=9")
    more = resumed(composed, tmp_path, *given)
    assert more.training.total_steps == 7000
    assert more.agent.network_kwargs == {"dynamics": {"hidden_dim": 9}}
    more.training.total_steps, more.resume = started.training.total_steps, "never"
    more.agent.network_kwargs["dynamics"]["hidden_dim"] = 7
    assert more == started


@pytest.mark.parametrize("choice", ["preset=fast", "task=hopper", "encoder=mlp", "~task"])
def test_a_choice_describes_the_whole_run(config, composed, tmp_path: Path, choice: str) -> None:
    write_config(tmp_path, config("seed=14"))
    options = composed(choice, f"resume={tmp_path}")
    assert resumed_options(options, (choice, f"resume={tmp_path}")) is options


def test_a_run_older_than_an_option_keeps_what_it_did(config, composed, tmp_path: Path) -> None:
    write_config(tmp_path, config("seed=14"))
    file = tmp_path / "config.yaml"
    saved = OmegaConf.load(file)
    del saved.training.imagined_steps, saved.checkpoint
    OmegaConf.save(saved, file)
    assert resumed(composed, tmp_path).training.imagined_steps == 0
    for wrong in ("many", "${oc.env:HOME}"):
        saved.training = OmegaConf.create({"batch_size": "?"})
        file.write_text(OmegaConf.to_yaml(saved).replace("'?'", f"'{wrong}'").replace("?", wrong))
        with pytest.raises(ValueError, match=r"has an invalid training.batch_size=.*: restore it"):
            resumed(composed, tmp_path)
    file.write_text("- 1\n")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        resumed(composed, tmp_path)
    file.unlink()
    assert resumed(composed, tmp_path).seed == 0  # choose_folder tells what is missing

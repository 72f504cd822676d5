"""Where a run begins, and what it refuses to begin on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from lightning.pytorch.utilities import rank_zero_only

from alm_torchrl.training import find_checkpoint, make_trainer
from recipes.run_config import ConfigRecord
from recipes.run_folder import prepare
from recipes.train import fit
from tests.training import tiny


@pytest.fixture(autouse=True)
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes back what preparing a run sets for its other processes."""
    monkeypatch.setenv("ALM_TORCHRL_RUN_FOLDER", "none")
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    options = {"seed": 0, "title": "", "eval_every": 6, "checkpoint_every": 6}
    trainer = make_trainer(folder, **options, accelerator="cpu", tensorboard=False)
    trainer.progress_bar_callback.disable()
    trainer.fit(tiny.make_module(12))
    return folder


@pytest.fixture
def make_run(trained: Path, config):
    """Makes the folder of a run that was trained with some options."""

    def make(folder: Path, *overrides: str) -> Path:
        prepare(config(*overrides, folder=folder)).lock.release()
        shutil.copytree(trained, folder, dirs_exist_ok=True)
        return folder

    return make


def spoil(folder: Path, what: str = "state.ckpt") -> None:
    for path in (folder / "checkpoints").glob(f"update-*/{what}"):
        path.write_bytes(path.read_bytes()[:-1])


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_has_a_folder_with_its_options(config, tmp_path: Path) -> None:
    with prepare(config("seed=3", folder=tmp_path / "a/b")) as run:
        assert (run.folder, run.start, run.changes) == (tmp_path / "a/b", None, [])
        assert {path.name for path in run.folder.iterdir()} == {"config.yaml", "run.lock"}
        with pytest.raises(OSError, match="is in use by process"):
            prepare(config("seed=4", folder=tmp_path / "a/b"))
    assert [path.name for path in run.folder.iterdir()] == ["config.yaml"]
    assert "seed: 3" in (run.folder / "config.yaml").read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_a_run_gives_its_folder_back_however_it_ends(config, tmp_path: Path, error) -> None:
    with pytest.raises(error), prepare(config(folder=tmp_path)):
        raise error
    assert not (tmp_path / "run.lock").exists()


def test_a_rejected_start_removes_the_folder_that_it_made_alone(config, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        with prepare(config(folder=tmp_path / name)) as run:
            run.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_missing_login_of_wandb_costs_one_line(config, tmp_path: Path) -> None:
    error = type("UsageError", (Exception,), {"__module__": "wandb.errors"})
    trainer, module = MagicMock(), MagicMock(compiles=False, restored=False)
    trainer.fit.side_effect = error("No API key configured.\nUse `wandb login` to log in.")
    options = config(folder=tmp_path / "out")
    says = "^run.wandb=true: .*No API key configured.*to log in, or set WANDB_MODE=offline$"
    with prepare(options) as run, pytest.raises(SystemExit, match=says) as stop:
        fit(options, run, trainer, module)
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("resume", ["auto", "FOLDER"])
def test_a_run_goes_on_and_is_left_as_it_was_until_it_does(
    make_run, config, tmp_path: Path, resume: str
) -> None:
    folder = make_run(tmp_path / "out")
    before = snapshot(folder)
    again = config("learning_rates.actor=1e-5", f"resume={resume}", folder=folder)
    again.resume = str(folder) if resume == "FOLDER" else resume
    with prepare(again) as run:
        assert (run.folder, run.start) == (folder, find_checkpoint(folder / "checkpoints"))
        (change,) = run.changes
        (record,) = run.record(again)
    assert change["option"] == "learning_rates.actor"
    assert snapshot(folder) == before
    assert isinstance(record, ConfigRecord)


@pytest.mark.parametrize("resume", ["auto", "FOLDER"])
@pytest.mark.parametrize("what", ["state.ckpt", "manifest.json"])
def test_a_run_of_which_no_checkpoint_is_whole_is_refused(
    make_run, config, tmp_path: Path, resume: str, what: str
) -> None:
    folder = make_run(tmp_path / "out")
    spoil(folder, what)
    before = snapshot(folder)
    options = config(f"resume={resume}", folder=folder)
    options.resume = str(folder) if resume == "FOLDER" else resume
    with pytest.raises(
        OSError, match=rf"{what} .*: restore it from a copy, or start a new run with res"
    ) as no:
        prepare(options)
    assert "\n" not in str(no.value)
    assert snapshot(folder) == before


def test_a_folder_with_a_curve_is_not_begun_anew_in(make_run, config, tmp_path: Path) -> None:
    """Its checkpoints may have been removed, or lie on a disk that is not there."""
    folder = make_run(tmp_path / "out")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match="out already contains a run"):
        prepare(config(folder=folder))
    options = "resume=auto", "evaluation.every=6", "training.total_steps=12"
    with pytest.raises(ValueError, match="has a curve of 12 steps but no checkpoint: restore it"):
        prepare(config(*options, folder=folder))
    rows = (folder / "curve.csv").read_text().splitlines(keepends=True)
    (folder / "curve.csv").write_text("".join(rows[:2]))  # killed before the first checkpoint
    with prepare(config(*options, folder=folder)) as run:
        assert run.start is None
    (folder / "checkpoints").symlink_to(tmp_path / "unmounted")
    with pytest.raises(OSError, match="unmounted|checkpoints'.*restore it from a copy"):
        prepare(config(*options, folder=folder))


def test_with_the_time_in_its_name_the_newest_run_goes_on(make_run, config, tmp_path: Path) -> None:
    old, new = tmp_path / "a-seed0-20260101-000000", tmp_path / "a-seed0-20260102-000000"
    make_run(old)
    make_run(tmp_path / "a-seed0-x-20260103-000000")  # of another name
    later = tmp_path / "a-seed0-20260105-000000"
    with prepare(config("resume=auto", folder=later)) as run:
        assert run.folder == old
    make_run(new)
    with prepare(config("resume=auto", folder=later)) as run:
        assert run.folder == new
    spoil(new)
    with pytest.raises(OSError, match="20260102-000000/checkpoints are damaged"):
        prepare(config("resume=auto", folder=later))
    with prepare(config(folder=later)) as run:
        assert (run.folder, run.start) == (later, None)


def test_a_sweep_does_not_go_on_with_another_of_its_runs(
    make_run, config, monkeypatch, tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "out", "learning_rates.actor=1e-3")
    rate = config("learning_rates.actor=1e-4", "resume=auto", folder=folder)
    more = config("training.total_steps=9000", "resume=auto", folder=folder)
    monkeypatch.setattr("recipes.run_folder.in_sweep", lambda: True)
    with pytest.raises(ValueError, match=re.escape("include ${learning_rates.actor}")):
        prepare(rate)
    with prepare(more) as run:
        assert [change["option"] for change in run.changes] == ["training.total_steps"]


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_a_run_of_one_process_is_its_first(
    config, tmp_path: Path, monkeypatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # what Lightning makes of it
    with prepare(config(folder=tmp_path)) as run:
        assert {path.name for path in run.folder.iterdir()} == {"config.yaml", "run.lock"}
    assert rank_zero_only.rank == 0

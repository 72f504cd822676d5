"""The tables of a run lose no rows, and other files in their place are kept."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from alm_torchrl.envs import EnvironmentFailedError
from alm_torchrl.training import (
    Checkpoint,
    ValueBias,
    find_checkpoint,
    make_trainer,
)
from alm_torchrl.training.curves import (
    LearningCurve,
    check_table,
    significant,
    table_bytes,
)
from tests.training.tiny import make_module

FIELDS = ["step", "seed", "return"]
ROWS = [{"step": step, "seed": 3, "return": step / 8} for step in (6, 12)]
LATER = {"step": 18, "seed": 3, "return": 2.5}


def steps(path: Path) -> list[str]:
    return [row["step"] for row in csv.DictReader(path.open())]


def test_a_table_of_this_run_does_not_change(tmp_path: Path, recwarn) -> None:
    path = tmp_path / "curve.csv"
    assert not check_table(path, [], 3, resumed=False)
    for rows in ([], ROWS, [*ROWS, LATER]):
        path.write_bytes(table_bytes(FIELDS, rows))
        before = path.read_bytes()
        assert not check_table(path, rows[:2], 3, resumed=bool(rows))
        assert path.read_bytes() == before
    assert not recwarn.list


DAMAGE = {
    "empty": b"",
    "zeros": bytes(40),
    "not text": b"\xff\xfe\x00",
    "header alone": b"step,seed,return\r\n",
    "edited": b"step,seed,return\r\n6,3,0.75\r\n12,3,9.9\r\n",
    "another seed": b"step,seed,return\r\n6,4,0.75\r\n12,4,1.5\r\n",
    "rows of another seed": b"step,seed,return\r\n6,3,0.75\r\n12,3,1.5\r\n18,4,2.5\r\n",
    "cut off": b"step,seed,return\r\n6,3,0.75\r\n12,3,1.5\r\n18,",
    "other columns": b"step,return\r\n6,0.75\r\n12,1.5\r\n",
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_changed_table_is_renamed_with_a_warning(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "curve.csv"
    for kept in ("curve.csv.kept", "curve.csv.2.kept"):
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=f"does not match the checkpoint; .*{kept}"):
            assert check_table(path, ROWS, 3, resumed=True)
        assert not path.exists()
        assert (tmp_path / kept).read_bytes() == content


def test_a_missing_table_is_written_again(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="curve.csv is missing; it was restored"):
        assert check_table(tmp_path / "curve.csv", ROWS, 3, resumed=True)


@pytest.mark.parametrize("name", ["curve.csv", "curve.png"])
def test_a_folder_in_its_place_is_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "note.txt").write_text("mine")
    with pytest.warns(UserWarning, match=f"{name}.kept"):
        check_table(tmp_path / "curve.csv", [], 3, resumed=True)
    assert (tmp_path / f"{name}.kept/note.txt").read_text() == "mine"


def test_a_new_run_keeps_the_curve_of_another(tmp_path: Path) -> None:
    (tmp_path / "curve.csv").write_bytes(table_bytes(FIELDS, ROWS))
    with pytest.warns(UserWarning, match="belongs to another run; .*curve.csv.kept"):
        assert not check_table(tmp_path / "curve.csv", [], 3, resumed=False)
    assert steps(tmp_path / "curve.csv.kept") == ["6", "12"]


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_run_resumes_with_the_curve_of_its_checkpoint(tmp_path: Path, harm) -> None:
    seen: list[list[str]] = []

    def note(*_: object) -> None:
        seen.append(steps(tmp_path / "curve.csv"))

    def fit(total_steps: int, start: Checkpoint | None, **hooks) -> None:
        trainer = make_trainer(
            tmp_path,
            seed=3,
            title="tiny",
            eval_every=6,
            checkpoint_every=6,
            accelerator="cpu",
            tensorboard=False,
            start=start,
        )
        trainer.callbacks.append(LambdaCallback(**hooks))
        trainer.fit(make_module(total_steps))

    fit(12, None)
    harm(tmp_path / "curve.csv")
    with pytest.warns(UserWarning, match="curve.csv"):
        fit(18, find_checkpoint(tmp_path / "checkpoints"), on_train_batch_start=note)
    assert seen[0] == ["6", "12"]
    assert steps(tmp_path / "curve.csv") == ["6", "12", "18"]


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.002, 0.002), (12345.678, 12345.68), (-1e-9, -1e-9), (3.0, 3.0), (1 / 3, 0.3333333)],
)
def test_returns_keep_seven_digits(tmp_path: Path, value, written) -> None:
    assert significant(torch.tensor(value, dtype=torch.float64).item()) == written
    curve = LearningCurve(tmp_path, seed=3)
    module = make_module()
    returns = torch.tensor([[value, value]])
    curve.on_validation_batch_end(L.Trainer(logger=False, accelerator="cpu"), module, returns)
    (row,) = csv.DictReader((tmp_path / "curve.csv").open())
    assert float(row["return"]) == pytest.approx(value, rel=1e-6)


def test_a_failing_measurement_does_not_change_the_other_tables(tmp_path: Path) -> None:
    class Failing(ValueBias):
        name = "second"
        broken = True

        def measure(self, loss, rollout):
            if self.broken:
                raise EnvironmentFailedError("as if it were the environment's")
            return super().measure(loss, rollout)

    def fit(start: Checkpoint | None) -> None:
        trainer = make_trainer(
            tmp_path,
            seed=3,
            title="tiny",
            eval_every=6,
            checkpoint_every=6,
            accelerator="cpu",
            tensorboard=False,
            start=start,
            measurements=[partial(one, steps=20, tail=1.0) for one in (ValueBias, Failing)],
        )
        trainer.fit(make_module(12))

    with pytest.raises(EnvironmentFailedError):
        fit(None)
    assert steps(tmp_path / "curve.csv") == ["6"]
    Failing.broken = False
    fit(find_checkpoint(tmp_path / "checkpoints"))
    for name, expected in (("curve", ["6", "12"]), ("bias", ["6", "12"]), ("second", ["12"])):
        assert steps(tmp_path / f"{name}.csv") == expected, name

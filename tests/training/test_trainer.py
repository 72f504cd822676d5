"""How a trainer adapts to the cluster that starts it."""

from __future__ import annotations

from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

from alm_torchrl import training
from alm_torchrl.training import find_checkpoint, make_trainer
from tests.training import tiny

SRUN = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
SALLOC = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"}


@pytest.fixture(autouse=True)
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 0)


def trainer(folder: Path, **options) -> L.Trainer:
    settings = {"seed": 0, "eval_every": 6, "checkpoint_every": 6, "accelerator": "cpu"}
    return make_trainer(folder, **{**settings, "tensorboard": False, **options})


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "1", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"}, SRUN, SALLOC],
    ids=["RANK", "LOCAL_RANK", "srun", "salloc"],
)
def test_a_run_of_one_process_has_rank_0_wherever_it_starts(
    tmp_path: Path, monkeypatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # what Lightning makes of it when imported
    run = trainer(tmp_path)
    run.progress_bar_callback.disable()
    run.fit(tiny.make_module(6))
    assert run.is_global_zero
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"curve.csv", "curve.png", "agent_last.pt", "checkpoints", "logs"}
    assert (tmp_path / "logs/csv/metrics.csv").stat().st_size > 0


def test_a_checkpoint_is_given_to_make_trainer_alone(tmp_path: Path) -> None:
    trainer(tmp_path).fit(tiny.make_module(6))
    start = find_checkpoint(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="would not restore the replay buffer"):
        trainer(tmp_path).fit(tiny.make_module(12), ckpt_path=start.state)
    with pytest.raises(ValueError, match="start needs checkpoint_every"):
        trainer(tmp_path, start=start, checkpoint_every=None)
    module = tiny.make_module(12)
    trainer(tmp_path, start=start).fit(module)
    assert (module.global_step, len(module.experience.replay)) == (12, 20)


def test_callbacks_and_trainer_options_of_the_user(tmp_path: Path) -> None:
    class Count(L.Callback):
        batches = 0

        def on_train_batch_end(self, *_) -> None:
            self.batches += 1

        def state_dict(self) -> dict[str, int]:
            return {"batches": self.batches}

    count = Count()
    run = trainer(tmp_path, callbacks=[count], limit_train_batches=6, logger=False)
    run.fit(tiny.make_module(12))
    assert count.batches == run.global_step == 6
    assert not (tmp_path / "logs").exists()
    state = torch.load(find_checkpoint(tmp_path / "checkpoints").state, weights_only=True)
    assert state["callbacks"][count.state_key] == {"batches": 6}


def test_the_public_names_are_few() -> None:
    assert len(training.__all__) <= 20


def test_several_processes_detect_their_launcher(tmp_path: Path, monkeypatch) -> None:
    def environment() -> object:
        return trainer(tmp_path, devices=2).strategy.cluster_environment

    assert type(environment()) is LightningEnvironment
    for name, value in SALLOC.items():
        monkeypatch.setenv(name, value)
    assert type(environment()) is LightningEnvironment  # nobody but it starts the others
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="Use `--ntasks-per-node=2` instead"):
        environment()
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert type(environment()) is SLURMEnvironment

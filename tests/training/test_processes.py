"""Two processes that train one agent."""

from __future__ import annotations

import csv
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.fabric.strategies.launchers import subprocess_script
from tensordict import TensorDict

from alm_torchrl.training import find_checkpoint, make_trainer, silence_library_warnings
from alm_torchrl.training.runtime import is_lost_process
from tests.patience import patience
from tests.training import ranks as script
from tests.training.tiny import make_env

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not torch.distributed.is_gloo_available(), reason="needs gloo"
)
ROOT = Path(__file__).parents[2]


@contextmanager
def started(mode: str, folder: Path, updates: int) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["src", "."])}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.ranks", mode, str(folder), str(updates)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def run(mode: str, folder: Path, updates: int) -> list[dict]:
    with started(mode, folder, updates) as process:
        _, errors = process.communicate(timeout=patience(60))
    assert process.returncode == 0, errors
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def second(process: subprocess.Popen[str]) -> int:
    """The process that the first one started."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, after = path.read_text().rsplit(")", 1)
            environment = (path.parent / "environ").read_bytes()
        except OSError:
            continue
        if int(after.split()[1]) == process.pid and b"LOCAL_RANK=1" in environment:
            return int(path.parent.name)
    raise LookupError("no second process")


def is_running(process: int) -> bool:
    """Whether a process runs, and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + patience(40)
    while not list(folder.glob("checkpoints/update-*[0-9]")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def windows(rows: int) -> TensorDict:
    torch.manual_seed(5)
    env = make_env()
    steps = torch.stack([env.rollout(3) for _ in range(rows)])
    steps["next", "reward"] = torch.randn(rows, 3, 1)
    steps["observation"].normal_()
    steps["next", "observation"].normal_()
    steps = steps.select("observation", "action", "next")
    return steps.apply(lambda value: value.double() if value.is_floating_point() else value)


@pytest.mark.slow
def test_two_half_batches_make_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    batches = [windows(8) for _ in range(3)]
    torch.save(batches, tmp_path / "batches.pt")
    module = script.given_module(batches)
    before = {key: value.clone() for key, value in module.loss.state_dict().items()}
    trainer = make_trainer(
        tmp_path, seed=0, title="", eval_every=3, accelerator="cpu", tensorboard=False
    )
    trainer.progress_bar_callback.disable()
    trainer.limit_val_batches = 0
    trainer.fit(module)
    whole = module.loss.state_dict()
    assert sum(not torch.equal(whole[key], before[key]) for key in whole) > 20
    for half in run("step", tmp_path, 3):
        for key, value in whole.items():
            assert torch.allclose(half["loss"][key], value, rtol=0, atol=1e-6), key


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["run", "bf16"])
def test_processes_stay_equal_with_separate_experience(tmp_path: Path, precision: str) -> None:
    first, other = run(precision, tmp_path, 200)
    assert first["loss"].keys() == other["loss"].keys()
    for key, value in first["loss"].items():
        assert torch.equal(value, other["loss"][key]), key
    assert first["observations"].shape == other["observations"].shape
    assert not torch.equal(first["drawn"], other["drawn"])
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert [(row["step"], row["frames"]) for row in rows] == [("200", "208")]  # once, not twice
    found = find_checkpoint(tmp_path / "checkpoints")
    assert found.update == 200
    assert [parts[-1].stop for parts in found.replay] == [104, 104]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the second process")
def test_a_signal_to_one_process_ends_both_with_a_checkpoint(tmp_path: Path) -> None:
    with started("run", tmp_path, 100_000) as process:
        wait_for_checkpoint(tmp_path, process)
        os.kill(second(process), signal.SIGTERM)
        _, errors = process.communicate(timeout=patience())
    assert process.returncode == 1
    assert "Traceback" not in errors
    reached = find_checkpoint(tmp_path / "checkpoints").update
    more = reached + 20 + reached % 2
    ranks = run("run", tmp_path, more)
    assert find_checkpoint(tmp_path / "checkpoints").update == more
    for rank in ranks:  # restored, then filled further
        assert len(rank["observations"]) == min(100, (8 + more) // 2)
    trainer = {"seed": 0, "title": "", "eval_every": 10, "accelerator": "cpu"}
    with pytest.raises(ValueError, match="2 processes; resume with as many"):
        make_trainer(tmp_path, start=find_checkpoint(tmp_path / "checkpoints"), **trainer)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the second process")
@pytest.mark.parametrize("which", ["first", "second"])
def test_when_one_process_dies_the_other_ends_with_the_reason(tmp_path: Path, which: str) -> None:
    with started("run", tmp_path, 100_000) as process:
        wait_for_checkpoint(tmp_path, process)
        other = second(process)
        os.kill(process.pid if which == "first" else other, signal.SIGKILL)
        _, errors = process.communicate(timeout=patience())  # until both have closed standard error
    assert process.returncode != 0
    assert "Connection" in errors or "terminated with code -9" in errors
    assert not is_running(other)
    assert find_checkpoint(tmp_path / "checkpoints") is not None


@pytest.mark.slow
def test_when_an_environment_fails_in_one_process_all_end(
    tmp_path,
) -> None:
    with started("fail", tmp_path, 100_000) as process:
        _, errors = process.communicate(timeout=patience(40))
    assert process.returncode != 0
    assert "the environment failed after frame 118: ValueError: the joint came off" in errors
    assert find_checkpoint(tmp_path / "checkpoints").update == 110
    assert len(run("run", tmp_path, 120)) == 2


def test_lightning_reports_why_it_kills_the_processes_of_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the first process waits for something else, no broken connection tells it."""
    for name in ("lightning.fabric", "lightning.pytorch", "torchrl", subprocess_script.__name__):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "level", logger.level)
    silence_library_warnings()
    told, killed = [], []
    handler = logging.Handler()
    handler.emit = lambda record: told.append((record.getMessage(), list(killed)))
    logging.getLogger("lightning.fabric").addHandler(handler)
    monkeypatch.setattr(os, "kill", lambda *arguments: killed.append(arguments))
    try:
        ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(9)"])
        ended.wait()
        assert subprocess_script._ChildProcessObserver(-1, [ended])._run()
    finally:
        logging.getLogger("lightning.fabric").removeHandler(handler)
    assert killed
    [(message, before)] = told
    assert "terminated with code 9" in message
    assert not before


def test_errors_of_a_lost_process_are_recognized() -> None:
    assert is_lost_process(RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection reset"))
    assert is_lost_process(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    assert not is_lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))

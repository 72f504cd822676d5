"""Two runs never share a folder, on one machine or on two."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from recipes import run_lock
from recipes.run_lock import RunLock

HOLD = "import sys, time; from pathlib import Path; from recipes.run_lock import RunLock\n"
HOLD += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_INTERVAL", 0.1)
    monkeypatch.setattr(run_lock, "_STALE", 0.4)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


def owner(folder: Path) -> dict:
    return json.loads((folder / "run.lock").read_bytes())


def elsewhere(folder: Path, **changes: object) -> Path:
    """The lock of a run on another machine, or what else may lie there."""
    lock = RunLock(folder)
    content = {**owner(folder), "host": "node7", "machine": "node7 5ea", "token": "0", **changes}
    lock.release()
    path = folder / "run.lock"
    path.write_text(json.dumps(content))
    return path


def test_the_second_run_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    says = f"{tmp_path} is in use by process {os.getpid()} on "
    with pytest.raises(OSError, match=says) as refused:
        RunLock(tmp_path)
    assert "\n" not in str(refused.value)
    assert owner(tmp_path)["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())
    RunLock(tmp_path).release()


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_killed_run_holds_nothing_back(tmp_path: Path) -> None:
    """Also while its parent has not waited for it, and it is a zombie."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=Path(run_lock.__file__).parents[1],
        stdout=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        with pytest.raises(OSError, match=f"in use by process {process.pid} on"):
            RunLock(tmp_path)
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        start = time.monotonic()
        RunLock(tmp_path).release()
        assert time.monotonic() - start < 0.3
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="knows no start of a process")
def test_a_number_that_another_process_has_now_is_not_the_runs(tmp_path: Path) -> None:
    RunLock(tmp_path).release()
    lock = RunLock(tmp_path)
    content = {**owner(tmp_path), "started": "1"}
    lock.release()
    (tmp_path / "run.lock").write_text(json.dumps(content))
    RunLock(tmp_path).release()


def test_a_run_on_another_machine_is_known_by_its_signs_of_life(tmp_path: Path) -> None:
    path = elsewhere(tmp_path)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(OSError, match=r"is in use by process \d+ on node7: wait until it ends"):
            RunLock(tmp_path)
    finally:
        done.set()
        thread.join()
    start = time.monotonic()
    RunLock(tmp_path).release()  # without them it has ended
    assert time.monotonic() - start >= 0.4


@pytest.mark.parametrize("changes", [{}, {"pid": -1}, {"pid": "x"}, {"pid": 10**30}])
def test_a_lock_that_nobody_touches_is_taken(tmp_path: Path, changes: dict) -> None:
    elsewhere(tmp_path, **changes)
    RunLock(tmp_path).release()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"[" * 100_000])
def test_a_lock_that_says_nothing_is_taken_when_it_is_old(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.lock").write_bytes(content)
    RunLock(tmp_path).release()


def test_a_requeued_job_waits_for_its_first_copy(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    first = RunLock(tmp_path)
    timer = threading.Timer(0.2, first.release)
    timer.start()
    second = RunLock(tmp_path)
    timer.join()
    start = time.monotonic()
    with pytest.raises(OSError, match="in use"):
        RunLock(tmp_path)
    assert 0.4 <= time.monotonic() - start < 5
    second.release()


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    for _ in range(5):
        elsewhere(tmp_path)
        held: list[RunLock] = []

        def take(held: list[RunLock] = held) -> None:
            with contextlib.suppress(OSError):
                held.append(RunLock(tmp_path))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (lock,) = held
        lock.release()
    assert not list(tmp_path.iterdir())


def test_a_run_whose_lock_was_taken_ends(tmp_path: Path, monkeypatch, capfd) -> None:
    ended: list[int] = []

    monkeypatch.setattr(os, "_exit", lambda status: (ended.append(status), lock._released.set()))
    lock = RunLock(tmp_path)
    elsewhere_content = {**owner(tmp_path), "token": "another"}
    (tmp_path / "run.lock").write_text(json.dumps(elsewhere_content))
    lock._thread.join(timeout=5)
    assert ended == [1]
    assert "another run has taken" in capfd.readouterr().err
    lock.release()
    assert owner(tmp_path)["token"] == "another"  # whose lock it is now

"""Scripts without a main guard, whose processes run the same call again."""

from __future__ import annotations

import multiprocessing

import pytest
from torchrl.envs import ParallelEnv

from alm_torchrl.data import make_collector
from alm_torchrl.envs import make_env
from tests.data.counting import CountingEnv


def start_workers() -> None:
    make_collector(CountingEnv, None, kind="multi", num_workers=2, frames_per_batch=20)


def start_environments() -> None:
    make_env(CountingEnv, num_envs=2, parallel=True)


@pytest.mark.parametrize("start", [start_workers, start_environments])
def test_a_process_of_an_unguarded_script_exits_silently(start, monkeypatch, capsys) -> None:
    process = multiprocessing.current_process()
    monkeypatch.setattr(process, "_inheriting", True, raising=False)  # as Python marks it
    with pytest.raises(SystemExit) as stop:
        start()
    assert stop.value.code == 1
    assert capsys.readouterr() == ("", "")


def test_the_parent_process_names_the_guard(monkeypatch) -> None:
    def start(env: ParallelEnv) -> None:
        raise EOFError  # TorchRL gives no message

    monkeypatch.setattr(ParallelEnv, "start", start)
    with pytest.raises(ChildProcessError, match='needs an `if __name__ == "__main__":` guard'):
        start_environments()

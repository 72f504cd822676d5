"""Checkpoints of a run, and that a run resumes from them as if it had not been interrupted."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import lightning as L  # noqa: N812
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import SerialEnv, Transform, TransformedEnv

from alm_torchrl.envs import EnvironmentFailedError
from alm_torchrl.envs import make_env as make_gymnasium
from alm_torchrl.training import find_checkpoint, make_trainer
from alm_torchrl.training.trainer import _make_loggers
from tests.training.tiny import make_env


class Losses(L.Callback):
    """Records the weights after every update, and raises a signal after one of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen: dict[int, tuple[float, ...]] = {}
        self.stop_after = stop_after

    def on_fit_start(self, trainer, pl_module) -> None:
        update = pl_module.training_step

        def noted(batch, batch_idx):
            update(batch, batch_idx)
            weights = [p.sum().item() for p in pl_module.loss.parameters()]
            self.seen[pl_module.experience.updates] = tuple(weights)
            if self.stop_after == pl_module.experience.updates:
                signal.raise_signal(signal.SIGTERM)

        pl_module.training_step = noted


def fit(
    module,
    folder: Path,
    *callbacks: L.Callback,
    resume: bool = False,
    every: int = 5,
    seed: int = 3,
):
    start = find_checkpoint(folder / "checkpoints") if resume else None
    trainer = make_trainer(
        folder,
        seed=seed,
        title="tiny",
        eval_every=6,
        checkpoint_every=every,
        accelerator="cpu",
        tensorboard=False,
        start=start,
    )
    trainer.callbacks.extend(callbacks)
    trainer.progress_bar_callback.disable()
    interrupted = False
    try:
        trainer.fit(module)
    except SystemExit:
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return trainer, interrupted


def curve(folder: Path) -> list[tuple[str, str]]:
    return [(row["step"], row["frames"]) for row in csv.DictReader((folder / "curve.csv").open())]


@pytest.mark.parametrize("stop_after", [5, 6, 7, 11, 12, 17])
def test_an_interrupted_run_resumes_where_it_stopped(make_module, tmp_path, stop_after) -> None:
    _, interrupted = fit(make_module(24), tmp_path, Losses(stop_after))
    assert interrupted
    found = find_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.update == stop_after
    notes = Losses()
    module = make_module(24)
    trainer, interrupted = fit(module, tmp_path, notes, resume=True)
    assert not interrupted
    assert list(notes.seen) == list(range(stop_after + 1, 25))
    assert trainer.global_step == 24
    assert module.experience.frames == 32
    assert curve(tmp_path) == [("6", "14"), ("12", "20"), ("18", "26"), ("24", "32")]
    assert int(module.agent.noise.step_count) == 23


@pytest.mark.parametrize("stop_after", [3, 4, 5, 10, 13])
def test_updates_of_the_warmup_are_counted_separately(make_module, tmp_path, stop_after) -> None:
    """Evaluations are at the same steps as without them, wherever a run was interrupted."""
    fit(make_module(12, warmup_updates=4), tmp_path, Losses(stop_after))
    notes, module = Losses(), make_module(12, warmup_updates=4)
    fit(module, tmp_path, notes, resume=True)
    assert list(notes.seen) == list(range(stop_after + 1, 17))
    assert curve(tmp_path) == [("0", "8"), ("6", "14"), ("12", "20")]
    assert int(module.agent.noise.step_count) == 11


@pytest.mark.parametrize("imagined_steps", [0, 3])
def test_losses_resume_bit_by_bit_with_the_same_experience(
    make_module, tmp_path: Path, imagined_steps: int
) -> None:
    make = partial(make_module, 2, updates_per_step=20, imagined_steps=imagined_steps)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    uninterrupted, resumed = Losses(), Losses()
    fit(make(), whole, uninterrupted)
    fit(make(), parts, Losses(stop_after=5))
    torch.manual_seed(99)
    fit(make(), parts, resumed, resume=True)
    of_this_step = range(6, 21)  # later updates have other transitions
    assert [resumed.seen[n] for n in of_this_step] == [uninterrupted.seen[n] for n in of_this_step]
    assert len({uninterrupted.seen[n] for n in of_this_step}) == 15


def test_the_buffer_is_restored_and_the_open_episode_truncated(make_module, tmp_path) -> None:
    module = make_module(24)
    fit(module, tmp_path, Losses(stop_after=7))
    stored = module.experience.replay.storage.get(slice(None)).clone()
    fresh = make_module(24)
    fit(fresh, tmp_path, resume=True)
    kept = fresh.experience.replay.storage.get(slice(None))[: len(stored)]
    assert len(stored) == 15
    assert not stored["next", "done"][-1]
    assert kept["next", "truncated"][-1]
    assert kept["next", "done"][-1]
    assert (stored == kept)[:-1].all()
    assert torch.equal(stored["next", "observation"], kept["next", "observation"])
    assert not torch.equal(
        kept["next", "observation"][-1], fresh.experience.replay[15]["observation"]
    )


def test_random_frames_are_not_drawn_again(make_module, tmp_path: Path) -> None:
    fit(make_module(24), tmp_path, Losses(stop_after=7))
    module = make_module(24)
    fit(module, tmp_path, resume=True)
    assert module.experience.collector.state_dict()["frames"] == 32


def test_a_lagging_policy_resumes_with_the_restored_weights(make_module, tmp_path: Path) -> None:
    fit(make_module(24, policy_lag=1), tmp_path, Losses(stop_after=7))
    module = make_module(24, policy_lag=1)
    acted = []

    class Note(L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            td = TensorDict({"observation": torch.ones(7)})
            module.experience.policy(td)
            weights = module.experience.policy.policy.parameters()
            learned = module.agent.policy().parameters()
            acted.append(all(torch.equal(a, b) for a, b in zip(weights, learned, strict=True)))

    fit(module, tmp_path, Note(), resume=True)
    assert acted == [True]


def test_only_the_newest_checkpoints_are_kept(make_module, tmp_path: Path) -> None:
    fit(make_module(24), tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["replay-0", "update-0000000020", "update-0000000024"]
    found = find_checkpoint(tmp_path / "checkpoints")
    files = {path.name for path in (tmp_path / "checkpoints/replay-0").iterdir()}
    assert files == {part.file for part in found.replay[0]}
    manifest = json.loads((found.folder / "manifest.json").read_text())
    assert (manifest["update"], manifest["step"], manifest["frames"]) == (24, 24, 32)
    assert set(manifest["versions"]) >= {"alm-torchrl", "torch", "torchrl"}


def test_a_finished_run_does_not_change(make_module, tmp_path: Path) -> None:
    fit(make_module(24), tmp_path)
    before = (tmp_path / "curve.csv").read_text()
    notes = Losses()
    fit(make_module(24), tmp_path, notes, resume=True)
    assert not notes.seen
    assert (tmp_path / "curve.csv").read_text() == before


@pytest.mark.parametrize("first", [18, 20])
def test_a_finished_run_continues_with_more_steps(make_module, tmp_path, first) -> None:
    fit(make_module(first), tmp_path)
    notes = Losses()
    trainer, _ = fit(make_module(24), tmp_path, notes, resume=True)
    assert list(notes.seen) == list(range(first + 1, 25))
    assert trainer.global_step == 24
    last = [("18", "26"), ("24", "32")]
    assert curve(tmp_path) == [("6", "14"), ("12", "20"), *last]
    assert find_checkpoint(tmp_path / "checkpoints").update == 24


def test_a_run_resumes_with_new_learning_rates(make_module, tmp_path) -> None:
    first = make_module(12, learning_rates=1e-3)
    fit(first, tmp_path)
    rates = {"world_model": 1e-4, "reward": 1e-5, "value": 1e-6, "actor": 0.0}
    module = make_module(24, learning_rates=rates)
    trainer, _ = fit(module, tmp_path, resume=True)
    (optimizer,) = trainer.optimizers
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == rates
    before = first.loss.parameter_groups()
    for name, parameters in module.loss.parameter_groups().items():
        same = all(torch.equal(*pair) for pair in zip(parameters, before[name], strict=True))
        assert same == (name == "actor"), name


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("harm", [flip_a_bit, truncate, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", ["state.ckpt", "manifest.json", "replay"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    make_module, tmp_path: Path, what: str, harm
) -> None:
    fit(make_module(24), tmp_path)
    newest = find_checkpoint(tmp_path / "checkpoints")
    if what == "replay":
        harm(tmp_path / "checkpoints/replay-0" / newest.replay[0][-1].file)
    else:
        harm(newest.folder / what)
    with pytest.warns(UserWarning, match="skipping a damaged checkpoint"):
        found = find_checkpoint(tmp_path / "checkpoints")
    assert found.update == 20
    notes = Losses()
    with pytest.warns(UserWarning, match="skipping a damaged checkpoint"):
        fit(make_module(24), tmp_path, notes, resume=True)
    assert list(notes.seen) == [21, 22, 23, 24]
    assert find_checkpoint(tmp_path / "checkpoints").update == 24


def test_a_checkpoint_of_a_newer_version_is_refused(make_module, tmp_path: Path) -> None:
    fit(make_module(12), tmp_path)
    path = find_checkpoint(tmp_path / "checkpoints").folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["version"] += 1
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**manifest, "sha256": digest}))
    with pytest.raises(ValueError, match="newer alm_torchrl"):
        find_checkpoint(tmp_path / "checkpoints")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks up names of open files")
@pytest.mark.parametrize("file", ["state.ckpt", "manifest.json.partial", "000000000012"])
def test_a_full_disk_stops_the_run_and_keeps_earlier_checkpoints(
    make_module, tmp_path: Path, monkeypatch, file: str
) -> None:
    """From the second checkpoint on, the disk is full when a certain file is written."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        if target.name.startswith(file) and saved:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(descriptor)

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            saved.extend((tmp_path / "checkpoints").glob("update-*5"))

    saved: list[Path] = []
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left on device"):
        fit(make_module(24), tmp_path, Note())
    assert find_checkpoint(tmp_path / "checkpoints").update == 5
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.undo()
    notes = Losses()
    fit(make_module(24), tmp_path, notes, resume=True)
    assert list(notes.seen) == list(range(6, 25))


class Failing(Transform):
    """Raises or returns a non-finite value at a step."""

    def __init__(self, how: str, at: int) -> None:
        super().__init__()
        self.how, self.at, self.count = how, at, 0

    def _step(self, tensordict, next_tensordict):
        self.count += 1
        if self.count == self.at and self.how == "raises":
            raise ValueError("the joint came off")
        if self.count == self.at:
            key = {"nan": "observation", "inf": "reward"}[self.how]
            next_tensordict[key].fill_(float(self.how))
        return next_tensordict


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "failed after frame 17: ValueError: the joint came off"),
        ("nan", "non-finite value in .*observation.* after frame 17"),
        ("inf", "non-finite value in .*reward.* after frame 17"),
    ],
)
def test_a_failing_environment_loses_nothing(make_module, tmp_path, how, says) -> None:
    module = make_module(24, env=TransformedEnv(make_env(), Failing(how, at=18)))
    with pytest.raises(EnvironmentFailedError, match=says):
        fit(module, tmp_path)
    assert len(module.experience.replay) == 17
    assert find_checkpoint(tmp_path / "checkpoints").update == 9
    notes = Losses()
    module = make_module(24)
    fit(module, tmp_path, notes, resume=True)
    assert list(notes.seen) == list(range(10, 25))
    assert module.experience.replay.storage.get(slice(None)).isfinite().all()


def test_a_non_finite_loss_keeps_the_last_checkpoint(make_module, tmp_path) -> None:
    class Poison(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 8:
                batch["next", "reward"].fill_(float("inf"))

    with pytest.raises(FloatingPointError, match="at update 8"):
        fit(make_module(24), tmp_path, Poison())
    assert find_checkpoint(tmp_path / "checkpoints").update == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_run_killed_at_any_moment_resumes(tmp_path: Path) -> None:
    """SIGKILL ends the run twenty times at random moments, and it resumes each time."""
    rng = random.Random(0)
    command = [sys.executable, "-m", "tests.training.killed"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["src", "."])}
    root = Path(__file__).parents[2]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=root, env=environment, text=True, **pipes) as server:

        def run(kill_after: float | None) -> int:
            server.stdin.write(f"{tmp_path}\n")
            server.stdin.flush()
            child = int(server.stdout.readline())
            if kill_after is not None:
                time.sleep(kill_after)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            return int(server.stdout.readline())

        kills, reached = 0, 0
        for _ in range(20):
            status = run(kill_after=rng.uniform(0.3, 1.0))
            kills += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL)
            found = find_checkpoint(tmp_path / "checkpoints")  # warnings are errors
            assert (found.update if found else 0) >= reached
            reached = found.update if found else 0
        assert run(kill_after=None) == 0
        server.stdin.close()
    assert kills >= 10
    assert [step for step, _ in curve(tmp_path)] == ["100", "200", "300", "400"]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "logs" not in path.parts
    }


class Stop(L.Callback):
    """Raises in one of the hooks that are called before training starts."""

    def __init__(self, hook: str, error: type[BaseException]) -> None:
        setattr(self, hook, partial(self._raise, error))

    @staticmethod
    def _raise(error: type[BaseException], *_: object, **__: object) -> None:
        raise error("stopped")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("hook", ["setup", "on_load_checkpoint", "on_fit_start", "on_train_start"])
def test_nothing_is_written_before_the_state_is_restored(
    make_module, tmp_path: Path, hook: str, error: type[BaseException]
) -> None:
    fit(make_module(12), tmp_path)
    before = contents(tmp_path)
    assert {"curve.csv", "curve.png", "agent_last.pt", "agent_best.pt"} <= before.keys()
    with contextlib.nullcontext() if error is KeyboardInterrupt else pytest.raises(error):
        _, interrupted = fit(make_module(24), tmp_path, Stop(hook, error), resume=True)
        assert interrupted
    assert contents(tmp_path) == before


def test_the_metrics_of_another_session_are_never_overwritten(tmp_path: Path) -> None:
    def version() -> str:
        (logger,) = _make_loggers(tmp_path, tensorboard=False, wandb=False)
        return logger.version

    (tmp_path / "logs/csv2").mkdir(parents=True)
    (tmp_path / "logs/csv").mkdir()
    assert version() == "csv3"
    (tmp_path / "logs/csv").rmdir()
    assert version() == "csv"
    (tmp_path / "logs/csv").mkdir()
    (tmp_path / "logs/csv2").rename(tmp_path / "logs/csv3")
    assert version() == "csv2"


def test_files_of_the_user_in_the_checkpoints_folder_stay(make_module, tmp_path: Path) -> None:
    fit(make_module(12), tmp_path)
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoints / "update-0000000010", checkpoints / "update-0000000010-best")
    mine = {
        *("notes.txt", "update-notes.txt", "update-best/agent.pt", "replay-0/notes.txt"),
        *("update-0000000010/notes.txt", "replay-0/.snapshot/x", "update-9.partial/x"),
    }
    for name in mine:
        (checkpoints / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoints / name).write_text(name)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "state.ckpt").write_text("mine")
    for name in ("update-0000000008", "update-0000000015.partial"):
        (checkpoints / name).symlink_to(elsewhere)
    with pytest.warns(UserWarning, match="contains other files; it was renamed to"):
        fit(make_module(24), tmp_path, resume=True)
    found = {path.read_text() for path in checkpoints.rglob("*") if path.stat().st_size < 99}
    assert found - {"mine"} == mine
    assert (elsewhere / "state.ckpt").read_text() == "mine"
    assert (checkpoints / "update-0000000010-best/state.ckpt").exists()
    assert find_checkpoint(checkpoints).update == 24


def test_a_run_with_numpy_numbers_resumes(make_module, tmp_path: Path) -> None:
    for steps in (12, 18):
        module = make_module(
            np.int64(steps), updates_per_step=np.float64(1), learning_rates=np.float64(1e-3)
        )
        fit(module, tmp_path, resume=steps == 18, seed=np.int64(3))
    assert find_checkpoint(tmp_path / "checkpoints").update == 18
    assert [step for step, _ in curve(tmp_path)] == ["6", "12", "18"]


def test_a_checkpoint_that_could_not_be_loaded_is_not_kept(make_module, tmp_path: Path) -> None:
    class Stateful(L.Callback):
        def state_dict(self) -> dict[str, np.generic]:
            return {"best": np.float64(1)}

    with pytest.raises(ValueError, match=r"state.ckpt could not be read again"):
        fit(make_module(12), tmp_path, Stateful())
    assert find_checkpoint(tmp_path / "checkpoints") is None
    assert not list((tmp_path / "checkpoints").glob("update-*"))


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_failing_evaluation_environment_loses_nothing(
    make_module, tmp_path: Path, at: int, evaluation: int
) -> None:
    played = 20 * (evaluation - 1)  # two episodes of ten steps each
    env = TransformedEnv(make_env(), Failing("raises", at=played + at))
    frame = 8 + 6 * evaluation
    message = f"the evaluation in .* failed after frame {frame}: ValueError: the joint"
    with pytest.raises(EnvironmentFailedError, match=message):
        fit(make_module(24, eval_env=env), tmp_path)
    assert find_checkpoint(tmp_path / "checkpoints").update == 6 * evaluation
    notes = Losses()
    fit(make_module(24), tmp_path, notes, resume=True)
    assert list(notes.seen) == list(range(6 * evaluation + 1, 25))
    assert curve(tmp_path) == [("6", "14"), ("12", "20"), ("18", "26"), ("24", "32")]


def test_one_failing_environment_of_several_loses_nothing(make_module, tmp_path: Path) -> None:
    failing = TransformedEnv(make_env(), Failing("raises", at=8))
    env = SerialEnv(3, [make_env, lambda: failing, make_env])
    with pytest.raises(EnvironmentFailedError, match="failed after frame 21: ValueError"):
        fit(make_module(24, env=env), tmp_path)
    found = find_checkpoint(tmp_path / "checkpoints")
    assert found.update == 13
    fit(make_module(24, env=SerialEnv(3, make_env)), tmp_path, resume=True)
    assert find_checkpoint(tmp_path / "checkpoints").update == 24


def test_a_signal_ends_the_warm_up_immediately(make_module, tmp_path: Path) -> None:
    class Signalling(Transform):
        def _step(self, tensordict, next_tensordict):
            seen.append(len(seen))
            if len(seen) == 3:
                signal.raise_signal(signal.SIGINT)
            return next_tensordict

    seen: list[int] = []
    (tmp_path / "agent_last.pt").write_bytes(b"of another run")
    module = make_module(12, env=TransformedEnv(make_env(), Signalling()))
    _, interrupted = fit(module, tmp_path)
    assert interrupted
    assert len(seen) == module.experience.frames == 3
    assert find_checkpoint(tmp_path / "checkpoints") is None
    assert (tmp_path / "agent_last.pt").read_bytes() == b"of another run"


def test_a_run_resumes_with_another_number_of_evaluation_environments(
    make_module, tmp_path: Path
) -> None:
    def pendulums(num_envs: int, steps: int):
        env = partial(make_gymnasium, "Pendulum-v1", seed=0)
        return make_module(steps, env=env(), eval_env=env(num_envs=num_envs))

    fit(pendulums(1, 6), tmp_path)
    with pytest.warns(UserWarning, match="evaluation environments have changed"):
        fit(pendulums(3, 12), tmp_path, resume=True)
    assert [step for step, _ in curve(tmp_path)] == ["6", "12"]

"""Training on experience of worker processes and Ray actors: counts, staleness, and failures.

Ray's tests share one cluster on this machine, with room for two workers and their replacements.
"""

from __future__ import annotations

import copy
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
from torchrl.envs import TransformedEnv

from alm_torchrl.agent import ALMAgent
from alm_torchrl.data import WorkersLostError, make_collector, make_replay_buffer
from alm_torchrl.envs import EnvironmentFailedError
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import (
    ALMModule,
    ExperienceStream,
    PolicyPublisher,
    VersionedPolicy,
    find_checkpoint,
    make_trainer,
)
from tests.data.counting import CountingEnv
from tests.patience import patience
from tests.training.test_checkpoints import Failing

ROOT = Path(__file__).parents[2]
NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
RAY = pytest.param("ray", marks=NEEDS_RAY)

pytestmark = pytest.mark.slow  # for the time that processes need to start


def failing_env(how: str, at: int) -> TransformedEnv:
    return TransformedEnv(CountingEnv(), Failing(how, at))


def dying_env() -> TransformedEnv:
    return TransformedEnv(CountingEnv(), Dying())


def hanging_env() -> TransformedEnv:
    return TransformedEnv(CountingEnv(), Hanging("hangs", 5))


def slow_env() -> TransformedEnv:
    print("constructs", flush=True)
    time.sleep(1e6)


def broken_env() -> TransformedEnv:
    raise ValueError("no such joint")


class Hanging(Failing):
    """Does not return from its fifth step."""

    def _step(self, tensordict, next_tensordict):
        self.count += 1
        if self.count == self.at:
            time.sleep(1e6)
        return next_tensordict


class Dying(Failing):
    """Ends its process at every fifth step."""

    def __init__(self) -> None:
        super().__init__("dies", 5)

    def _step(self, tensordict, next_tensordict):
        self.count += 1
        if self.count == self.at:
            os._exit(11)
        return next_tensordict


def make_module(kind, overlap=False, every=1, env=CountingEnv, **options) -> ALMModule:
    """Two workers of one environment each; 20 frames in a batch, and one update for two."""
    torch.manual_seed(0)
    agent = ALMAgent.from_env(CountingEnv(), latent_dim=4, hidden_dim=8, dynamics_hidden_dim=8)
    loss = ALMLoss(**agent.networks())
    policy = VersionedPolicy(agent.policy())
    collector = make_collector(
        env, copy.deepcopy(policy), kind=kind, num_workers=2, frames_per_batch=20,
        init_random_frames=40, overlap=overlap, seed=3, timeout=patience(), **options,
    )  # fmt: skip
    experience = ExperienceStream(
        collector,
        make_replay_buffer(400, batch_size=6, num_envs=1 if overlap else 2),
        total_steps=200,
        warmup_steps=40,
        updates_per_step=0.5,
        noise=agent.noise,
        policy=PolicyPublisher(policy, collector, every),
    )
    return ALMModule(agent, loss, experience, CountingEnv(), eval_episodes=1, log_every=10)


class Killer(L.Callback):
    """Kills the first worker after an update."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        collector = pl_module.experience.collector
        if batch_idx == self.at and hasattr(collector, "procs"):
            os.kill(collector.procs[0].pid, signal.SIGKILL)
        elif batch_idx == self.at:
            import ray

            ray.kill(collector.actors[0])


def fit(module: ALMModule, folder: Path, *callbacks: L.Callback, start=None) -> None:
    trainer = make_trainer(
        folder, seed=0, title="workers", eval_every=50, checkpoint_every=50,
        accelerator="cpu", tensorboard=False, start=start,
    )  # fmt: skip
    trainer.callbacks += callbacks
    trainer.progress_bar_callback.disable()
    try:
        trainer.fit(module)
    finally:
        module.experience.shutdown()


def ages(folder: Path) -> list[float]:
    rows = csv.DictReader((folder / "logs/csv/metrics.csv").read_text().splitlines())
    return [float(row["train/policy_staleness"]) for row in rows]


def check_windows(module: ALMModule) -> None:
    """Checks that the valid steps of a window are consecutive steps of one episode."""
    replay = module.experience.replay
    windows = torch.cat([replay.sample(100) for _ in range(20)])
    joined, observation = windows["validity_mask"][:, 1:], windows["observation"]
    follows = observation[:, 1:] == observation[:, :-1] + torch.tensor([0.0, 0.0, 1.0])
    assert joined.any()
    assert follows.all(-1)[joined].all()


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Ends the Ray cluster of the tests on this machine."""
    yield
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        sys.modules["ray"].shutdown()


@pytest.fixture(autouse=True)
def _keep_cluster(request):
    if "ray" in request.node.name:
        import ray

        if not ray.is_initialized():
            paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
            ray.init(
                num_cpus=4,
                include_dashboard=False,
                log_to_driver=False,
                runtime_env={"env_vars": {"PYTHONPATH": paths}},
            )


@NEEDS_RAY
def test_a_run_continues_after_a_ray_actor_is_killed(tmp_path) -> None:
    module = make_module("ray")
    before = copy.deepcopy(module.agent.state_dict())
    collector, experience = module.experience.collector, module.experience
    with pytest.warns(UserWarning, match="worker .*was lost .*; it is replaced"):
        fit(module, tmp_path, Killer(at=34))
    assert (experience.frames, experience.steps, experience.updates) == (240, 200, 100)
    assert collector.restarts == 1
    assert ages(tmp_path) == [0.0] * len(ages(tmp_path))
    assert len(ages(tmp_path)) >= 10
    assert any(not torch.equal(before[k], v) for k, v in module.agent.state_dict().items())
    check_windows(module)
    stored = experience.replay.storage.get(slice(None))
    closed = stored["next", "truncated"] & (stored["next", "observation"][..., 2:] < 7)
    assert closed.sum() == 2  # the episodes that were running, one in each environment
    assert stored["observation"][..., 0].unique().numel() > 2  # not the same episodes again


def test_a_run_ends_with_a_killed_process_and_can_be_resumed(tmp_path) -> None:
    module = make_module("multi")
    processes = list(module.experience.collector.procs)
    says = "failed after frame 120: .*worker 0 ended with exit code -9: check the memory"
    with pytest.raises(EnvironmentFailedError, match=says):
        fit(module, tmp_path, Killer(at=34))
    assert not any(process.is_alive() for process in processes if not process._closed)
    start = find_checkpoint(tmp_path / "checkpoints")
    assert start is not None
    module = make_module("multi")
    fit(module, tmp_path, start=start)
    experience = module.experience
    assert (experience.frames, experience.updates) == (240, 100)
    check_windows(module)


@pytest.mark.parametrize("kind", ["multi", RAY])
def test_overlap_makes_the_policy_stale(kind, tmp_path) -> None:
    module = make_module(kind, overlap=True)
    fit(module, tmp_path)
    experience = module.experience
    assert (experience.frames, experience.updates) == (240, 100)
    assert 0 < experience.policy_staleness < 100
    check_windows(module)
    _, stored, _ = experience.replay.read(0, 240)
    worker = stored["observation"][:, 0]  # a second batch may come before the other's first
    first = torch.cat([stored["action"][worker == seed][:20] for seed in worker.unique()])
    assert first.unique(dim=0).shape[0] == 40  # random, and differently in each worker


def test_weights_sent_less_often_are_older(tmp_path) -> None:
    module = make_module("multi", every=20)
    fit(module, tmp_path)
    # Ten updates follow a batch, so every other one is acted with weights ten updates old.
    assert list(module.experience._ages) == [0.0, 10.0] * 5
    assert module.experience.policy_staleness == 5.0


@pytest.mark.parametrize(
    ("kind", "how", "says"),
    [
        ("multi", "raises", "failed after frame 60: .*the joint came off"),
        ("multi", "nan", "non-finite value in .*observation.* after frame 60"),
        pytest.param("ray", "raises", "frame 60: .*the joint came off", marks=NEEDS_RAY),
    ],
)
def test_an_environment_that_fails_in_a_worker_ends_the_run(kind, how, says, tmp_path) -> None:
    module = make_module(kind, env=partial(failing_env, how, 35))
    with pytest.raises(EnvironmentFailedError, match=says):
        fit(module, tmp_path)
    assert len(module.experience.replay) == 60
    assert (tmp_path / "checkpoints").exists()


def test_a_process_that_hangs_ends_the_run() -> None:
    collector = make_collector(
        hanging_env, None, kind="multi", num_workers=2, frames_per_batch=20, timeout=5.0
    )
    with pytest.raises(WorkersLostError, match="the workers did not answer within 5 s"):
        next(iter(collector))
    begin = time.monotonic()
    collector.shutdown()
    assert time.monotonic() - begin < 5.0  # they have been killed before


def test_a_process_that_cannot_start_gives_the_reason() -> None:
    with pytest.raises(WorkersLostError, match="could not start: ValueError: no such joint$"):
        make_collector(broken_env, None, kind="multi", num_workers=2, frames_per_batch=20)


@NEEDS_RAY
def test_a_ray_actor_that_keeps_dying_ends_the_run() -> None:
    collector = make_collector(
        dying_env, None, kind="ray", num_workers=2, frames_per_batch=20, max_restarts=1
    )
    experience = ExperienceStream(
        collector, make_replay_buffer(100, batch_size=6, num_envs=2), total_steps=20
    )
    says = "loss 2 within an hour: check the memory"
    with (
        pytest.warns(UserWarning, match="was lost .*; it is replaced"),
        pytest.raises(EnvironmentFailedError, match=says),
    ):
        next(iter(experience))
    experience.shutdown()


@NEEDS_RAY
def test_a_ray_cluster_without_room_ends_the_run() -> None:
    options = {"kind": "ray", "num_workers": 2, "frames_per_batch": 20, "start_timeout": 5.0}
    with pytest.raises(WorkersLostError, match="within 5 s: .* has room for 2 workers with .*1000"):
        make_collector(CountingEnv, None, remote_configs={"num_cpus": 1000}, **options)


def test_a_path_too_long_for_sockets_is_refused(monkeypatch) -> None:
    folder = "/tmp/" + 90 * "x"
    monkeypatch.setattr("alm_torchrl.data.workers.get_temp_dir", lambda: folder)
    with pytest.raises(ValueError, match="longer than 85 bytes: set TMPDIR to a shorter one"):
        make_collector(CountingEnv, None, kind="multi", num_workers=2, frames_per_batch=20)


SCRIPT = """
import sys
from alm_torchrl.data import make_collector
from tests.training.test_workers import CountingEnv, hanging_env, slow_env

if __name__ == "__main__" or sys.argv[1] == "unguarded":
    env = {"interrupted": slow_env, "killed": hanging_env}.get(sys.argv[1], CountingEnv)
    collector = make_collector(env, None, kind="multi", num_workers=2, frames_per_batch=20)
    print("started", flush=True)
    next(iter(collector))
    raise ValueError("nobody ends the workers")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
@pytest.mark.parametrize("how", ["raises", "killed", "interrupted", "unguarded"])
def test_all_processes_end(how, tmp_path) -> None:
    """After an error, after SIGKILL while an environment hangs, and after Ctrl-C at the start."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # a socket's path has at most 107 characters
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "TMPDIR": str(temporary)}
    command = [sys.executable, str(script), how]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        try:
            if how in ("killed", "interrupted"):
                process.stdout.readline()
                time.sleep(1)  # so that all environments hang
                process.kill() if how == "killed" else os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=patience())
            wait_until(lambda: not group(process.pid))
        finally:
            for left in group(process.pid):
                os.kill(left, signal.SIGKILL)
    temporary.rmdir()  # which is empty
    last = errors.strip().splitlines()[-1]
    if how == "raises":
        assert "nobody ends the workers" in last
    if how == "unguarded":
        assert 'needs an `if __name__ == "__main__":` guard' in last
        assert errors.count("Traceback") == 1


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + patience()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def group(leader: int) -> list[int]:
    """Returns the running processes of a group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, number = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if state != "Z" and int(number) == leader:
                found.append(int(folder.name))
    return found

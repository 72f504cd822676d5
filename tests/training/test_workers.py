"""Training on experience of worker processes and Ray actors: counts, staleness, and what fails.

Ray's tests share one cluster on this machine, with room for two workers and their replacements.
"""

from __future__ import annotations

import copy
import csv
import os
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
from torchrl.envs import TransformedEnv

from alm_torchrl.agent import ALMAgent
from alm_torchrl.data import WorkersLostError, make_collector, make_replay_buffer
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import (
    ALMModule,
    EnvironmentFailedError,
    Experience,
    SentPolicy,
    StampedPolicy,
    make_trainer,
)
from tests.data.counting import CountingEnv
from tests.training.test_checkpoints import Failing

ROOT = Path(__file__).parents[2]
NO_RAY = find_spec("ray") is None
RAY = pytest.param("ray", marks=pytest.mark.skipif(NO_RAY, reason="Ray is not installed"))

pytestmark = pytest.mark.slow  # for the time that processes need to start


def failing_env(how: str, at: int) -> TransformedEnv:
    return TransformedEnv(CountingEnv(), Failing(how, at))


def dying_env() -> TransformedEnv:
    return TransformedEnv(CountingEnv(), Dying())


class Dying(Failing):
    """Ends its process at every fifth step, as a simulator with a fault in its memory does."""

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
    policy = StampedPolicy(agent.policy())
    collector = make_collector(
        env, copy.deepcopy(policy), kind=kind, num_workers=2, frames_per_batch=20,
        init_random_frames=40, overlap=overlap, seed=3, timeout=60, **options,
    )  # fmt: skip
    experience = Experience(
        collector,
        make_replay_buffer(400, batch_size=6, num_envs=1 if overlap else 2),
        total_steps=200,
        warmup_steps=40,
        updates_per_step=0.5,
        noise=agent.noise,
        policy=SentPolicy(policy, collector, every),
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

            ray.kill(collector.remote_collectors[0])


def fit(module: ALMModule, folder: Path, *callbacks: L.Callback) -> None:
    trainer = make_trainer(
        folder, seed=0, title="workers", eval_every=50, checkpoint_every=50,
        accelerator="cpu", tensorboard=False,
    )  # fmt: skip
    trainer.callbacks += callbacks
    trainer.progress_bar_callback.disable()
    try:
        trainer.fit(module)
    finally:
        module.experience.shutdown()


def ages(folder: Path) -> list[float]:
    rows = csv.DictReader((folder / "logs/csv/metrics.csv").read_text().splitlines())
    return [float(row["train/policy_age"]) for row in rows]


def check_windows(module: ALMModule) -> None:
    """The valid steps of a window follow one another in one episode of one environment."""
    replay = module.experience.replay
    windows = torch.cat([replay.sample(100) for _ in range(20)])
    joined, observation = windows["validity_mask"][:, 1:], windows["observation"]
    follows = observation[:, 1:] == observation[:, :-1] + torch.tensor([0.0, 0.0, 1.0])
    assert joined.any()
    assert follows.all(-1)[joined].all()


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Ray, if a test asks for it, on this machine alone."""
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


@pytest.mark.parametrize("kind", ["multi", RAY])
def test_a_run_goes_on_without_a_worker_that_was_killed(kind, tmp_path) -> None:
    module = make_module(kind)
    before = copy.deepcopy(module.agent.state_dict())
    collector, experience = module.experience.collector, module.experience
    processes = getattr(collector, "procs", [])
    with pytest.warns(UserWarning, match="worker .*was lost .*; it is replaced"):
        fit(module, tmp_path, Killer(at=34))
    assert (experience.frames, experience.steps, experience.updates) == (240, 200, 100)
    assert collector.losses == 1
    assert ages(tmp_path) == [0.0] * len(ages(tmp_path))
    assert len(ages(tmp_path)) >= 10
    assert any(not torch.equal(before[k], v) for k, v in module.agent.state_dict().items())
    check_windows(module)
    stored = experience.replay.storage.get(slice(None))
    closed = stored["next", "truncated"] & (stored["next", "observation"][..., 2:] < 7)
    assert closed.sum() == 2  # the episodes that were running, one in each lane
    assert stored["observation"][..., 0].unique().numel() > 2  # not the same episodes again
    assert not any(process.is_alive() for process in processes if not process._closed)


@pytest.mark.parametrize("kind", ["multi", RAY])
def test_overlap_is_seen_in_the_age_of_the_policy(kind, tmp_path) -> None:
    module = make_module(kind, overlap=True)
    fit(module, tmp_path)
    experience = module.experience
    assert (experience.frames, experience.updates) == (240, 100)
    assert 0 < experience.policy_age < 100
    check_windows(module)
    first = experience.replay.read(0, 40)["action"]
    assert first.unique(dim=0).shape[0] == 40  # random, and differently in each worker


def test_weights_sent_less_often_are_older(tmp_path) -> None:
    module = make_module("multi", every=20)
    fit(module, tmp_path)
    # Ten updates follow a batch, so every other one is acted with weights ten updates old.
    assert list(module.experience._ages) == [0.0, 10.0] * 5
    assert module.experience.policy_age == 5.0


@pytest.mark.parametrize("kind", ["multi", RAY])
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "failed after frame 60: .*the joint came off"),
        ("nan", "not finite was collected in .*observation.* after frame 60"),
    ],
)
def test_an_environment_that_fails_in_a_worker_is_not_replaced(kind, how, says, tmp_path) -> None:
    module = make_module(kind, env=partial(failing_env, how, 35))
    with pytest.raises(EnvironmentFailedError, match=says):
        fit(module, tmp_path)
    assert module.experience.collector.losses == 0
    assert len(module.experience.replay) == 60
    assert (tmp_path / "checkpoints").exists()


def test_a_worker_that_keeps_dying_ends_the_run() -> None:
    collector = make_collector(
        dying_env, None, kind="multi", num_workers=2, frames_per_batch=20, max_losses=1
    )
    experience = Experience(
        collector, make_replay_buffer(100, batch_size=6, num_envs=2), total_steps=20
    )
    says = "loss 2 within an hour: look for what ends the workers"
    with (
        pytest.warns(UserWarning, match="exit code 11"),
        pytest.raises(EnvironmentFailedError, match=says),
    ):
        next(iter(experience))
    experience.shutdown()


@pytest.mark.skipif(NO_RAY, reason="Ray is not installed")
def test_a_ray_cluster_without_room_is_not_waited_for_without_end() -> None:
    options = {"kind": "ray", "num_workers": 2, "frames_per_batch": 20, "timeout": 5.0}
    with pytest.raises(WorkersLostError, match="within 5 s: each of 2 asks for .*1000.* no room"):
        make_collector(CountingEnv, None, remote_configs={"num_cpus": 1000}, **options)


SCRIPT = """
import sys, time
from alm_torchrl.data import make_collector
from tests.data.counting import CountingEnv

if __name__ == "__main__":
    collector = make_collector(CountingEnv, None, kind="multi", num_workers=2, frames_per_batch=20)
    next(iter(collector))
    print(*(process.pid for process in collector.procs), flush=True)
    if sys.argv[1] == "raise":
        raise ValueError("nobody ends the workers")
    time.sleep(100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
@pytest.mark.parametrize("end", ["raise", "kill"])
def test_no_process_is_left_behind(end, tmp_path) -> None:
    """Neither by an exception that nobody expected, nor by SIGKILL."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, str(script), end]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        if end == "kill":
            process.kill()
        process.wait(timeout=60)
    deadline = time.monotonic() + 30
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(workers) == 2
    assert not any(map(_runs, workers))


def _runs(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"

"""The recipes as a user runs them: presets, a short run, one clear line for a mistake, Ctrl-C."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TASKS = sorted(path.stem for path in (RECIPES / "conf/task").glob("*.yaml"))
SHORT = [
    *("training.warmup_steps=20", "training.total_steps=6", "evaluation.every=3"),
    *("evaluation.episodes=1", "training.batch_size=8", "agent.hidden_dim=8"),
    *("agent.dynamics_hidden_dim=8", "run.accelerator=cpu"),
]


def run(script: str, *arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(RECIPES / script), *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def config():
    import recipes.conf.schema  # noqa: F401 - registers the schema with Hydra

    def make(*overrides: str):
        with initialize_config_dir(str(RECIPES / "conf"), version_base="1.3"):
            overrides = (*overrides, "run.folder=unused")
            return OmegaConf.to_object(compose("mujoco", overrides=list(overrides)))

    return make


def test_the_paper_preset_holds_the_published_hyperparameters(config) -> None:
    paper = config("preset=paper")
    assert vars(paper.agent) == {
        "latent_dim": 50,
        "hidden_dim": 512,
        "dynamics_hidden_dim": 1024,
        "scale_to_range": False,
        "noise_clip": 0.3,
        "noise_start": 1.0,
        "noise_end": 0.1,
        "noise_steps": 100_000,
    }
    assert set(vars(paper.learning_rates).values()) == {1e-4}
    objective, training = paper.objective, paper.training
    assert (objective.horizon, objective.gamma, objective.lmbda) == (3, 0.99, 0.95)
    assert objective.consistency_coeff == 0.1
    assert (training.batch_size, training.warmup_steps, training.updates_per_step) == (512, 5000, 1)
    assert (training.target_tau, training.max_grad_norm) == (0.005, 100.0)
    assert (paper.evaluation.every, paper.evaluation.episodes) == (5000, 5)


@pytest.mark.parametrize("preset", ["paper", "quickstart"])
@pytest.mark.parametrize("task", TASKS)
def test_every_preset_and_task_is_complete_and_its_task_exists(config, preset, task) -> None:
    from alm_torchrl.envs import make_env

    options = config(f"preset={preset}", f"task={task}")
    capacity = 1_000_000 if "humanoid" in task else 100_000
    assert options.task.replay_capacity == capacity
    assert options.training.total_steps % options.evaluation.every == 0
    sizes = {"ant_truncated": 27, "ant": 105, "humanoid_truncated": 45, "humanoid": 348}
    env = make_env(options.task.id, **options.task.kwargs)
    size = env.observation_spec["observation"].shape[0]
    assert size == sizes.get(task, size)
    assert size < 60 or task in ("ant", "humanoid")


def mistake(folder: Path, monkeypatch, *arguments: str) -> str:
    """Runs the recipe in this process, and returns what it ends with."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["mujoco.py", *arguments])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RECIPES / "mujoco.py"), run_name="__main__")
    return str(stop.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("run")
    result = run("mujoco.py", *SHORT, "run.folder=out", cwd=folder)
    return folder, result


def test_a_short_run_ends_well_and_names_its_folder(finished) -> None:
    folder, result = finished
    assert result.returncode == 0, result.stderr
    first, *_, last = result.stdout.strip().splitlines()
    assert first.startswith("HalfCheetah-v5: 20 random steps")
    assert last.startswith("return ")
    assert last.endswith("out")
    assert {path.name for path in folder.iterdir()} == {"out"}  # nothing beside the folder
    names = {path.name for path in (folder / "out").iterdir()}
    assert names >= {
        "config.yaml",
        "curve.csv",
        "curve.png",
        "agent_best.pt",
        "checkpoints",
        "logs",
    }


def test_a_run_shows_its_bar_and_nothing_else(finished) -> None:
    lines = finished[1].stderr.replace("\r", "\n").splitlines()
    assert all("|" in line and "[" in line for line in lines if line.strip()), lines


def test_a_sweep_trains_every_seed_and_goes_on_where_it_was(tmp_path: Path) -> None:
    first = run("mujoco.py", "-m", "seed=0,1", *SHORT, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("return ") == 2
    more = run("mujoco.py", "-m", "seed=0,1,2", "resume=auto", *SHORT, cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert more.stdout.count("nothing was left to do") == 2
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert [name[: len("halfcheetah-quickstart-seed0")] for name in folders] == [
        f"halfcheetah-quickstart-seed{seed}" for seed in range(3)
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sed=3"], "Could not override 'sed'"),
        (["training.batchsize=3"], "Could not override 'training.batchsize'"),
        (["task=cheetah"], "Could not find 'task/cheetah'"),
        (["preset=papr"], "Could not find 'preset/papr'"),
        (["seed=one"], "could not be converted to Integer"),
        (["task.id=HalfCheta-v5"], "did you mean HalfCheetah-v5"),
        (["+task.kwargs.frames=3"], "does not take the argument 'frames'"),
        (["evaluation.every=7000"], "no multiple of evaluation.every"),
        (["objective.short_windows=skip"], "none of mask, drop"),
        (["run.compile=true"], "none of auto, always, never"),
        (["run.folder=file/out"], "NotADirectoryError"),
        (["run.accelerator=abacus"], "abacus"),
        (["checkpoint.keep=0"], "keep no checkpoint"),
        (["training.collector=threads"], "choose sync, multi or ray"),
        (["training.num_workers=2"], "need workers: training.collector=multi or ray"),
        (["training.overlap=true"], "need workers: training.collector=multi or ray"),
        (["training.collector=multi", "num_seeds=2"], "multi trains one seed"),
        (["training.collector=ray", "training.policy_lag=1"], "ray trains one seed, at training.p"),
        (["training.collector=multi", "training.num_workers=2"], "cannot be divided between"),
        (["training.collector=multi", "training.overlap=true"], "or less than 3"),
        (["training.num_envs=2", "training.frames_per_batch=3"], "no multiple of the 2 env"),
        (["training.frames_per_batch=7"], "no multiple of training.frames_per_batch=7"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_costs_one_line(
    tmp_path: Path, monkeypatch, capfd, arguments: list[str], says: str
) -> None:
    (tmp_path / "file").touch()
    message = mistake(tmp_path, monkeypatch, "run.folder=out", *arguments)
    assert says in message
    assert "\n" not in message
    assert capfd.readouterr().err == ""  # and no more than this line
    assert not list(tmp_path.glob("out/*.pt"))


@pytest.mark.parametrize("package", ["hydra", "lightning", "matplotlib", "mujoco", "gymnasium"])
def test_a_missing_extra_is_named_with_its_remedy(monkeypatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["mujoco.py"])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RECIPES / "mujoco.py"), run_name="__main__")
    assert stop.value.code == f"{package} not installed: pip install 'alm-torchrl[recipes]'"


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_cleanly_and_the_run_goes_on(tmp_path: Path, monkeypatch) -> None:
    long = [*SHORT[:1], "training.total_steps=100000", "evaluation.every=100000", *SHORT[3:]]
    with subprocess.Popen(
        [sys.executable, str(RECIPES / "mujoco.py"), *long, "run.folder=out", "run.log_every=1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        metrics = tmp_path / "out/logs/csv/metrics.csv"
        deadline = time.monotonic() + 120
        while not metrics.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "interrupted after" in errors.strip().splitlines()[-1]
    for name in ("agent_last.pt", "curve.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0, name
    again = mistake(tmp_path, monkeypatch, *long, "run.folder=out")
    assert "there is a run in out already: go on with it by resume=auto" in again
    again = mistake(tmp_path, monkeypatch, *long, "run.folder=out", "resume=auto", "seed=7")
    assert again.endswith("out was trained with seed=0 and cannot go on with 7")
    again = mistake(tmp_path, monkeypatch, *long, "resume=nowhere")
    assert again.endswith("resume=nowhere: there is no whole checkpoint in that folder")
    done = int(re.search(r"interrupted after (\d+) steps; resume=out goes on", errors)[1])
    steps = (f"training.total_steps={done + 3}", f"evaluation.every={done + 3}")
    result = run("mujoco.py", *SHORT[:1], *steps, *SHORT[3:], "resume=out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"HalfCheetah-v5: on from step {done}, then learning; out")
    curve = (tmp_path / "out/curve.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in curve] == ["step", str(done + 3)]


def test_the_plain_loop_trains_and_saves(tmp_path: Path) -> None:
    result = run(
        "custom_loop.py",
        *("--warmup", "30", "--steps", "2", "--eval-every", "2", "--device", "cpu"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "step 2: return " in result.stdout
    assert (tmp_path / "agent.pt").stat().st_size > 0


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.name)
def test_recipes_stay_thin(path: Path) -> None:
    limit = 100 if path.name == "custom_loop.py" else 150
    assert len(path.read_text().splitlines()) <= limit

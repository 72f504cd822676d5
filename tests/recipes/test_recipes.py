"""The recipes as a user runs them: presets, a short run, one clear line for a mistake, Ctrl-C."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from alm_torchrl.files import sha256
from alm_torchrl.training import find_checkpoint
from recipes.script import prepare_script
from tests.patience import patience

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
        timeout=patience(100),
        check=False,
    )


def test_the_paper_preset_holds_the_published_hyperparameters(config) -> None:
    paper = config("preset=paper")
    published = {
        "latent_dim": 50,
        "hidden_dim": 512,
        "dynamics_hidden_dim": 1024,
        "scale_to_range": False,
        "noise_clip": 0.3,
        "noise_start": 1.0,
        "noise_end": 0.1,
        "noise_steps": 100_000,
        "normalize_mean": False,
        "continuation": False,
        "network_kwargs": {},
        "networks": {},
    }
    assert vars(paper.agent).items() >= published.items()
    rates = vars(paper.learning_rates).values()  # null: the rate of the world model
    assert {rate for rate in rates if rate is not None} == {1e-4}
    assert paper.training.optimizer == {"_target_": "torch.optim.Adam"}
    assert paper.training.schedule == {}
    objective, training = paper.objective, paper.training
    assert (objective.horizon, objective.gamma, objective.lmbda) == (3, 0.99, 0.95)
    assert objective.consistency_coeff == 0.1
    assert (training.batch_size, training.warmup_steps, training.updates_per_step) == (512, 5000, 1)
    assert training.imagined_steps == 0
    assert (training.target_tau, training.max_grad_norm) == (0.005, 100.0)
    assert (paper.evaluation.every, paper.evaluation.episodes) == (5000, 5)


@pytest.mark.parametrize("preset", ["paper", "quickstart", "fast"])
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


@pytest.mark.parametrize("preset", ["paper", "quickstart", "fast", "pixels"])
def test_a_run_gets_what_its_preset_says(config, preset) -> None:
    """Nothing that is read after the presets has another value for an option of theirs."""
    said = OmegaConf.to_container(OmegaConf.load(RECIPES / f"conf/preset/{preset}.yaml"))
    said.pop("defaults", None)
    composed = config(f"preset={preset}")
    for group, options in said.items():
        for name, value in options.items():
            if "${" not in str(value):
                assert getattr(getattr(composed, group), name) == value, f"{group}.{name}"


ABLATIONS = {
    "no_consistency_reward": {"consistency_coeff": 0.0},
    "no_reward_term": {"reward_term": False},
    "no_value_term": {"value_term": False},
    "consistency_only": {"reward_term": False, "value_term": False},
    "horizon_1": {"horizon": 1},
    "horizon_2": {"horizon": 2},
    "horizon_5": {"horizon": 5},
    "horizon_10": {"horizon": 10},
    "value_at_horizon": {"lmbda": 1.0},
    "bound": {"actor_objective": "bound"},
    "classifier_consistency": {"consistency": "classifier"},
    "forward_kl": {"consistency": "forward_kl"},
    "squared_distance": {"consistency": "squared_distance"},
    "stop_gradient_target": {"latent_target": "stop_gradient"},
    "online_target": {"latent_target": "online"},
    "teacher_forcing": {"teacher_forcing": True},
    "no_model": {"actor_objective": "value"},
    "self_prediction": {"actor_objective": "value", "reward_term": False, "value_term": False},
    "learned_weight": {"consistency_level": 1.0},
}


def test_every_ablation_is_listed() -> None:
    found = {path.stem for path in (RECIPES / "conf/ablation").glob("*.yaml")}
    assert found == {"none", *ABLATIONS}


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.filterwarnings("ignore:episodes were cut after 5 steps")
def test_an_ablation_changes_its_switch_alone_and_trains(config, name: str, tmp_path: Path) -> None:
    from alm_torchrl.training import make_trainer
    from recipes.build import make_module

    plain, options = config(), config(f"ablation={name}", *SHORT, "evaluation.max_steps=5")
    assert vars(options.objective) == {**vars(plain.objective), **ABLATIONS[name]}
    torch.manual_seed(0)
    module = make_module(options, torch.device("cpu"))
    before = {key: value.clone() for key, value in module.loss.named_parameters()}
    trainer = make_trainer(
        tmp_path, seed=0, title=name, eval_every=6, accelerator="cpu", tensorboard=False
    )
    trainer.fit(module)
    assert trainer.global_step == 6
    assert trainer.callback_metrics["return"].isfinite()
    for key, value in module.loss.named_parameters():
        assert value.isfinite().all()
        assert not torch.equal(value, before[key]), key
    rows = list(csv.DictReader((tmp_path / "logs/csv/metrics.csv").open()))
    assert ("train/multiplier" in rows[0]) == (name == "learned_weight")


def mistake(
    folder: Path, monkeypatch, *arguments: str, script: Path = RECIPES / "mujoco.py"
) -> str:
    """Runs the recipe in this process, and returns what it ends with."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["mujoco.py", *arguments])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    return str(stop.value)


def test_the_recipe_runs_through_a_symbolic_link(tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "train.py").symlink_to(RECIPES / "mujoco.py")
    message = mistake(tmp_path, monkeypatch, "sed=3", script=tmp_path / "train.py")
    assert message == "sed is not an option: did you mean seed?"


@pytest.mark.parametrize(
    ("script", "steps"), [("mujoco.py", 6000), ("pixels.py", 50000)], ids=["mujoco", "pixels"]
)
def test_a_recipe_needs_no_arguments(tmp_path: Path, monkeypatch, script: str, steps: int) -> None:
    def train(config) -> None:
        sys.exit(f"{config.task.id} {config.training.total_steps}")

    monkeypatch.setattr("recipes.train.train", train)
    message = mistake(tmp_path, monkeypatch, script=RECIPES / script)
    assert message == f"HalfCheetah-v5 {steps}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("run")
    measured = ("evaluation.bias=true", "evaluation.diagnostics=true")
    result = run("mujoco.py", *SHORT, *measured, "run.folder=out", cwd=folder)
    return folder, result


def test_a_short_run_ends_well_and_names_its_folder(finished) -> None:
    folder, result = finished
    assert result.returncode == 0, result.stderr
    first, second, *_, last = result.stdout.strip().splitlines()
    assert first == "HalfCheetah-v5: loading PyTorch"
    assert second.startswith("HalfCheetah-v5: 20 random steps")
    assert last.startswith("return ")
    assert last.endswith("out")
    assert {path.name for path in folder.iterdir()} == {"out"}  # nothing beside the folder
    names = {path.name for path in (folder / "out").iterdir()}
    assert names >= {
        "config.yaml",
        "curve.csv",
        "curve.png",
        "bias.csv",
        "bias.png",
        "diagnostics.csv",
        "diagnostics.png",
        "agent_best.pt",
        "checkpoints",
        "logs",
    }


def test_a_run_writes_a_line_for_each_evaluation_and_nothing_else(finished) -> None:
    lines = finished[1].stderr.splitlines()
    assert [line.partition(": return ")[0] for line in lines] == ["step 3/6", "step 6/6"], lines


def test_a_sweep_trains_every_seed_and_goes_on_where_it_was(tmp_path: Path) -> None:
    first = run("mujoco.py", "-m", "seed=0,1", *SHORT, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("return ") == 2
    more = run("mujoco.py", "-m", "seed=0,1,2", "resume=auto", *SHORT, cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert more.stdout.count("already finished") == 2
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert len({name.split("-seed")[0] for name in folders}) == 1  # experiments/plot.py's one curve
    assert [re.search(r"-seed(\d)-", name)[1] for name in folders] == ["0", "1", "2"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sed=3"], "sed is not an option: did you mean seed?"),
        (["training.batchsize=3"], "did you mean training.batch_size?"),
        (["total_steps=3"], "did you mean training.total_steps?"),
        (["+colour=red"], "colour is not an option: --help lists the options"),
        (["--seed", "3"], "--seed is not an option: write seed=3"),
        (["--batch-size=3"], "--batch-size is not an option: write training.batch_size=3"),
        (["--resume", "-m"], "--resume is not an option: write resume=..."),
        (["task=cheetah"], "Could not find 'task/cheetah'"),
        (["preset=papr"], "Could not find 'preset/papr'"),
        (["seed=one"], "could not be converted to Integer"),
        (["task.id=HalfCheta-v5"], "did you mean HalfCheetah-v5"),
        (["+task.kwargs.frames=3"], "does not take the argument 'frames'"),
        (["evaluation.every=7000"], "must be a multiple of evaluation.every"),
        (["training.total_steps=1e1.5"], "could not be converted to Integer"),
        (["training.batch_size=2.5"], "could not be converted to Integer"),
        (["task.pixels=[84]"], "task.pixels=[84] must be false, a size"),
        (["checkpoint.every=1", "training.updates_per_step=0.5"], "checkpoint.every=1 times"),
        (
            ["training.warmup_updates=9", "training.warmup_steps=0"],
            "training.warmup_updates=9 needs training.warmup_steps above 0",
        ),
        (["run.folder=file/out"], "NotADirectoryError"),
        (["run.accelerator=abacus"], "abacus"),
        (["+agent.networks={actor: {hidden_dim: 8}}"], "agent.networks.actor has no _target_"),
        (["+agent.networks={encoder: {_target_: a.b}}"], "set encoder.build instead"),
        (
            ["+agent.network_kwargs={policy: {depth: 3}}"],
            "network_kwargs has unknown networks: 'policy'",
        ),
        (["~training.optimizer._target_"], "training.optimizer has no _target_"),
        (["+training.schedule.gamma=0.9"], "training.schedule has no _target_"),
        (["+objective.auxiliary_losses.rec.size=3"], "auxiliary_losses.rec has no _target_"),
        (["evaluation.measurements=[a.b]"], "evaluation.measurements.0 has no _target_"),
        (["training.optimizer._target_=nothing.X"], "Error loading 'nothing.X'"),
        (["run.devices=3"], "training.batch_size=256 must be a multiple of the 3 processes"),
        (
            ["run.devices=2", "training.warmup_steps=1001"],
            "training.warmup_steps=1001 must be a multiple of 2",
        ),
        (["run.devices=2", "num_seeds=2"], "start one run for each seed"),
        (
            ["run.devices=2", "training.collector=ray"],
            "training.collector must be sync with 2 processes",
        ),
        (["training.num_workers=2"], "training.num_workers above 1 needs training.collector=multi"),
        (["training.overlap=true"], "training.overlap=true needs training.collector=multi or ray"),
        (["training.collector=multi", "num_seeds=2"], "multi needs num_seeds=1"),
        (["training.collector=ray", "training.policy_lag=1"], "training.policy_lag=0, not 1 and 1"),
        (
            ["training.collector=multi", "training.num_workers=2"],
            "must be a multiple of training.num_workers=2",
        ),
        (["training.collector=multi", "training.overlap=true"], "must be at least 3"),
        (
            ["training.num_envs=2", "training.frames_per_batch=3"],
            "must be a multiple of 2, the number",
        ),
        (["training.frames_per_batch=7"], "training.warmup_steps=2000 must be a multiple of 7"),
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
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "SLURM_PROCID"])
def test_processes_that_start_by_themselves_need_one_folder(
    tmp_path: Path, monkeypatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "0")
    assert "give all of them the same run.folder" in mistake(tmp_path, monkeypatch, "run.devices=2")


@pytest.mark.slow
def test_a_run_in_two_processes_is_one_run(tmp_path: Path) -> None:
    result = run("mujoco.py", *SHORT, "run.devices=2", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    first, second, *_, last = result.stdout.strip().splitlines()
    assert first == "HalfCheetah-v5: loading PyTorch"
    assert second.startswith("HalfCheetah-v5: 20 random steps")
    assert last.startswith("return ")
    assert result.stdout.count("return ") == 1
    (folder,) = (tmp_path / "runs").iterdir()  # one, though its name holds the time of the start
    assert (folder / "curve.csv").read_text().count("\n") == 3
    sweep = run("mujoco.py", "-m", "seed=0,1", *SHORT, "run.devices=2", cwd=tmp_path)
    assert "a sweep (-m) is not supported" in sweep.stderr


@pytest.mark.parametrize("package", ["hydra", "lightning", "matplotlib", "mujoco", "gymnasium"])
def test_a_missing_extra_is_named_with_its_remedy(monkeypatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["mujoco.py"])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RECIPES / "mujoco.py"), run_name="__main__")
    assert stop.value.code == f"{package} not installed: pip install 'alm-torchrl[recipes]'"


@pytest.mark.skipif(sys.platform != "linux", reason="EGL is the renderer on Linux")
@pytest.mark.parametrize("library", ["libEGL.so.1", None])
def test_mujoco_renders_without_a_screen_if_it_can(monkeypatch, library: str | None) -> None:
    """MuJoCo cannot be imported with the renderer egl if the library is missing."""

    def load(name: str) -> None:
        if name != library:
            raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("recipes.script.ctypes.CDLL", load)
    for name in ("DISPLAY", "MUJOCO_GL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    prepare_script()
    assert os.environ.get("MUJOCO_GL") == (library and "egl")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_cleanly_and_the_run_goes_on(tmp_path: Path, monkeypatch) -> None:
    long = [*SHORT[:1], "training.total_steps=100000", "evaluation.every=100000", *SHORT[3:]]
    long.append("run.compile=never")  # the update in progress is waited for, and compiling is one
    with subprocess.Popen(
        [sys.executable, str(RECIPES / "mujoco.py"), *long, "run.folder=out", "run.log_every=1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        metrics = tmp_path / "out/logs/csv/metrics.csv"
        deadline = time.monotonic() + patience(40)
        while not metrics.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=patience())
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "interrupted after" in errors.strip().splitlines()[-1]
    for name in ("agent_last.pt", "curve.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0, name
    again = mistake(tmp_path, monkeypatch, *long, "run.folder=out")
    assert "out already contains a run: continue it with resume=auto" in again
    again = mistake(tmp_path, monkeypatch, *long, "run.folder=out", "resume=auto", "seed=7")
    assert again.endswith("out was trained with seed=0 and cannot continue with 7")
    again = mistake(tmp_path, monkeypatch, *long, "resume=nowhere")
    assert again.endswith("resume=nowhere: no complete checkpoint in that folder")
    done = int(re.search(r"interrupted after (\d+) steps; continue with resume=out", errors)[1])
    steps = (f"training.total_steps={done + 3}", f"evaluation.every={done + 3}")
    result = run("mujoco.py", *steps, "resume=out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"HalfCheetah-v5: resuming at step {done}, then training; out" in result.stdout
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


@pytest.mark.slow
def test_images_are_learned_from_where_they_can_be_rendered(tmp_path: Path) -> None:
    task = ["task.id=InvertedPendulum-v5", "task.name=pendulum", "task.pixels=32"]
    result = run("pixels.py", *task, *SHORT, "run.folder=out", cwd=tmp_path)
    if "cannot render" in result.stderr:
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/curve.csv").read_text().count("\n") == 3


ENCODERS = sorted(path.stem for path in (RECIPES / "conf/encoder").glob("*.yaml"))
PIXELS = ("pixels", "pixels_and_vector")


@pytest.mark.parametrize("encoder", [name for name in ENCODERS if name not in PIXELS])
def test_every_encoder_is_an_option_of_the_state_tasks(config, encoder: str) -> None:
    import torch

    from recipes.build import env_factory
    from recipes.build_agent import make_agent

    sizes = ("agent.latent_dim=8", "agent.hidden_dim=8", "agent.dynamics_hidden_dim=8")
    options = config(f"encoder={encoder}", *sizes)
    env = env_factory(options)(seed=0)
    agent, loss = make_agent(options, env, torch.device("cpu"), seed=0)
    rollout = env.rollout(4, agent.policy()).unsqueeze(0)
    assert loss(rollout)["loss_world_model"].isfinite()


@pytest.mark.slow
def test_the_recipe_trains_with_an_encoder_that_remembers_and_one_of_ones_own(
    tmp_path: Path,
) -> None:
    own = "encoder.build._target_=recipes.custom_encoder.make_encoder"
    for name, options in {"a": ("encoder=recurrent",), "b": (own,)}.items():
        result = run("mujoco.py", *SHORT, f"run.folder={name}", *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / name / "agent_best.pt").stat().st_size > 0


def test_the_example_of_an_encoder_trains_and_saves(tmp_path: Path) -> None:
    options = ("--warmup", "30", "--steps", "2", "--eval-every", "2")
    result = run("custom_encoder.py", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "step 2: return " in result.stdout
    assert (tmp_path / "agent.pt").stat().st_size > 0


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ({"state_dict": {}}, "does not fit this run; nothing was changed: RuntimeError"),
        ({"callbacks": 3}, "does not fit this run; nothing was changed: "),
        ({"extra": torch.zeros(1).expand(10**12)}, "a tensor claims 4,000,000,000,000 bytes"),
    ],
)
def test_a_foreign_state_costs_one_line_and_nothing_of_the_run(
    finished, tmp_path: Path, monkeypatch, harm: dict, says: str
) -> None:
    shutil.copytree(finished[0] / "out", tmp_path / "out")
    folder = find_checkpoint(tmp_path / "out/checkpoints").folder
    state = torch.load(folder / "state.ckpt", weights_only=True) | harm
    torch.save(state, folder / "state.ckpt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state_sha256"] = sha256(folder / "state.ckpt")
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))
    kept = {
        path: path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and path.name not in ("config.yaml", "metrics.csv")
    }
    said = mistake(tmp_path, monkeypatch, *SHORT, "resume=out", "training.total_steps=9")
    assert says in said
    assert "\n" not in said
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_a_run_that_kept_nothing_does_not_say_that_it_goes_on(tmp_path: Path) -> None:
    from recipes.train import _kept

    assert _kept(tmp_path) == "no checkpoint was saved yet"
    (tmp_path / "checkpoints/update-0000000005").mkdir(parents=True)
    assert _kept(tmp_path) == f"continue with resume={tmp_path}"

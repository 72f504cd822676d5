"""Trained agents are found, played, recorded, exported and made into pretrained folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from alm_torchrl import ALMAgent, make_env
from alm_torchrl.modules import LatentModule
from recipes import enjoy, export, trained
from recipes.run_config import write_config
from tests.patience import patience

pytest.importorskip("safetensors")

PRETRAINED = trained.PRETRAINED
SHIPPED = sorted(file.parent.name for file in PRETRAINED.glob("*/config.json"))
ROOT = Path(__file__).resolve().parents[2]
TASK = "InvertedPendulum-v5"  # whose episodes are short without training
SIZES = {"latent_dim": 4, "hidden_dim": 8, "dynamics_hidden_dim": 8}
CURVE = "step,seed,return,return_std,frames,seconds\n0,3,5,1,20,1\n3,3,9,1,23,2\n6,3,9,1,26,3\n"


def make_agent(**options: object) -> ALMAgent:
    torch.manual_seed(0)
    return ALMAgent.from_env(make_env(TASK), **SIZES, **options)


@pytest.fixture(scope="module")
def agent() -> ALMAgent:
    return make_agent()


@pytest.fixture
def file(agent: ALMAgent, tmp_path: Path) -> Path:
    agent.save(tmp_path / "agent.pt")
    return tmp_path / "agent.pt"


@pytest.fixture
def run(agent: ALMAgent, config: Callable, tmp_path: Path) -> Path:
    """The folder of a run, without the training."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder, config(f"task.id={TASK}", "task.action_repeat=2", "agent.hidden_dim=8"))
    (folder / "curve.csv").write_text(CURVE)
    agent.save(folder / "agent_best.pt")
    return folder


@pytest.fixture
def pretrained(agent: ALMAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(trained, "PRETRAINED", tmp_path / "pretrained")
    evaluation = {"mean": 12.5, "std": 1.0, "episodes": 100, "seed": 7}
    folder = tmp_path / "pretrained/pendulum"
    agent.save_pretrained(folder, environment={"task": TASK}, evaluation=evaluation)
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a script in this process as from a command line."""

    def run_script(script: Callable[[], None], *arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        trained.main(script)

    return run_script


def fails(command: Callable, script: Callable, *arguments: str | Path) -> str:
    """Returns the line with which a script ends."""
    with pytest.raises(SystemExit) as ended:
        command(script, *arguments)
    message = str(ended.value.code)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------- finding


def test_an_agent_is_found_by_folder_file_and_name(run: Path, file: Path, pretrained: Path) -> None:
    assert trained.find(str(run)).environment["action_repeat"] == 2
    assert trained.find(str(run / "agent_best.pt")).environment["task"] == TASK
    assert trained.find(str(file), TASK).environment == {"task": TASK}
    found = trained.find("pendulum")
    assert (found.path, found.environment) == (pretrained, {"task": TASK})
    assert trained.find(str(pretrained)).evaluation["episodes"] == 100


def test_one_of_several_seeds_has_the_options_of_the_run(run: Path) -> None:
    (run / "seed3").mkdir()
    (run / "agent_best.pt").rename(run / "seed3/agent_last.pt")
    found = trained.find(str(run / "seed3"))
    assert found.path == run / "seed3/agent_last.pt"
    assert found.environment["action_repeat"] == 2
    with pytest.raises(FileNotFoundError, match="has several seeds: choose one of .*run/seed3"):
        trained.find(str(run))


def my_encoder(spec: object, *, latent_dim: int, hidden_dim: int) -> LatentModule:
    return LatentModule(nn.Linear(4, 2 * latent_dim), in_keys=["observation"])


def test_networks_of_ones_own_are_rebuilt_from_the_run(
    config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nfrom alm_torchrl.modules import LatentModule\n"
        "def build(spec, *, latent_dim, hidden_dim):\n"
        "    return LatentModule(nn.Linear(4, 2 * latent_dim), in_keys=['observation'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    encoder = "encoder.build={_target_: mine.build}"
    write_config(tmp_path, config(f"task.id={TASK}", "agent.latent_dim=4", encoder))
    own = make_agent(encoder=my_encoder(None, latent_dim=4, hidden_dim=8))
    own.save(tmp_path / "agent_best.pt")
    loaded = trained.find(str(tmp_path)).agent
    assert torch.equal(loaded.encoder[0].module.weight, own.encoder[0].module.weight)


def test_a_mistake_is_one_line_with_its_remedy(
    command: Callable, run: Path, file: Path, pretrained: Path
) -> None:
    def line(*arguments: str | Path) -> str:
        return fails(command, enjoy.play, *arguments)

    assert "nothing is neither a file nor a folder, and pretrained/ has pendulum" in line("nothing")
    assert "the task of" in (message := line(file))
    assert "is not known: give it, such as --task Hopper-v5" in message
    assert "does not fit HalfCheetah-v5: " in line(file, "--task", "HalfCheetah-v5")
    assert "did you mean Hopper" in line(file, "--task", "Hoper-v5")
    (run / "config.yaml").write_text("task: [1, 2]")
    assert "is not the config.yaml of a run" in line(run)
    (run / "config.yaml").write_text("a: {")
    assert "is not the config.yaml of a run" in line(run)
    (run / "agent_best.pt").unlink()
    assert "has no agent_best.pt, agent_last.pt or config.json" in line(run)
    shutil.rmtree(pretrained)
    assert "pretrained/ has no agents yet" in line("nothing")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_agent_plays_as_its_card_says(name: str) -> None:
    """Over new episodes, on the scale of the deviation over the episodes of the card."""
    found = trained.find(str(PRETRAINED / name))
    card = found.evaluation
    assert (card["episodes"], found.path) == (100, PRETRAINED / name)
    played = enjoy.evaluate(found, found.agent.policy(), 5, seed=7)
    assert abs(played["mean"] - card["mean"]) < card["std"]


def test_a_class_that_a_run_names_and_that_is_missing_is_reported(
    command: Callable, run: Path, config: Callable
) -> None:
    write_config(run, config(f"task.id={TASK}", "encoder.build={_target_: my_missing.build}"))
    assert "my_missing" in fails(command, enjoy.play, run)


def test_a_pretrained_folder_imports_no_module(pretrained: Path, command: Callable) -> None:
    config = json.loads((pretrained / "config.json").read_text())
    config["environment"] = {"task": "os:system", "command": "touch touched"}
    (pretrained / "config.json").write_text(json.dumps(config))
    message = fails(command, enjoy.play, pretrained)
    assert "asks to import os:system: if you trust it, give it as --task" in message


# ------------------------------------------------------------------------------------- playing


def test_returns_are_printed_with_those_of_the_card(
    command: Callable, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for seed in (1, 1, 2):
        command(enjoy.play, "pendulum", "--episodes", "3", "--seed", str(seed))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert " over 3 episodes; " in printed[0]
    assert "model card: return 12.5 +- 1.0 over 100 episodes" in printed[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--episodes", "0"], "--episodes must be positive"),
        (["--seconds", "-1"], "--seconds must be positive"),
        (["--video", "a.avi"], "--video must end in .gif or .mp4, not 'a.avi'"),
        (["--video", "a.mp4"], "pip install imageio-ffmpeg, or choose a .gif"),
        (["--latent", "mode"], "invalid choice: 'mode'"),
    ],
)
def test_an_option_is_checked_before_anything_is_loaded(
    command: Callable,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(enjoy, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command(enjoy.play, "nothing", *arguments)
    assert says in capsys.readouterr().err


class Painted:
    """Stands for a renderer: each frame has another color."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: object, **__: object) -> np.ndarray:
        self.calls += 1
        return np.full((48, 64, 3), self.calls % 256, dtype=np.uint8)


@pytest.mark.parametrize(("most", "duration", "frames"), [(25, 80, (2, 3)), (5, 160, (1, 2))])
def test_a_video_has_the_speed_and_length_of_the_task(
    command: Callable,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    duration: int,
    frames: tuple[int, int],
) -> None:
    from PIL import Image

    from alm_torchrl.envs import make
    from alm_torchrl.envs.transforms import RenderFrames

    monkeypatch.setattr(enjoy, "FRAMES_PER_SECOND", most)
    painted = Painted()
    monkeypatch.setattr(
        make, "_render_frames", lambda *_: RenderFrames(painted, channels_first=False)
    )
    video = tmp_path / "new/out.gif"
    command(enjoy.play, run, "--episodes", "1", "--video", video, "--seconds", "0.2", "--width", 32)
    with Image.open(video) as image:
        assert image.size == (32, 24)
        assert image.n_frames in frames
        # 25 steps per second, each of two steps of the simulator, and at most `most` frames
        assert image.info["duration"] == duration


def test_without_a_renderer_there_is_one_line_and_no_video(
    command: Callable,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from alm_torchrl.envs import make

    def no_driver(*_: object) -> None:
        raise OSError("cannot render: set MUJOCO_GL to egl")

    monkeypatch.setattr(make, "_render_frames", no_driver)
    command(enjoy.play, run, "--episodes", "1", "--video", tmp_path / "out.gif")
    assert not (tmp_path / "out.gif").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no video: ")
    assert "MUJOCO_GL" in line


# ----------------------------------------------------------------------------------- exporting


def test_both_files_act_as_the_agent(
    command: Callable, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    command(export.export, run, "--out", tmp_path / "out")
    assert capsys.readouterr().out.count("on 1,000 observations") == 2
    observation = torch.randn(3, 4)
    expected = trained.find(str(run)).agent.policy(latent="mean")(observation=observation)
    program = torch.export.load(tmp_path / "out/policy.pt2").module()
    torch.testing.assert_close(program(observation), expected)
    session = onnxruntime.InferenceSession(tmp_path / "out/policy.onnx")
    (action,) = session.run(["action"], {"observation": observation.numpy()})
    torch.testing.assert_close(torch.from_numpy(action), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("absent", "says", "files"),
    [
        ("onnxscript", "no ONNX file: onnxscript not installed (pip install", ["policy.pt2"]),
        ("onnxruntime", "onnxruntime is not installed", ["policy.onnx", "policy.pt2"]),
    ],
)
def test_a_missing_package_is_a_hint(
    command: Callable,
    run: Path,
    tmp_path: Path,
    absent: str,
    says: str,
    files: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == absent else True)
    monkeypatch.setattr(export, "to_onnx", lambda *_: b"a model")
    monkeypatch.setattr(export, "STEPS", 20)
    command(export.export, run, "--out", tmp_path / "out")
    assert says in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files


def test_a_file_that_acts_otherwise_is_not_written(
    command: Callable, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    monkeypatch.setattr(export, "STEPS", 20)
    message = fails(command, export.export, run, "--out", tmp_path / "out")
    assert "differs from the agent by" in message
    assert "it was not written" in message
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: 1 / 0)
    assert "torch.export cannot export" in fails(command, export.export, run, "--out", tmp_path)
    assert export.difference(torch.tensor([101.0]), torch.tensor([100.0])) == pytest.approx(0.01)


# ------------------------------------------------------------------------- pretrained folders


def test_a_run_becomes_a_pretrained_agent_with_its_card(
    command: Callable, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments import pretrained

    arguments = ["--episodes", "4", "--out", tmp_path / "made", "--commit", "abc123"]
    command(pretrained.make, run, "--command", "python recipes/mujoco.py seed=3", *arguments)
    folder = tmp_path / "made/invertedpendulum-v5-seed3"
    card = (folder / "README.md").read_text()
    for fact in ("23 environment steps", "26 in the whole run", "seed | 3", "abc123", "mujoco.py"):
        assert fact in card
    assert "license: mit" in card
    assert (folder / "curve.csv").read_text() == CURVE
    found = trained.find(str(folder))
    assert found.environment["action_repeat"] == 2
    assert found.evaluation["episodes"] == 4
    assert f"{found.evaluation['mean']:.1f} +- {found.evaluation['std']:.1f}" in card


def test_what_is_no_finished_run_makes_no_pretrained_agent(
    command: Callable, run: Path, config: Callable
) -> None:
    from experiments import pretrained

    def line(folder: Path) -> str:
        return fails(command, pretrained.make, folder, "--command", "x")

    assert "has no curve.csv: give the folder of a run" in line(run / "checkpoints")
    (run / "curve.csv").write_text(CURVE.splitlines()[0])
    assert "has no evaluation: train the run first" in line(run)
    (run / "curve.csv").write_text(CURVE)
    transforms = "encoder.transforms=[{_target_: torchrl.envs.DoubleToFloat}]"
    write_config(run, config(f"task.id={TASK}", transforms))
    assert "has encoder.transforms, which a pretrained agent cannot have" in line(run)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["enjoy.py", "export.py"])
def test_a_script_starts_from_any_folder(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes" / script), "nothing"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=patience(100), check=False
    )
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "nothing is neither a file nor a folder" in result.stderr

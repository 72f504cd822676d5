"""Agents as folders of safetensors and JSON, on the disk and from the Hugging Face Hub."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from alm_torchrl.agent import AgentConfig, ALMAgent, find_pretrained
from alm_torchrl.modules import LatentModule, MultiInputEncoder
from alm_torchrl.pretrained import read_config

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")

SIZES = {"latent_dim": 4, "hidden_dim": 8, "dynamics_hidden_dim": 12}
FILES = ["README.md", "agent.safetensors", "config.json"]


@pytest.fixture
def agent() -> ALMAgent:
    torch.manual_seed(0)
    agent = ALMAgent(AgentConfig({"observation": 3}, (-1.0, 0.0), (1.0, 4.0), **SIZES))
    agent.noise.advance(123)
    return agent


@pytest.fixture
def folder(agent: ALMAgent, tmp_path: Path) -> Path:
    agent.save_pretrained(tmp_path / "agent", card="# Agent", environment={"task": "Hopper-v5"})
    return tmp_path / "agent"


def act(agent: ALMAgent, **observations: torch.Tensor) -> torch.Tensor:
    observations = observations or {"observation": torch.ones(5, 3)}
    return agent.policy(latent="mean")(TensorDict(observations, batch_size=[5]))["action"]


def test_a_folder_holds_the_whole_agent(agent: ALMAgent, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert (folder / "README.md").read_text() == "# Agent"
    assert read_config(folder)["environment"] == {"task": "Hopper-v5"}
    for loaded in (ALMAgent.from_pretrained(folder), ALMAgent.load(folder, device="cpu")):
        assert loaded.config == agent.config
        assert str(loaded) == str(agent)
        assert int(loaded.noise.step_count) == 123
        assert torch.equal(act(loaded), act(agent))
        state = agent.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_metadata_cannot_replace_the_configuration(agent: ALMAgent, tmp_path: Path) -> None:
    agent.save_pretrained(tmp_path, config={}, version=99)
    assert ALMAgent.from_pretrained(tmp_path).config == agent.config


def test_nested_keys_and_images_survive_json(tmp_path: Path) -> None:
    shapes = {("robot", "camera"): (3, 16, 16), "joints": (3,)}
    encoder = MultiInputEncoder(shapes, latent_dim=4, hidden_dim=8)
    sizes = {"latent_dim": 4, "hidden_dim": 8, "dynamics_hidden_dim": 8}
    agents = [
        ALMAgent(AgentConfig({("robot", "joints"): 3, "x": 2}, (-1.0,), (1.0,), **sizes)),
        ALMAgent(AgentConfig({}, (-1.0,), (1.0,), **sizes), encoder=encoder),
    ]
    nested = {("robot", "joints"): torch.ones(5, 3), "x": torch.ones(5, 2)}
    images = {("robot", "camera"): torch.rand(5, 3, 16, 16), "joints": torch.ones(5, 3)}
    for agent, observations in zip(agents, (nested, images), strict=True):
        agent.save_pretrained(tmp_path)
        loaded = ALMAgent.from_pretrained(tmp_path)
        assert loaded.config == agent.config
        data = TensorDict(observations, batch_size=[5])
        expected = agent.policy("mean")(data.clone())["action"]
        assert torch.equal(loaded.policy("mean")(data)["action"], expected)


def test_networks_of_ones_own_are_passed_again(tmp_path: Path) -> None:
    def own() -> LatentModule:
        return LatentModule(nn.Linear(3, 8), in_keys=["observation"])

    agent = ALMAgent(AgentConfig({}, (-1.0,), (1.0,), **SIZES), encoder=own())
    agent.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pass encoder=\.\.\. to load"):
        ALMAgent.from_pretrained(tmp_path)
    assert torch.equal(act(ALMAgent.from_pretrained(tmp_path, encoder=own())), act(agent))


def test_state_that_is_no_tensor_is_refused_before_anything_is_written(
    agent: ALMAgent, tmp_path: Path
) -> None:
    class Counting(nn.Identity):
        def get_extra_state(self):
            return np.int64(3)

    agent.reward_model.counter = Counting()
    with pytest.raises(ValueError, match="only save tensors, not .*_extra_state.*: use"):
        agent.save_pretrained(tmp_path / "agent")
    assert not (tmp_path / "agent").exists()


def test_the_hub_is_asked_for_the_three_files_of_a_revision(
    agent: ALMAgent, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.append((repo_id, options))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    loaded = ALMAgent.from_pretrained("someone/hopper", revision="v1")
    assert torch.equal(act(loaded), act(agent))
    ((repo_id, options),) = asked
    assert repo_id == "someone/hopper"
    assert options["revision"] == "v1"
    assert sorted(options["allow_patterns"]) == FILES


def test_a_download_that_fails_names_both_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise hub.errors.LocalEntryNotFoundError("no connection\nand nothing cached")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(OSError, match="not a folder and cannot be downloaded.*hf auth login") as e:
        ALMAgent.from_pretrained("someone/hopper")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "../agent", "/tmp/none", "agent.pt"])
def test_a_name_that_is_no_folder_is_not_asked_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("agent.pt").touch()
    with pytest.raises(FileNotFoundError, match="neither a folder nor a repository OWNER/NAME"):
        find_pretrained(name)


@pytest.mark.parametrize("package", ["huggingface_hub", "safetensors.torch"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    source = "someone/hopper" if package == "huggingface_hub" else folder
    name = package.partition(".")[0]
    with pytest.raises(ImportError, match=rf"needs? {name}: pip install 'alm-torchrl\[hub\]'"):
        ALMAgent.from_pretrained(source)


DAMAGE = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "agent.safetensors").unlink(),
    "half a config": lambda folder: (folder / "config.json").write_text("{"),
    "another config": lambda folder: (folder / "config.json").write_text("[1, 2]"),
    "deep config": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "half the weights": lambda folder: (folder / "agent.safetensors").write_bytes(b"12345678{"),
    "another model": lambda folder: (folder / "config.json").write_text('{"format": "bert"}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_another_folder_is_a_value_error_of_one_line(folder: Path, damage) -> None:
    damage(folder)
    with pytest.raises(ValueError, match="not written by ALMAgent.save_pretrained") as raised:
        ALMAgent.from_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_another_version_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"version": 99}))
    with pytest.raises(ValueError, match="format version 99, this release reads 3"):
        ALMAgent.from_pretrained(folder)


def test_the_agents_of_the_repository_are_in_no_distribution() -> None:
    root = Path(__file__).resolve().parents[1]
    build = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["packages"] == ["src/alm_torchrl"]
    assert "/pretrained" not in build["targets"]["sdist"]["include"]

"""The recipe's options, composed as from a command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from recipes.config import Config
from recipes.run_name import register_names

CONF = Path(__file__).resolve().parents[2] / "recipes/conf"


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., DictConfig]:
    """Composes the options, with what Hydra knows of the command line."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    register_names()

    def make(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            options = compose("mujoco", overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(options)
        return options

    return make


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Composes the options as the recipe gets them."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    register_names()

    def make(*overrides: str, folder: str | Path = "unused") -> Config:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            options = compose("mujoco", overrides=[f"run.folder='{folder}'", *overrides])
        return OmegaConf.to_object(options)

    return make

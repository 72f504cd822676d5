"""Trains ALM on a MuJoCo task: ``python recipes/mujoco.py [preset=...] [task=...] [option=...]``.

``--help`` lists the options, which options.py and config.py declare; conf/ has the presets, tasks
and encoders. The run's folder contains configuration, learning curve, metrics, checkpoints and
agents. train.py trains; this file reads the command line before PyTorch is loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock, patch

# Replace this folder by the project's root: this file would shadow the package mujoco.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.script import prepare_script

prepare_script("gymnasium", "hydra", "lightning", "matplotlib", "mujoco", "tensorboard")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.command_line import one_line_with_cause, read_arguments
from recipes.config import Config
from recipes.option_checks import check_options
from recipes.option_help import CONF, help_text
from recipes.run_name import register_names
from recipes.saved_config import resumed_options


def start(options: DictConfig) -> None:
    """Checks the options, and trains."""
    try:
        options = resumed_options(options, HydraConfig.get().overrides.task)
        config: Config = OmegaConf.to_object(options)  # type: ignore[assignment]
        check_options(config)
    except (ValueError, OSError) as error:
        sys.exit(one_line_with_cause(error))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{config.task.id}: loading PyTorch", flush=True)
    from recipes.train import train  # imports PyTorch, which takes seconds

    train(config)


def launch(config_name: str) -> None:
    """Reads the command line and trains; an invalid option is reported in one line."""
    register_names()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raises errors in options instead of printing them
    options = {"config_path": str(CONF), "config_name": config_name}
    try:
        sys.argv[1:] = read_arguments(sys.argv[1:])
        if {"-h", "--help"} & {*sys.argv}:
            print(help_text(config_name, [name for name in sys.argv[1:] if "=" in name]))
        else:
            # Hydra 1.3.8 passes a help that is not a string, which argparse of Python 3.14 rejects.
            with patch.object(argparse.ArgumentParser, "_check_help", MagicMock(), create=True):
                hydra.main(version_base="1.3", **options)(start)()
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        sys.exit(one_line_with_cause(error))


if __name__ == "__main__":
    launch("mujoco")

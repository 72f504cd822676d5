"""Trains ALM on a MuJoCo task: ``python recipes/mujoco.py [preset=...] [task=...] [option=...]``.

options.py and config.py list the options, conf/ the presets, tasks and encoders. The run's folder
contains configuration, learning curve, metrics, checkpoints and agents.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

# Replace this folder by the project's root: this file would shadow the package mujoco.
sys.path[0] = str(Path(__file__).resolve().parents[1])
EXTRAS = ("gymnasium", "hydra", "lightning", "matplotlib", "mujoco", "tensorboard")
if missing := [name for name in EXTRAS if find_spec(name) is None]:
    sys.exit(f"{', '.join(missing)} not installed: pip install 'alm-torchrl[recipes]'")
if sys.platform == "linux" and "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")  # videos without a screen

import hydra
import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alm_torchrl.files import one_line
from alm_torchrl.training import (
    EnvironmentFailedError,
    make_trainer,
    silence_library_warnings,
)
from alm_torchrl.training.runtime import is_lost_process
from recipes.build import env_factory, make_measurements, make_module
from recipes.config import Config, pick
from recipes.run_folder import Run, prepare
from recipes.run_name import register_names


def train(options: DictConfig) -> None:
    """Prepares the folder of a run and trains."""
    config: Config = OmegaConf.to_object(options)  # type: ignore[assignment]
    try:
        run = prepare(config)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:  # while waiting for another run
        sys.exit("interrupted before training")
    with run:
        fit(config, run)


def fit(config: Config, run: Run) -> None:
    """Builds trainer and module, trains, and reports errors in one line."""
    folder, start = run.folder, run.start
    try:
        torch.set_float32_matmul_precision(config.run.matmul_precision)
        L.seed_everything(config.seed, verbose=False)
        task, training, video = config.task, config.training, config.evaluation.video
        trainer = make_trainer(
            folder,
            seed=config.seed,
            num_seeds=config.num_seeds,
            title=f"ALM on {task.name}",
            eval_every=int(config.evaluation.every * training.updates_per_step),
            checkpoint_every=int(config.checkpoint.every * training.updates_per_step),
            keep_checkpoints=config.checkpoint.keep,
            start=start,
            **pick(config.run, "accelerator", "devices", "num_nodes", "tensorboard", "wandb"),
            measurements=make_measurements(config),
            video_env=env_factory(config)(from_pixels=True) if video else None,
            callbacks=run.record(config),
        )
        module = make_module(config, trainer.strategy.root_device, trainer.global_rank)
    except (
        *(ValueError, TypeError, OSError, ImportError),
        *(EnvironmentFailedError, MisconfigurationException),
    ) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except HydraException as error:  # a _target_ that cannot be built
        sys.exit(_one_line_with_cause(error))
    say = rank_zero_only(print)
    begin = f"resuming at step {start.step}" if start else f"{training.warmup_steps} random steps"
    say(f"{task.id}: {begin}, then training; {folder}")
    if module.compiles:
        say("compiling the losses takes minutes (run.compile=never disables it)")
    try:
        trainer.fit(module)
    except SystemExit:  # raised by Lightning after Ctrl-C or SIGTERM
        when = f"after {module.experience.steps} steps" if module.restored else "before training"
        say(f"interrupted {when}; {_kept(folder)}", file=sys.stderr)
        sys.exit(1)
    except MisconfigurationException as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except (EnvironmentFailedError, FloatingPointError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}; {_kept(folder)}")
    except Exception as error:
        if isinstance(error, RuntimeError) and is_lost_process(error):
            sys.exit(f"another process of the run exited; see its output; {_kept(folder)}")
        if start is None or module.restored:
            raise
        sys.exit(f"{start.folder} does not fit this run; nothing was changed: {one_line(error)}")
    finally:
        module.experience.shutdown()
    score = trainer.callback_metrics.get("return")
    result = "already finished" if score is None else f"return {score:.0f}"
    say(f"{result}; curve, agent and checkpoints: {folder}")


def _kept(folder: Path) -> str:
    """Tells how to continue the run."""
    if any((folder / "checkpoints").glob("update-*[0-9]")):
        return f"continue with resume={folder}"
    return "no checkpoint was saved yet"


def _one_line_with_cause(error: Exception) -> str:
    return " ".join(f"{error} {error.__cause__ or ''}".split())


def launch(config_name: str) -> None:
    """Reads the command line and trains; an invalid option is reported in one line."""
    silence_library_warnings()
    register_names()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raises errors in options instead of printing them
    options = {
        "config_path": str(Path(__file__).resolve().parent / "conf"),
        "config_name": config_name,
    }
    try:
        hydra.main(version_base="1.3", **options)(train)()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(_one_line_with_cause(error))


if __name__ == "__main__":
    launch("mujoco")

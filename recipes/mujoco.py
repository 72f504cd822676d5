"""Trains ALM on a MuJoCo task: ``python recipes/mujoco.py [preset=...] [task=...] [option=...]``.

The options stand in conf/mujoco.yaml, the encoders to choose from in conf/encoder. A run leaves
configuration, learning curve, metrics, checkpoints and agents in its folder.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

# The project's root rather than this folder, where this file would pass for the simulator.
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
    is_lost_process,
    make_trainer,
    silence_library_warnings,
)
from recipes.build import env_factory, make_measurements, make_module
from recipes.config import Config, pick
from recipes.run_folder import Run, prepare
from recipes.run_name import register_names


def train(options: DictConfig) -> None:
    """One run: its folder, then :func:`fit`."""
    config: Config = OmegaConf.to_object(options)  # type: ignore[assignment]
    try:
        run = prepare(config)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:  # while it waits for another run
        sys.exit("interrupted before it began")
    with run:
        fit(config, run)


def fit(config: Config, run: Run) -> None:
    """Environment, agent, loss, data, training."""
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
            **pick(config.run, "accelerator", "devices", "num_nodes"),
            **pick(config.run, "precision", "tensorboard", "wandb"),
            measurements=make_measurements(config),
            video_env=env_factory(config)(from_pixels=True) if video else None,
        )
        trainer.callbacks += run.record(config)  # type: ignore[attr-defined]
        module = make_module(config, trainer.strategy.root_device, trainer.global_rank)
    except (
        *(ValueError, TypeError, OSError, ImportError),
        *(EnvironmentFailedError, MisconfigurationException),
    ) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    say = rank_zero_only(print)  # of several processes, the first
    begin = f"on from step {start.step}" if start else f"{training.warmup_steps} random steps"
    say(f"{task.id}: {begin}, then learning; {folder}")
    if module.compiles:
        say("the first update compiles the losses, which takes minutes (run.compile=never: none)")
    try:
        trainer.fit(module, ckpt_path=start.state if start else None, weights_only=True)
    except SystemExit:  # how Lightning ends after Ctrl-C or SIGTERM
        when = f"after {module.experience.steps} steps" if module.restored else "before it began"
        say(f"interrupted {when}; {_kept(folder)}", file=sys.stderr)
        sys.exit(1)
    except MisconfigurationException as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except (EnvironmentFailedError, FloatingPointError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}; {_kept(folder)}")
    except Exception as error:
        if isinstance(error, RuntimeError) and is_lost_process(error):
            sys.exit(f"another process of this run has ended, for its own reason; resume={folder}")
        if start is None or module.restored:
            raise
        what = f"does not fit this run, of which nothing was changed: {one_line(error)}"
        sys.exit(f"{start.folder} {what}")
    finally:
        module.experience.shutdown()
    score = trainer.callback_metrics.get("return")
    result = "nothing was left to do" if score is None else f"return {score:.0f}"
    say(f"{result}; curve, agent and checkpoints: {folder}")


def _kept(folder: Path) -> str:
    """How to go on, if there is something to go on from."""
    if any((folder / "checkpoints").glob("update-*[0-9]")):
        return f"resume={folder} goes on from what was kept"
    return "nothing was kept yet, so that it begins anew"


def launch(config_name: str) -> None:
    """Reads the command line and trains; a mistake costs one line."""
    silence_library_warnings()
    register_names()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that an error in an option arrives here
    options = {
        "config_path": str(Path(__file__).resolve().parent / "conf"),
        "config_name": config_name,
    }
    try:
        hydra.main(version_base="1.3", **options)(train)()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(" ".join(f"{error} {error.__cause__ or ''}".split()))


if __name__ == "__main__":
    launch("mujoco")

"""Trains with the checked options of a recipe."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only

from alm_torchrl.envs import EnvironmentFailedError
from alm_torchrl.files import one_line
from alm_torchrl.training import (
    ALMModule,
    make_trainer,
    silence_library_warnings,
)
from alm_torchrl.training.runtime import is_lost_process
from recipes.build import env_factory, make_measurements, make_module
from recipes.command_line import one_line_with_cause
from recipes.config import Config, pick
from recipes.run_folder import Run, prepare


def train(config: Config) -> None:
    """Prepares the folder of a run and trains."""
    silence_library_warnings()
    try:
        run = prepare(config)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:  # while waiting for another run
        sys.exit("interrupted before training")
    with run:
        try:
            trainer, module = build(config, run)
        except (
            *(ValueError, TypeError, OSError, ImportError),
            *(EnvironmentFailedError, MisconfigurationException),
        ) as error:
            run.discard()
            sys.exit(f"{type(error).__name__}: {error}")
        except HydraException as error:  # a _target_ that cannot be built
            run.discard()
            sys.exit(one_line_with_cause(error))
        fit(config, run, trainer, module)


def build(config: Config, run: Run) -> tuple[L.Trainer, ALMModule]:
    """Builds trainer and module."""
    torch.set_float32_matmul_precision(config.run.matmul_precision)
    L.seed_everything(config.seed, verbose=False)
    training, video = config.training, config.evaluation.video
    trainer = make_trainer(
        run.folder,
        seed=config.seed,
        num_seeds=config.num_seeds,
        title=f"ALM on {config.task.name}",
        eval_every=int(config.evaluation.every * training.updates_per_step),
        checkpoint_every=int(config.checkpoint.every * training.updates_per_step),
        keep_checkpoints=config.checkpoint.keep,
        start=run.start,
        **pick(config.run, "accelerator", "devices", "num_nodes", "tensorboard", "wandb"),
        measurements=make_measurements(config),
        video_env=env_factory(config)(from_pixels=True) if video else None,
        callbacks=run.record(config),
    )
    return trainer, make_module(config, trainer.strategy.root_device, trainer.global_rank)


def fit(config: Config, run: Run, trainer: L.Trainer, module: ALMModule) -> None:
    """Trains, and reports errors in one line."""
    folder, start = run.folder, run.start
    warmup = f"{config.training.warmup_steps} random steps"
    begin = f"resuming at step {start.step}" if start else warmup
    _say(f"{config.task.id}: {begin}, then training; {folder}")
    if module.compiles:
        _say("compiling the losses takes minutes (run.compile=never disables it)")
    try:
        trainer.fit(module)
    except SystemExit:  # raised by Lightning after Ctrl-C or SIGTERM
        when = f"after {module.experience.steps} steps" if module.restored else "before training"
        _say(f"interrupted {when}; {_kept(folder)}", error=True)
        sys.exit(1)
    except MisconfigurationException as error:
        run.discard()
        sys.exit(f"{type(error).__name__}: {error}")
    except (EnvironmentFailedError, FloatingPointError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}; {_kept(folder)}")
    except Exception as error:
        if isinstance(error, RuntimeError) and is_lost_process(error):
            sys.exit(f"another process of the run exited; see its output; {_kept(folder)}")
        if type(error).__module__.startswith("wandb") and not module.restored:
            run.discard()
            reason = one_line(error).rstrip(".")
            sys.exit(f"run.wandb=true: {reason}, or set WANDB_MODE=offline")
        if start is None or module.restored:
            raise
        sys.exit(f"{start.folder} does not fit this run; nothing was changed: {one_line(error)}")
    finally:
        module.experience.shutdown()
    score = trainer.callback_metrics.get("return")
    result = "already finished" if score is None else f"return {score:.0f}"
    _say(f"{result}; curve, agent and checkpoints: {folder}")


@rank_zero_only
def _say(message: str, *, error: bool = False) -> None:
    """Prints a line from the first process; at once, also into a file."""
    print(message, file=sys.stderr if error else sys.stdout, flush=True)


def _kept(folder: Path) -> str:
    """Tells how to continue the run."""
    if any((folder / "checkpoints").glob("update-*[0-9]")):
        return f"continue with resume={folder}"
    return "no checkpoint was saved yet"

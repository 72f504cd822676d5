"""Checkpoints that a run goes on from as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import numpy as np
import torch

from alm_torchrl.data import JournalPart, ReplayJournal
from alm_torchrl.envs import random_states, set_random_states
from alm_torchrl.files import replacing, sha256, sync
from alm_torchrl.training.module import ALMModule

__all__ = ["Checkpoint", "Checkpoints", "find_checkpoint", "validates_next"]

_FORMAT = "alm_torchrl.Checkpoint"
_VERSION = 1
_STATE = "state.ckpt"
_MANIFEST = "manifest.json"
_PACKAGES = ("alm-torchrl", "torch", "torchrl", "tensordict", "lightning", "gymnasium", "mujoco")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        folder: what it lies in, beside the folder ``replay`` of the run.
        update: updates made before it.
        step: environment steps made before it, after the warm-up.
        replay: what the replay buffer is restored from.
    """

    folder: Path
    update: int
    step: int
    replay: tuple[JournalPart, ...]

    @property
    def state(self) -> Path:
        """Lightning's checkpoint, for ``Trainer.fit(ckpt_path=..., weights_only=True)``."""
        return self.folder / _STATE


def find_checkpoint(folder: str | Path) -> Checkpoint | None:
    """Finds the newest checkpoint of a run that is whole, and warns of newer ones that are not.

    Args:
        folder: the run's ``checkpoints``.

    Returns:
        The checkpoint, if there is one.

    Raises:
        ValueError: if a checkpoint was written by a newer version of this package.
    """
    for found in sorted(Path(folder).glob("update-*[0-9]"), reverse=True):
        try:
            return _read(found)
        except OSError as error:
            warnings.warn(f"passing over a checkpoint that is not whole: {error}", stacklevel=2)
    return None


def _read(folder: Path) -> Checkpoint:
    """Reads a manifest and compares everything with it."""
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        checksum = manifest.pop("sha256")
        if manifest["format"] != _FORMAT or checksum != _digest(manifest):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OSError(f"{path} is not as it was written") from None
    if manifest["version"] > _VERSION:
        raise ValueError(f"{folder} was written by a newer alm_torchrl: update this one")
    if sha256(folder / _STATE) != manifest["state_sha256"]:
        raise OSError(f"{folder / _STATE} is not as it was written")
    parts = tuple(JournalPart(**part) for part in manifest["replay"])
    for part in parts:
        part.check(_replay_folder(folder.parent))
    return Checkpoint(folder, manifest["update"], manifest["step"], parts)


class Checkpoints(L.Callback):
    """Keeps everything that a run needs to go on: the last few checkpoints, and the replay buffer.

    A checkpoint is a folder ``update-<n>`` with Lightning's state (networks, targets, optimiser,
    counters, callbacks and every random generator) and a manifest with checksums and versions.
    The replay buffer is written to ``replay`` beside it, each transition once. A folder gets its
    name when all that belongs to it is on the disk, so that a run can be killed at any moment.

    To go on, give ``Trainer.fit`` the checkpoint's ``state``. The environments are reset, so the
    episodes that were running then end there, truncated.

    Args:
        folder: where checkpoints go.
        every: updates between two; one more is made when training ends or is interrupted.
        keep: how many of the newest are kept.
        start: the checkpoint that the run goes on from.
    """

    def __init__(
        self, folder: str | Path, *, every: int, keep: int = 2, start: Checkpoint | None = None
    ) -> None:
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self.start = start
        self.kept = [] if start is None else [start]
        self.requested = False
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: ALMModule, stage: str) -> None:
        """Restores the replay buffer."""
        if stage != "fit":
            return
        self._envs = [pl_module.experience.env, pl_module.eval_env]
        replay = pl_module.experience.replay
        self._journal = ReplayJournal(replay, _replay_folder(self.folder))
        if self.start is not None:
            self._journal.load(self.start.replay)

    def state_dict(self) -> dict[str, Any]:
        """The state of every random generator."""
        numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - whoever draws from it
        return {
            "python": random.getstate(),
            "numpy": json.dumps(numpy, default=np.ndarray.tolist),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "envs": [random_states(env) for env in self._envs],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training starts, when nothing is drawn any more to prepare it."""
        self._restored = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Restores the random generators."""
        state, self._restored = self._restored, None
        if state is None:
            return
        python, numpy = state["python"], json.loads(state["numpy"])
        random.setstate((python[0], tuple(python[1]), python[2]))
        numpy["state"]["key"] = np.array(numpy["state"]["key"], dtype=np.uint32)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        with torch.random.fork_rng():  # resets are no part of what goes on
            for env, states in zip(self._envs, state["envs"], strict=True):
                set_random_states(env, states)
            pl_module.experience.restart()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: ALMModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves, if it is time to; where an evaluation follows, after that."""
        if not validates_next(trainer, batch_idx):
            self._save_if_due(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Saves, if it is time to."""
        self._save_if_due(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: ALMModule, exception: BaseException
    ) -> None:
        """Saves when the environment failed, since no update was under way."""
        if pl_module.experience.collecting and pl_module.experience.updates:
            self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Writes a checkpoint, between two updates.

        Raises:
            OSError: if it cannot be written; the ones before it stay.
        """
        experience = pl_module.experience
        name = f"update-{experience.updates:010d}"
        if self.kept and self.kept[-1].folder.name == name:
            return
        parts = self._journal.save()
        partial = self.folder / (name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            trainer.save_checkpoint(partial / _STATE)
            sync(partial / _STATE)
            manifest = {
                "format": _FORMAT,
                "version": _VERSION,
                "update": experience.updates,
                "step": experience.steps,
                "frames": experience.frames,
                "versions": dict(_versions()),
                "state_sha256": sha256(partial / _STATE),
                "replay": [asdict(part) for part in parts],
            }
            manifest["sha256"] = _digest(manifest)
            with replacing(partial / _MANIFEST) as file:
                file.write(json.dumps(manifest, indent=1).encode())
            shutil.rmtree(self.folder / name, ignore_errors=True)  # damaged, or not gone on from
            partial.rename(self.folder / name)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(self.folder)
        checkpoint = Checkpoint(
            self.folder / name, experience.updates, experience.steps, tuple(parts)
        )
        self.kept = [*self.kept, checkpoint][-self.keep :]
        self._remove_others()

    def _save_if_due(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        updates = pl_module.experience.updates
        last = updates >= len(pl_module.experience)
        if updates and (self.requested or last or updates % self.every == 0):
            pl_module.check()
            self.save(trainer, pl_module)

    def _remove_others(self) -> None:
        """Removes what belongs to none of the checkpoints kept."""
        kept = {checkpoint.folder.name for checkpoint in self.kept}
        for found in self.folder.glob("update-*"):
            if found.name not in kept:
                shutil.rmtree(found, ignore_errors=True)
        self._journal.remove_all_but(part for one in self.kept for part in one.replay)


def validates_next(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether an evaluation follows this update, after which a run that goes on skips it."""
    every = trainer.val_check_batch
    return bool(trainer.enable_validation and every and (batch_idx + 1) % every == 0)


def _replay_folder(checkpoints: Path) -> Path:
    return checkpoints / "replay"


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _digest(manifest: Mapping[str, Any]) -> str:
    """A checksum of everything in a manifest but the checksum itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

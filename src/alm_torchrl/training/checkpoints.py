"""Checkpoints of everything a run needs to resume, the replay buffer included."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from alm_torchrl.data import IncrementalReplay, ReplayChunk
from alm_torchrl.envs import random_states, set_random_states
from alm_torchrl.envs.failures import EnvironmentFailedError
from alm_torchrl.files import atomic_write, load_tensors, save_tensors, set_aside, sha256, sync
from alm_torchrl.training.module import ALMModule
from alm_torchrl.training.runtime import gather

_FORMAT = "alm_torchrl.Checkpoint"
_VERSION = 1
_NAME = re.compile(r"update-\d{10}")
_STATE = "state.ckpt"
_MANIFEST = "manifest.json"
#: Bytes; an entry of a replay file takes about 200.
_LARGEST_MANIFEST = 2**24
_PACKAGES = ("alm-torchrl", "torch", "torchrl", "tensordict", "lightning", "gymnasium", "mujoco")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        folder: its folder, beside the folders ``replay-<n>`` of the run's processes.
        step: environment steps before it, after the warm-up.
        replay: chunks of the replay buffer of each process.
    """

    folder: Path
    update: int
    step: int
    replay: tuple[tuple[ReplayChunk, ...], ...]

    @property
    def state(self) -> Path:
        """Lightning's part: networks, targets, optimizer, counters, callbacks, generators."""
        return self.folder / _STATE

    @property
    def num_processes(self) -> int:
        """Processes of the run, each with a replay buffer of its own."""
        return len(self.replay)


def find_checkpoint(folder: str | Path) -> Checkpoint | None:
    """Finds the newest intact checkpoint, and warns of damaged ones and of changed packages.

    Args:
        folder: the run's ``checkpoints``.

    Raises:
        OSError: if all checkpoints are damaged, or the folder cannot be read.
        ValueError: if a newer version of this package wrote the checkpoint.
    """
    folder = Path(folder)
    if not (folder.exists() or folder.is_symlink()):
        return None
    names = [found.name for found in folder.iterdir() if _NAME.fullmatch(found.name)]
    damaged: list[OSError] = []
    for name in sorted(names, reverse=True):
        try:
            checkpoint, versions = _read(folder / name)
        except OSError as error:
            damaged.append(error)
            continue
        for damage in damaged:
            warnings.warn(f"skipping a damaged checkpoint: {damage}", stacklevel=2)
        _compare_versions(checkpoint, versions)
        return checkpoint
    if damaged:
        raise OSError(f"all checkpoints in {folder} are damaged; the newest: {damaged[0]}")
    return None


def _read(folder: Path) -> tuple[Checkpoint, dict[str, str]]:
    """Reads a manifest and compares all files with it, before anything is loaded."""
    path = folder / _MANIFEST
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise ValueError
        manifest = json.loads(path.read_bytes())
        checksum = manifest.pop("sha256")
        if manifest["format"] != _FORMAT or checksum != _digest(manifest):
            raise ValueError
        newer = manifest["version"] > _VERSION
        replay = () if newer else tuple(tuple(map(_chunk, one)) for one in manifest["replay"])
        checkpoint = Checkpoint(folder, int(manifest["update"]), int(manifest["step"]), replay)
        versions = dict(manifest["versions"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise OSError(f"{path} is damaged") from None
    if newer:
        raise ValueError(f"{folder} was written by a newer alm_torchrl: update the package")
    _check_archive(checkpoint.state)
    if sha256(checkpoint.state) != manifest["state_sha256"]:
        raise OSError(f"{checkpoint.state} is damaged")
    for rank, chunks in enumerate(replay):
        own = _replay_folder(folder.parent, rank)
        for chunk in chunks:
            chunk.check(own)
            _check_archive(own / chunk.file)
    return checkpoint, versions


def _chunk(entry: dict[str, Any]) -> ReplayChunk:
    """Reads a manifest's entry, which is not trusted."""
    chunk = ReplayChunk(**entry)
    if not re.fullmatch(r"[\w-]+\.pt", chunk.file) or not 0 <= chunk.start < chunk.stop:
        raise ValueError
    return chunk


def _check_archive(path: Path) -> None:
    """Raises an :class:`OSError` unless the file is an archive without compression."""
    if not path.is_file():
        raise OSError(f"{path} is missing")
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.filelist)
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        stored = False
    if not stored:
        raise OSError(f"{path} is damaged")


def _compare_versions(checkpoint: Checkpoint, before: Mapping[str, str]) -> None:
    """Warns of packages whose version has changed."""
    now = _versions()
    changed = [
        f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in _PACKAGES
        if before.get(name) != now.get(name)
    ]
    if changed:
        warnings.warn(
            f"{checkpoint.folder} was written with other package versions, so the run may "
            f"continue differently: {', '.join(changed)}",
            stacklevel=3,
        )


class Checkpoints(L.Callback):
    """Saves the last few checkpoints of a run, and restores the one it resumes from.

    A checkpoint is a folder ``update-<n>`` with Lightning's state and a manifest of checksums and
    versions; the replay buffer is written incrementally to ``replay-<rank>`` beside it. A folder
    gets its final name once all its files are on disk, so a run can be killed at any moment. The
    folder must be visible to all processes. Use the callback through :func:`make_trainer`.

    A resumed run resets the environments, so their running episodes are truncated.

    Args:
        folder: where checkpoints go.
        every: updates between two; one more is made when training ends or is interrupted.
        keep: number of newest checkpoints to keep.
        start: the checkpoint that the run resumes from.
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
        self._generators: list[dict[str, Any]] = []
        self._restored: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: ALMModule, stage: str) -> None:
        """Restores the replay buffer."""
        if stage != "fit":
            return
        self._envs = [pl_module.experience.env, pl_module.eval_env]
        replay, rank = pl_module.experience.replay, trainer.global_rank
        self._replay = IncrementalReplay(replay, _replay_folder(self.folder, rank))
        if self.start is not None:
            check_processes(self.start, trainer.world_size)
            self._replay.load(self.start.replay[rank])

    def state_dict(self) -> dict[str, Any]:
        """The states of all random generators of all processes."""
        return {"generators": self._generators}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until training starts, because setup draws random numbers."""
        self._restored = state_dict["generators"]

    def _generator_states(self) -> dict[str, Any]:
        numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - environments may use it
        return {
            "python": random.getstate(),
            "numpy": json.dumps(numpy, default=np.ndarray.tolist),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "envs": [random_states(env) for env in self._envs],
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: ALMModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lets a finished run continue if it was given more steps."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if progress["current"]["ready"] < len(pl_module.experience):
            progress["is_last_batch"] = False

    def on_train_start(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Restores the random generators."""
        if not self._restored:
            return
        state, self._restored = self._restored[trainer.global_rank], []
        python, numpy = state["python"], json.loads(state["numpy"])
        random.setstate((python[0], tuple(python[1]), python[2]))
        numpy["state"]["key"] = np.array(numpy["state"]["key"], dtype=np.uint32)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        with torch.random.fork_rng():  # the resets must not change the restored generators
            env, eval_env = self._envs
            acting, evaluating = state["envs"]
            set_random_states(env, acting)
            try:
                set_random_states(eval_env, evaluating)
            except ValueError:
                rank_zero_warn("the evaluation environments have changed: they get new seeds")
                set_random_states(eval_env, [])
            pl_module.experience.restart()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: ALMModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if a checkpoint is due, unless an evaluation follows."""
        if not validates_next(trainer, batch_idx):
            self._save_if_due(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Saves if a checkpoint is due."""
        self._save_if_due(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: ALMModule, exception: BaseException
    ) -> None:
        """Saves after an environment failed, except with several processes.

        No update is in progress then. The other processes could not take part in a checkpoint.
        """
        failed = isinstance(exception, EnvironmentFailedError) and pl_module.restored
        if failed and trainer.world_size == 1 and pl_module.experience.updates:
            self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Writes a checkpoint, between two updates; if this fails, earlier ones stay."""
        experience = pl_module.experience
        name = f"update-{experience.updates:010d}"
        if self.kept and self.kept[-1].folder.name == name:
            return
        replay = tuple(gather(trainer, tuple(self._replay.save())))
        self._generators = gather(trainer, self._generator_states())
        checkpoint = Checkpoint(self.folder / name, experience.updates, experience.steps, replay)
        if trainer.is_global_zero:
            self._check_shared(replay)
        self._write(trainer, checkpoint, experience.frames)
        self.kept = [*self.kept, checkpoint][-self.keep :]
        self._remove_others(trainer)

    def _write(self, trainer: L.Trainer, checkpoint: Checkpoint, frames: int) -> None:
        """Writes the checkpoint's folder on rank 0; all processes must call."""
        partial = checkpoint.folder.with_name(checkpoint.folder.name + ".partial")
        first = trainer.is_global_zero
        try:
            if first:
                _remove(partial)
                partial.mkdir(parents=True)
            trainer.save_checkpoint(partial / _STATE)
            if first:
                sync(partial / _STATE)
                _write_manifest(partial, checkpoint, frames)
                _remove(checkpoint.folder)  # damaged, or newer than the one resumed from
                partial.rename(checkpoint.folder)
                sync(self.folder)
        except BaseException:
            if first:
                _remove(partial)
            raise
        trainer.strategy.barrier()

    def _check_shared(self, replay: tuple[tuple[ReplayChunk, ...], ...]) -> None:
        """Raises if the files of other processes are not visible here."""
        for rank, chunks in enumerate(replay):
            folder = _replay_folder(self.folder, rank)
            if missing := [one.file for one in chunks if not (folder / one.file).is_file()]:
                raise OSError(
                    f"process {rank} has written {missing[0]}, which is not in {folder}: choose a "
                    "run.folder on a file system that all machines share"
                )

    def _save_if_due(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        updates = pl_module.experience.updates
        last = updates >= len(pl_module.experience)
        if updates and (self.requested or last or updates % self.every == 0):
            pl_module.check()
            self.save(trainer, pl_module)

    def _remove_others(self, trainer: L.Trainer) -> None:
        """Removes all files that belong to no kept checkpoint."""
        kept = {checkpoint.folder.name for checkpoint in self.kept}
        if trainer.is_global_zero:
            for found in self.folder.glob("update-*"):
                if found.name not in kept and _NAME.fullmatch(found.name.removesuffix(".partial")):
                    with contextlib.suppress(OSError):  # tried again after the next
                        _remove(found)
        rank = trainer.global_rank
        self._replay.remove_all_but(chunk for one in self.kept for chunk in one.replay[rank])


class TensorFiles(TorchCheckpointIO):
    """Lets Lightning read and write its state through :mod:`alm_torchrl.files`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Refuses to write what could not be read again."""
        save_tensors(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads without running code from the file."""
        return load_tensors(path)


def check_processes(start: Checkpoint, num_processes: int) -> None:
    """Raises a :class:`ValueError` unless a run resumes with its number of processes."""
    if start.num_processes != num_processes:
        raise ValueError(
            f"{start.folder} has the replay buffers of {start.num_processes} processes and cannot "
            f"resume with {num_processes}: set run.devices times run.num_nodes to "
            f"{start.num_processes}"
        )


def validates_next(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether an evaluation follows this update; a resumed run would skip it."""
    every = trainer.val_check_batch
    return bool(trainer.enable_validation and every and (batch_idx + 1) % every == 0)


def _remove(folder: Path) -> None:
    """Removes a checkpoint; other files in its folder are kept under another name."""
    if not os.path.lexists(folder):
        return
    if not folder.is_symlink() and folder.is_dir():
        for name in (_MANIFEST, _STATE):
            for path in (folder / name, folder / f"{name}.partial"):
                if path.is_symlink() or path.is_file():
                    path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
            return
    rank_zero_warn(f"{folder} holds other files: it was renamed to {set_aside(folder)}")


def _replay_folder(checkpoints: Path, rank: int) -> Path:
    return checkpoints / f"replay-{rank}"


def _write_manifest(folder: Path, checkpoint: Checkpoint, frames: int) -> None:
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "update": checkpoint.update,
        "step": checkpoint.step,
        "frames": frames,
        "versions": _versions(),
        "state_sha256": sha256(folder / _STATE),
        "replay": [[asdict(chunk) for chunk in chunks] for chunks in checkpoint.replay],
    }
    manifest["sha256"] = _digest(manifest)
    with atomic_write(folder / _MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _digest(manifest: Mapping[str, Any]) -> str:
    """A checksum of a manifest without its checksum."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

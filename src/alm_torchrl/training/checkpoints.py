"""Checkpoints that a run goes on from as if nothing had happened."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
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
from alm_torchrl.files import atomic_write, load_tensors, save_tensors, set_aside, sha256, sync
from alm_torchrl.training.experience import EnvironmentFailedError
from alm_torchrl.training.module import ALMModule
from alm_torchrl.training.processes import gather

__all__ = ["Checkpoint", "Checkpoints", "check_processes", "find_checkpoint", "validates_next"]

_FORMAT = "alm_torchrl.Checkpoint"
_VERSION = 1
_NAME = re.compile(r"update-\d{10}")
_STATE = "state.ckpt"
_MANIFEST = "manifest.json"
#: Bytes; a replay part takes about 200.
_LARGEST_MANIFEST = 2**24
_PACKAGES = ("alm-torchrl", "torch", "torchrl", "tensordict", "lightning", "gymnasium", "mujoco")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        folder: what it lies in, beside the folders ``replay-<n>`` of the run's processes.
        update: updates made before it.
        step: environment steps made before it, after the warm-up.
        replay: what the replay buffer of each process of the run is restored from.
    """

    folder: Path
    update: int
    step: int
    replay: tuple[tuple[ReplayChunk, ...], ...]

    @property
    def state(self) -> Path:
        """Lightning's checkpoint, for ``Trainer.fit(ckpt_path=..., weights_only=True)``."""
        return self.folder / _STATE

    @property
    def num_processes(self) -> int:
        """How many processes the run had, each with a replay buffer of its own."""
        return len(self.replay)


def find_checkpoint(folder: str | Path) -> Checkpoint | None:
    """Finds the newest checkpoint of a run that is whole, and warns of newer ones that are not.

    It also warns if the packages have changed since.

    Args:
        folder: the run's ``checkpoints``.

    Returns:
        The checkpoint; ``None`` if the run has made none yet.

    Raises:
        OSError: if there are checkpoints and none of them is whole, or the folder cannot be read.
        ValueError: if a checkpoint was written by a newer version of this package.
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
            message = f"passing over a checkpoint that is not whole: {damage}"
            warnings.warn(message, stacklevel=2)
        _compare_versions(checkpoint, versions)
        return checkpoint
    if damaged:
        raise OSError(f"no checkpoint in {folder} is whole; of the newest, {damaged[0]}")
    return None


def _read(folder: Path) -> tuple[Checkpoint, dict[str, str]]:
    """Reads a manifest and compares everything with it, before anything is loaded."""
    path = folder / _MANIFEST
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise ValueError
        manifest = json.loads(path.read_bytes())
        checksum = manifest.pop("sha256")
        if manifest["format"] != _FORMAT or checksum != _digest(manifest):
            raise ValueError
        newer = manifest["version"] > _VERSION
        replay = () if newer else tuple(tuple(map(_part, parts)) for parts in manifest["replay"])
        checkpoint = Checkpoint(folder, int(manifest["update"]), int(manifest["step"]), replay)
        sizes, versions = dict(manifest.get("sizes", {})), dict(manifest["versions"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise OSError(f"{path} is not as it was written") from None
    if newer:
        raise ValueError(f"{folder} was written by a newer alm_torchrl: update this one")
    for file in _files(checkpoint):
        _check_archive(file, sizes.get(file.relative_to(folder.parent).as_posix()))
    if sha256(checkpoint.state) != manifest["state_sha256"]:
        raise OSError(f"{checkpoint.state} is not as it was written")
    for rank, parts in enumerate(replay):
        for part in parts:
            part.check(_replay_folder(folder.parent, rank))
    return checkpoint, versions


def _part(entry: dict[str, Any]) -> ReplayChunk:
    """A part as a manifest describes it, which may be anybody's."""
    part = ReplayChunk(**entry)
    if not re.fullmatch(r"[\w-]+\.pt", part.file) or not 0 <= part.start < part.stop:
        raise ValueError
    return part


def _files(checkpoint: Checkpoint) -> Iterator[Path]:
    """Everything that belongs to a checkpoint but its manifest."""
    yield checkpoint.state
    for rank, parts in enumerate(checkpoint.replay):
        yield from (_replay_folder(checkpoint.folder.parent, rank) / part.file for part in parts)


def _check_archive(path: Path, size: int | None) -> None:
    """Raises an :class:`OSError` unless a file has its size, and unpacks to no more than that."""
    if not path.is_file():
        raise OSError(f"{path} is missing")
    if size is not None and path.stat().st_size != size:
        raise OSError(f"{path} has {path.stat().st_size} bytes, not the {size} that were written")
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.filelist)
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        stored = False
    if not stored:
        raise OSError(f"{path} is not as it was written")


def _compare_versions(checkpoint: Checkpoint, before: Mapping[str, str]) -> None:
    """Warns of packages that have changed since."""
    now = dict(_versions())
    changed = [
        f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in _PACKAGES
        if before.get(name) != now.get(name)
    ]
    if changed:
        warnings.warn(
            f"{checkpoint.folder} was written with other packages, so that what follows may "
            f"differ: {', '.join(changed)}",
            stacklevel=3,
        )


class Checkpoints(L.Callback):
    """Keeps everything that a run needs to go on: the last few checkpoints, and the replay buffer.

    A checkpoint is a folder ``update-<n>`` with Lightning's state (networks, targets, optimizer,
    counters, callbacks and every random generator) and a manifest with checksums and versions.
    The replay buffer is written to ``replay-0`` beside it, each transition once. A folder gets its
    name when all that belongs to it is on the disk, so that a run can be killed at any moment.

    Where the trainer has :class:`TensorFiles` among its plugins, as that of :func:`make_trainer`,
    nothing is kept that could not be read again.

    To go on, give ``Trainer.fit`` the checkpoint's ``state``. The environments are reset, so the
    episodes that were running then end there, truncated.

    Only what was written by this callback is ever removed, whatever else lies in its folders.

    A run of several processes has one checkpoint, with the replay buffer and the random generators
    of each. Its folder must be one that all of them see.

    Args:
        folder: where checkpoints go.
        every: updates between two; one more is made when training ends or is interrupted.
        keep: how many of the newest are kept.
        start: the checkpoint that the run goes on from.

    Raises:
        ValueError: when training starts, if the run that it goes on with had another number of
            processes.
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
        self._journal = IncrementalReplay(replay, _replay_folder(self.folder, rank))
        if self.start is not None:
            check_processes(self.start, trainer.world_size)
            self._journal.load(self.start.replay[rank])

    def state_dict(self) -> dict[str, Any]:
        """The state of every random generator of every process."""
        return {"generators": self._generators}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training starts, when nothing is drawn any more to prepare it."""
        self._restored = state_dict["generators"]

    def _generator_states(self) -> dict[str, Any]:
        numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - whoever draws from it
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
        """Has a run that was done go on if it has been given more steps."""
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
        with torch.random.fork_rng():  # resets are no part of what goes on
            env, eval_env = self._envs
            acting, evaluating = state["envs"]
            set_random_states(env, acting)
            try:
                set_random_states(eval_env, evaluating)
            except ValueError:
                rank_zero_warn("there are other evaluation environments than before: seeded anew")
                set_random_states(eval_env, [])
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
        """Saves when an environment failed, since no update was under way.

        Of several processes the others cannot be asked then, and their last checkpoint remains.
        """
        failed = isinstance(exception, EnvironmentFailedError) and pl_module.restored
        if failed and trainer.world_size == 1 and pl_module.experience.updates:
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
        replay = tuple(gather(trainer, tuple(self._journal.save())))
        self._generators = gather(trainer, self._generator_states())
        checkpoint = Checkpoint(self.folder / name, experience.updates, experience.steps, replay)
        if trainer.is_global_zero:
            self._check_shared(replay)
        self._write(trainer, checkpoint, experience.frames)
        self.kept = [*self.kept, checkpoint][-self.keep :]
        self._remove_others(trainer)

    def _write(self, trainer: L.Trainer, checkpoint: Checkpoint, frames: int) -> None:
        """Writes what lies in the checkpoint's folder; all processes call, and the first writes."""
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
                _remove(checkpoint.folder)  # damaged, or not gone on from
                partial.rename(checkpoint.folder)
                sync(self.folder)
        except BaseException:
            if first:
                _remove(partial)
            raise
        trainer.strategy.barrier()

    def _check_shared(self, replay: tuple[tuple[ReplayChunk, ...], ...]) -> None:
        """Raises if what other processes have written is not to be seen from here."""
        for rank, parts in enumerate(replay):
            folder = _replay_folder(self.folder, rank)
            if lacking := [part.file for part in parts if not (folder / part.file).is_file()]:
                raise OSError(
                    f"process {rank} has written {lacking[0]}, which is not in {folder}: choose a "
                    "run.folder on a file system that all machines share"
                )

    def _save_if_due(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        updates = pl_module.experience.updates
        last = updates >= len(pl_module.experience)
        if updates and (self.requested or last or updates % self.every == 0):
            pl_module.check()
            self.save(trainer, pl_module)

    def _remove_others(self, trainer: L.Trainer) -> None:
        """Removes what belongs to none of the checkpoints kept."""
        kept = {checkpoint.folder.name for checkpoint in self.kept}
        if trainer.is_global_zero:
            for found in self.folder.glob("update-*"):
                if found.name not in kept and _NAME.fullmatch(found.name.removesuffix(".partial")):
                    with contextlib.suppress(OSError):  # what is left is removed after the next
                        _remove(found)
        rank = trainer.global_rank
        self._journal.remove_all_but(part for one in self.kept for part in one.replay[rank])


class TensorFiles(TorchCheckpointIO):
    """Has Lightning read and write its part of a checkpoint as the rest of a run is."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """See :func:`alm_torchrl.files.save_tensors`."""
        save_tensors(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See :func:`alm_torchrl.files.load_tensors`."""
        return load_tensors(path)


def check_processes(start: Checkpoint, num_processes: int) -> None:
    """Refuses to go on with another number of processes than a run had.

    Each has a replay buffer and environments of its own, which cannot be divided anew.

    Args:
        start: the checkpoint to go on from.
        num_processes: of the run that goes on.

    Raises:
        ValueError: if the numbers differ.
    """
    if start.num_processes != num_processes:
        raise ValueError(
            f"{start.folder} is of a run of {start.num_processes} processes, each with a replay "
            f"buffer of its own, and cannot go on with {num_processes}: take run.devices times "
            f"run.num_nodes = {start.num_processes}"
        )


def validates_next(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether an evaluation follows this update, after which a run that goes on skips it."""
    every = trainer.val_check_batch
    return bool(trainer.enable_validation and every and (batch_idx + 1) % every == 0)


def _remove(folder: Path) -> None:
    """Removes a checkpoint; what else lies in its folder is kept under another name."""
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
    rank_zero_warn(f"{folder} holds what is not a checkpoint's: it is now {set_aside(folder)}")


def _replay_folder(checkpoints: Path, rank: int) -> Path:
    return checkpoints / f"replay-{rank}"


def _write_manifest(folder: Path, checkpoint: Checkpoint, frames: int) -> None:
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "update": checkpoint.update,
        "step": checkpoint.step,
        "frames": frames,
        "versions": dict(_versions()),
        "sizes": _sizes(folder, checkpoint),
        "state_sha256": sha256(folder / _STATE),
        "replay": [[asdict(part) for part in parts] for parts in checkpoint.replay],
    }
    manifest["sha256"] = _digest(manifest)
    with atomic_write(folder / _MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def _sizes(partial: Path, checkpoint: Checkpoint) -> dict[str, int]:
    """The bytes of every file, by its name under ``checkpoints``."""
    state, *parts = _files(checkpoint)
    root = checkpoint.folder.parent
    sizes = {state.relative_to(root).as_posix(): (partial / _STATE).stat().st_size}
    return sizes | {part.relative_to(root).as_posix(): part.stat().st_size for part in parts}


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _digest(manifest: Mapping[str, Any]) -> str:
    """A checksum of everything in a manifest but the checksum itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

"""Checkpoints that a run can resume from, including the replay buffer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import warnings
import zipfile
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

_FORMAT = "alm_torchrl.Checkpoint"
_VERSION = 1
_NAME = re.compile(r"update-\d{10}")
_STATE = "state.ckpt"
_MANIFEST = "manifest.json"
_PACKAGES = ("alm-torchrl", "torch", "torchrl", "tensordict", "lightning", "gymnasium", "mujoco")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: counters, package versions, and the replay files of each process."""

    folder: Path
    update: int
    step: int
    frames: int
    versions: dict[str, str]
    replay: tuple[tuple[ReplayChunk, ...], ...]

    @property
    def state(self) -> Path:
        """Lightning's file, with networks, optimizer, counters, callbacks and generators."""
        return self.folder / _STATE


def find_checkpoint(folder: str | Path) -> Checkpoint | None:
    """Finds the newest intact checkpoint in the folder ``checkpoints`` of a run.

    It warns of damaged checkpoints and changed package versions.

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
            checkpoint = _read(folder / name)
        except OSError as error:
            damaged.append(error)
            continue
        for damage in damaged:
            warnings.warn(f"skipping a damaged checkpoint: {damage}", stacklevel=2)
        _warn_of_changed_packages(checkpoint)
        return checkpoint
    if damaged:
        raise OSError(f"all checkpoints in {folder} are damaged; the newest: {damaged[0]}")
    return None


def _read(folder: Path) -> Checkpoint:
    """Reads a manifest and checks all files of the checkpoint before anything is loaded."""
    path = folder / _MANIFEST
    try:
        if path.stat().st_size > 2**24:  # an entry of a replay file takes about 200 bytes
            raise ValueError
        manifest = json.loads(path.read_bytes())
        checksum = manifest.pop("sha256")
        if manifest["format"] != _FORMAT or checksum != _digest(manifest):
            raise ValueError
        newer = manifest["version"] > _VERSION
        counters = {name: int(manifest[name]) for name in ("update", "step", "frames")}
        versions = dict(manifest["versions"])
        replay = () if newer else tuple(tuple(map(_chunk, one)) for one in manifest["replay"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise OSError(f"{path} is damaged") from None
    if newer:
        raise ValueError(f"{folder} was written by a newer alm_torchrl: update the package")
    checkpoint = Checkpoint(folder, versions=versions, replay=replay, **counters)
    _check_file(checkpoint.state, manifest.get("state_sha256"))
    for rank, chunks in enumerate(replay):
        for chunk in chunks:
            _check_file(_replay_folder(folder.parent, rank) / chunk.file, chunk.sha256)
    return checkpoint


def _chunk(entry: dict[str, Any]) -> ReplayChunk:
    """Reads and checks an entry of a manifest."""
    chunk = ReplayChunk(**entry)
    if not re.fullmatch(r"[\w-]+\.pt", chunk.file) or not 0 <= chunk.start < chunk.stop:
        raise ValueError
    return chunk


def _check_file(path: Path, checksum: str | None) -> None:
    """Raises unless a file has the checksum and is an uncompressed archive, like all of torch's."""
    if not path.is_file():
        raise OSError(f"{path} is missing")
    intact = sha256(path) == checksum
    try:
        with zipfile.ZipFile(path) as archive:
            intact &= all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.filelist)
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        intact = False
    if not intact:
        raise OSError(f"{path} is damaged")


def _warn_of_changed_packages(checkpoint: Checkpoint) -> None:
    pairs = {name: (checkpoint.versions.get(name), now) for name, now in _versions().items()}
    changed = [f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]
    if changed:
        warnings.warn(
            f"{checkpoint.folder} was written with other package versions, so the run may "
            f"continue differently: {', '.join(changed)}",
            stacklevel=3,
        )


class AfterUpdate(L.Callback):
    """Base of callbacks that act after each update and the evaluation that may follow it."""

    def after_update(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Acts between two updates."""
        raise NotImplementedError

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: ALMModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Acts unless an evaluation follows, because a run resumed from here would skip it."""
        every = trainer.val_check_batch
        if not (trainer.enable_validation and every and (batch_idx + 1) % every == 0):
            self.after_update(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Acts after an evaluation."""
        self.after_update(trainer, pl_module)


class Checkpoints(AfterUpdate):
    """Saves the newest checkpoints of a run, and restores the checkpoint ``start``.

    A checkpoint is a folder ``update-<n>`` with Lightning's state and a manifest of checksums and
    versions; the replay buffer is written incrementally to ``replay-<rank>`` next to it. A folder
    gets its final name after all its files are on disk, so a run can be killed at any time. All
    processes must see the folder. Use the callback through :func:`make_trainer`.

    It saves every ``every`` updates, and when training ends or is interrupted. A resumed run resets
    the environments, which truncates their episodes.
    """

    def __init__(
        self, folder: str | Path, *, every: int, keep: int = 2, start: Checkpoint | None = None
    ) -> None:
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self.start = start
        self.kept = [] if start is None else [start]
        self._generators: list[dict[str, Any]] = []
        self._restored: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: ALMModule, stage: str) -> None:
        """Restores the replay buffer."""
        if stage != "fit":
            return
        replay, rank = pl_module.experience.replay, trainer.global_rank
        self._replay = IncrementalReplay(replay, _replay_folder(self.folder, rank))
        if self.start is not None:
            self._replay.load(self.start.replay[rank])

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the random generators of all processes."""
        return {"generators": self._generators}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until training starts, because the setup uses random numbers."""
        self._restored = state_dict["generators"]

    @staticmethod
    def _generator_states(pl_module: ALMModule) -> dict[str, Any]:
        numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - environments may use it
        return {
            "python": random.getstate(),
            "numpy": json.dumps(numpy, default=np.ndarray.tolist),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "envs": list(map(random_states, (pl_module.experience.env, pl_module.eval_env))),
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: ALMModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lets a finished run continue if its number of steps has increased."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if progress["current"]["ready"] < len(pl_module.experience):
            progress["is_last_batch"] = False

    def on_train_start(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Restores the random generators."""
        if not self._restored:
            return
        state, self._restored = self._restored[trainer.global_rank], []
        random.setstate(state["python"])
        numpy = json.loads(state["numpy"])
        numpy["state"]["key"] = np.array(numpy["state"]["key"], dtype=np.uint32)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        with torch.random.fork_rng():  # the resets must not change the restored generators
            acting, evaluating = state["envs"]
            set_random_states(pl_module.experience.env, acting)
            try:
                set_random_states(pl_module.eval_env, evaluating)
            except ValueError:
                rank_zero_warn("the evaluation environments have changed, so they get new seeds")
                set_random_states(pl_module.eval_env, [])
            pl_module.experience.restart()

    def after_update(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Saves if a checkpoint is due."""
        experience = pl_module.experience
        ends = experience.stopping or experience.updates >= len(experience)
        if experience.updates and (ends or experience.updates % self.every == 0):
            pl_module.check()
            self.save(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: ALMModule, exception: BaseException
    ) -> None:
        """Saves if an environment failed; several processes cannot, because all must take part."""
        failed = isinstance(exception, EnvironmentFailedError) and pl_module.restored
        if failed and trainer.world_size == 1 and pl_module.experience.updates:
            self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: ALMModule) -> None:
        """Writes a checkpoint between two updates; if this fails, earlier checkpoints stay."""
        experience = pl_module.experience
        name = f"update-{experience.updates:010d}"
        if self.kept and self.kept[-1].folder.name == name:
            return
        replay = tuple(_gather(trainer, tuple(self._replay.save())))
        self._generators = _gather(trainer, self._generator_states(pl_module))
        counters = experience.updates, experience.steps, experience.frames
        checkpoint = Checkpoint(self.folder / name, *counters, _versions(), replay)
        self._write(trainer, checkpoint)
        self.kept = [*self.kept, checkpoint][-self.keep :]
        self._remove_others(trainer)

    def _write(self, trainer: L.Trainer, checkpoint: Checkpoint) -> None:
        """Writes the checkpoint's folder on rank 0; all processes must call it."""
        partial = checkpoint.folder.with_name(checkpoint.folder.name + ".partial")
        first = trainer.is_global_zero
        try:
            if first:
                _check_visible(checkpoint)
                _remove(partial)
                partial.mkdir(parents=True)
            trainer.save_checkpoint(partial / _STATE)
            if first:
                sync(partial / _STATE)
                with atomic_write(partial / _MANIFEST) as file:
                    file.write(_manifest(checkpoint, sha256(partial / _STATE)))
                _remove(checkpoint.folder)  # if damaged, or newer than the resumed checkpoint
                partial.rename(checkpoint.folder)
                sync(self.folder)
        except BaseException:
            if first:
                _remove(partial)
            raise
        trainer.strategy.barrier()

    def _remove_others(self, trainer: L.Trainer) -> None:
        """Removes all files that no kept checkpoint needs."""
        kept = {checkpoint.folder.name for checkpoint in self.kept}
        if trainer.is_global_zero:
            for found in self.folder.glob("update-*"):
                if found.name not in kept and _NAME.fullmatch(found.name.removesuffix(".partial")):
                    with contextlib.suppress(OSError):  # tried again after the next checkpoint
                        _remove(found)
        rank = trainer.global_rank
        self._replay.remove_all_but(chunk for one in self.kept for chunk in one.replay[rank])


class TensorFiles(TorchCheckpointIO):
    """Makes Lightning write and read its state through :mod:`alm_torchrl.files`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *_: Any, **__: Any) -> None:
        """Saves a file; raises if it cannot be loaded."""
        save_tensors(checkpoint, path)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Loads a file without running code from it."""
        return load_tensors(path)


def _check_visible(checkpoint: Checkpoint) -> None:
    """Raises if this process does not see the replay files of other processes."""
    for rank, chunks in enumerate(checkpoint.replay):
        folder = _replay_folder(checkpoint.folder.parent, rank)
        if any(not (folder / chunk.file).is_file() for chunk in chunks):
            raise OSError(
                f"the files of process {rank} are not visible in {folder}: choose a run.folder on "
                "a file system that all machines share"
            )


def _gather(trainer: L.Trainer, value: Any) -> list[Any]:
    """Returns the values of all processes in order of rank; all processes must call it."""
    values: list[Any] = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def _remove(folder: Path) -> None:
    """Removes a checkpoint; renames its folder if it contains other files."""
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
    rank_zero_warn(f"{folder} contains other files; it was renamed to {set_aside(folder)}")


def _replay_folder(checkpoints: Path, rank: int) -> Path:
    return checkpoints / f"replay-{rank}"


def _manifest(checkpoint: Checkpoint, state_sha256: str) -> bytes:
    entries = asdict(checkpoint) | {"state_sha256": state_sha256}
    del entries["folder"]
    manifest = {"format": _FORMAT, "version": _VERSION, **entries}
    return json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1).encode()


def _versions() -> dict[str, str]:
    versions = dict.fromkeys(_PACKAGES, "none")
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _digest(manifest: dict[str, Any]) -> str:
    """Returns a checksum of a manifest without its checksum."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

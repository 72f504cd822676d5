"""Which checkpoint a run resumes from, whatever happened to its files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from alm_torchrl.training import find_checkpoint, make_trainer
from tests.training import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(
        folder,
        seed=3,
        title="tiny",
        eval_every=12,
        checkpoint_every=5,
        accelerator="cpu",
        tensorboard=False,
    )
    trainer.progress_bar_callback.disable()
    trainer.fit(tiny.make_module(12))
    return folder


@pytest.fixture
def checkpoints(finished: Path, tmp_path: Path) -> Path:
    """The checkpoints of a run, of which two are kept."""
    return Path(shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints"))


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    """Changes a manifest and its checksum, as anybody could."""
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**manifest, "sha256": digest}))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("harm", [flip_a_bit, truncate, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", ["update-*/state.ckpt", "update-*/manifest.json", "replay-0/0*"])
def test_damaged_checkpoints_alone_raise(checkpoints: Path, what: str, harm) -> None:
    """The oldest replay chunk belongs to all checkpoints."""
    for path in sorted(checkpoints.glob(what))[: 1 if "replay" in what else None]:
        harm(path)
    with pytest.raises(OSError, match="all checkpoints in .*checkpoints are damaged; the newest: "):
        find_checkpoint(checkpoints)


def test_an_unreadable_folder_raises(checkpoints: Path, monkeypatch, tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    with pytest.raises(FileNotFoundError):
        find_checkpoint(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        find_checkpoint(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr("alm_torchrl.training.checkpoints.sha256", refuse)
        with pytest.raises(OSError, match="are damaged; the newest: .*denied"):
            find_checkpoint(checkpoints)
    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        find_checkpoint(checkpoints)


def refuse(path: Path) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["replay"][0][0].update(file="/etc/passwd"),
        lambda m: m["replay"][0][0].update(file="../update-0000000012/state.ckpt"),
        lambda m: m["replay"][0][0].update(file=".."),
        lambda m: m["replay"][0][0].update(file=7),
        lambda m: m["replay"][0][0].update(more=7),
        lambda m: m["replay"][0][0].update(start="7"),
        lambda m: m["replay"][0][0].update(start=10**12),
        lambda m: m.update(replay=7),
        lambda m: m.update(update="many"),
        lambda m: m.update(version=None),
        lambda m: m.pop("step"),
    ],
)
def test_a_manipulated_manifest_is_skipped(checkpoints: Path, change) -> None:
    rewrite(checkpoints / "update-0000000012/manifest.json", change)
    with pytest.warns(UserWarning, match="skipping a damaged checkpoint: .*12/") as one:
        assert find_checkpoint(checkpoints).update < 12
    assert len(one) == 1


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"", b"{}" + b" " * 2**25, b"\xff"])
def test_an_invalid_manifest_is_skipped(checkpoints: Path, content: bytes) -> None:
    (checkpoints / "update-0000000012/manifest.json").write_bytes(content)
    with pytest.warns(UserWarning, match="manifest.json is damaged"):
        assert find_checkpoint(checkpoints).update < 12


def test_a_compressed_file_is_skipped(checkpoints: Path) -> None:
    state = checkpoints / "update-0000000012/state.ckpt"
    with zipfile.ZipFile(state, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", bytes(2**24))
    checksum = hashlib.sha256(state.read_bytes()).hexdigest()
    rewrite(state.with_name("manifest.json"), lambda m: m.update(state_sha256=checksum))
    with pytest.warns(UserWarning, match="state.ckpt is damaged"):
        assert find_checkpoint(checkpoints).update < 12


def test_changed_packages_are_named_once(checkpoints: Path) -> None:
    path = checkpoints / "update-0000000012/manifest.json"
    rewrite(path, lambda m: m["versions"].update(mujoco="1.0", gymnasium="0.1"))
    with pytest.warns(UserWarning, match=r"gymnasium 0\.1 -> \S+, mujoco 1\.0 -> \S+$") as one:
        find_checkpoint(checkpoints)
    assert len(one) == 1

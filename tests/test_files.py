"""Atomic writes, safe loading, and names that are taken."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alm_torchrl import files
from alm_torchrl.files import atomic_write, load_tensors, save_tensors, set_aside


def test_a_partial_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "note.txt.partial").symlink_to("precious.txt")
    with atomic_write(tmp_path / "note.txt") as file:
        file.write(b"whole")
    assert (tmp_path / "precious.txt").read_text() == "mine"
    assert (tmp_path / "note.txt").read_text() == "whole"
    assert not (tmp_path / "note.txt").is_symlink()


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("before")
    with pytest.raises(TypeError), atomic_write(tmp_path / "note.txt") as file:
        file.write("half")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    assert (tmp_path / "note.txt").read_text() == "before"


def test_set_aside_chooses_a_free_name(tmp_path: Path) -> None:
    (tmp_path / "x.kept").symlink_to("nowhere")
    for name in ("x.2.kept", "x.3.kept"):
        (tmp_path / "x").write_text(name)
        assert set_aside(tmp_path / "x") == tmp_path / name
    assert (tmp_path / "x.2.kept").read_text() == "x.2.kept"


def zipped(path: Path) -> None:
    """Compresses the file, with 10 MB of zeros."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, bytes(10**7) if name.endswith("data/0") else content)


def claim(path: Path) -> None:
    """Claims a larger storage than the file has."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            changed = content.replace(b"M\xe8\x03tq", b"\x8a\x06\x00\x10\xa5\xd4\xe8\x00tq")
            assert changed != content or not name.endswith("data.pkl")
            archive.writestr(name, changed)


def expand(path: Path) -> None:
    torch.save({"weight": torch.zeros(1).expand(10**12)}, path)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def execute(path: Path) -> None:
    torch.save({"weight": Payload()}, path)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (zipped, "it is compressed"),
        (claim, "record size .4000 bytes. does not match|a tensor claims 4,000,000,000,000"),
        (expand, "a tensor claims 4,000,000,000,000 bytes, and the file has"),
        (execute, "damaged or was not written by alm_torchrl: Unsupported global: GLOBAL getattr"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_hostile_file_is_refused_before_it_takes_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "agent.pt"
    save_tensors({"weight": torch.zeros(1000)}, path)
    assert torch.equal(load_tensors(path)["weight"], torch.zeros(1000))
    harm(path)
    with pytest.raises(ValueError, match=says) as raised:
        load_tensors(path)
    assert "\n" not in str(raised.value)
    assert not Path("touched").exists()


def test_repeated_values_are_checked_once(tmp_path: Path) -> None:
    laughs = ["ha"]
    for _ in range(60):
        laughs = [laughs, laughs]
    torch.save(laughs, tmp_path / "x.pt")
    assert load_tensors(tmp_path / "x.pt")


def test_files_are_written_where_folders_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where ``os.open`` of a folder fails, and ``os.fsync`` of a read-only file."""

    def refuse(path: object, *_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "os", SimpleNamespace(**vars(os) | {"name": "nt", "open": refuse}))
    with atomic_write(tmp_path / "note.txt") as file:
        file.write(b"whole")
    assert (tmp_path / "note.txt").read_text() == "whole"
    save_tensors({"weight": torch.zeros(3)}, tmp_path / "agent.pt")
    assert torch.equal(load_tensors(tmp_path / "agent.pt")["weight"], torch.zeros(3))
    files.sync(tmp_path / "agent.pt")

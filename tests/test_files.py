"""Files that are whole or not there, and what lies in their way."""

from __future__ import annotations

from pathlib import Path

import pytest

from alm_torchrl.files import replacing, set_aside


def test_a_partial_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "note.txt.partial").symlink_to("precious.txt")
    with replacing(tmp_path / "note.txt") as file:
        file.write(b"whole")
    assert (tmp_path / "precious.txt").read_text() == "mine"
    assert (tmp_path / "note.txt").read_text() == "whole"
    assert not (tmp_path / "note.txt").is_symlink()


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("before")
    with pytest.raises(TypeError), replacing(tmp_path / "note.txt") as file:
        file.write("half")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    assert (tmp_path / "note.txt").read_text() == "before"


def test_what_is_set_aside_never_takes_a_name_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "x.kept").symlink_to("nowhere")
    for name in ("x.2.kept", "x.3.kept"):
        (tmp_path / "x").write_text(name)
        assert set_aside(tmp_path / "x") == tmp_path / name
    assert (tmp_path / "x.2.kept").read_text() == "x.2.kept"

"""The length limits of files and functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import check_lengths


@pytest.mark.parametrize(
    ("name", "lines", "reported"),
    [
        ("src/a.py", 500, []),
        ("src/a.py", 501, ["src/a.py: 501 lines (limit 500)"]),
        ("recipes/a.py", 151, ["recipes/a.py: 151 lines (limit 150)"]),
    ],
)
def test_a_long_file_is_reported(tmp_path: Path, name: str, lines: int, reported: list) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text("x = 1\n" * lines)
    assert list(check_lengths.check_file(path, tmp_path)) == reported


def test_the_project_is_within_its_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_lengths.main() == 0, capsys.readouterr().out


def test_the_length_of_a_function_excludes_its_docstring(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    docstring = '    """' + "long\n" * 30 + '    """\n'
    path.write_text("def f():\n" + docstring + "    x = 1\n" * 59)
    assert list(check_lengths.check_file(path, tmp_path)) == []
    path.write_text("def f():\n" + docstring + "    x = 1\n" * 60)
    assert list(check_lengths.check_file(path, tmp_path)) == ["a.py:1: f has 61 lines (limit 60)"]

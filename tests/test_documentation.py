"""The Python examples of the README and the documentation run.

The ```python blocks of a page run in order, in one namespace and an empty folder, with shortened
loops. `<!-- not run -->` on the line above a block excludes it.
"""

from pathlib import Path

import pytest

from tools.examples import program

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
         if page.is_file() and program(page)]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(program(page), str(page), "exec"), {"__name__": "example"})

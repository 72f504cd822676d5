"""The Python examples of the README, the documentation and the notebooks run.

The ```python blocks of a page, or the cells of a notebook, run in order, in one namespace and an
empty folder, with shortened loops. `<!-- not run -->` on the line above a block excludes it.
"""

from pathlib import Path

import pytest

from tools.examples import program

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("notebooks/*.ipynb")),
]
PAGES = [page for page in FILES if page.is_file() and program(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(program(page), str(page), "exec"), {"__name__": "example"})

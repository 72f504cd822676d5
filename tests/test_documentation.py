"""The Python examples of the README and the documentation run as they stand.

The ```python blocks of a page are run in order, in one namespace and an empty folder, with the
steps of a loop cut to a few. A block that is no program is left out by `<!-- not run -->` on the
line above it.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^(<!-- not run -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORTER = {
    r"total_frames=[\d_]+": "total_frames=20",
    r"init_random_frames=[\d_]+": "init_random_frames=16",
    r"rollout\([\d_]+": "rollout(20",
    r"if step < [\d_]+": "if step < 16",
}


def program(page: Path) -> str:
    """The page's examples as one program, each line at its own line number."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * len(text.splitlines())
    for match in BLOCK.finditer(text):
        if not match[1]:
            first = text[: match.start(2)].count("\n")
            code = match[2]
            for long, short in SHORTER.items():
                code = re.sub(long, short, code)
            lines[first : first + code.count("\n")] = code.splitlines()
    return "\n".join(lines).rstrip()


PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
         if page.is_file() and program(page)]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(program(page), str(page), "exec"), {"__name__": "example"})

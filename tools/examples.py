"""Extracts the Python examples of a page or a notebook, which the tests run."""

from __future__ import annotations

import json
import re
from pathlib import Path

BLOCK = re.compile(r"^(<!-- not run -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Replacements that shorten loops in the tests.
SHORTER = {
    r"total_frames=[\d_]+": "total_frames=20",
    r"init_random_frames=[\d_]+": "init_random_frames=16",
    r"rollout\([\d_]+": "rollout(20",
    r"if step < [\d_]+": "if step < 16",
}


def program(page: Path) -> str:
    """Returns the page's examples as one program with the line numbers of the page."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        code = "\n".join("".join(cell["source"]) for cell in cells)
        return _shorten(re.sub(r"^%.*$", "", code, flags=re.MULTILINE))  # without "%pip install"
    lines = [""] * len(text.splitlines())
    for match in BLOCK.finditer(text):
        if not match[1]:
            first = text[: match.start(2)].count("\n")
            code = _shorten(match[2])
            lines[first : first + code.count("\n")] = code.splitlines()
    return "\n".join(lines).rstrip()


def _shorten(code: str) -> str:
    for long, short in SHORTER.items():
        code = re.sub(long, short, code)
    return code

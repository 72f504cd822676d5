"""Fails when a file or function is longer than the limits below: ``python tools/check_lengths.py``.

The length of a function excludes its docstring; the length of a file includes everything.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src", "recipes", "experiments", "benchmarks", "tools")
FUNCTION_LINES = 60
FILE_LINES = 500
RECIPE_LINES = 150
FILE_LIMITS = {
    "recipes/custom_loop.py": 100,  # the example to copy
}


def _num_lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def check_file(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Yields one message for a file that is too long, and one for each function in it."""
    name = path.relative_to(root).as_posix()
    text = path.read_text(encoding="utf-8")
    limit = FILE_LIMITS.get(name, RECIPE_LINES if name.startswith("recipes/") else FILE_LINES)
    lines = len(text.splitlines())
    if lines > limit:
        yield f"{name}: {lines} lines (limit {limit})"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = _num_lines(node)
            if ast.get_docstring(node) is not None:
                lines -= _num_lines(node.body[0])
            if lines > FUNCTION_LINES:
                where = f"{name}:{node.lineno}: {node.name}"
                yield f"{where} has {lines} lines (limit {FUNCTION_LINES})"


def main() -> int:
    """Prints every violation and returns the exit status."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    messages = [message for path in files for message in check_file(path)]
    print("\n".join(messages) or "All files and functions are within their limits.")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())

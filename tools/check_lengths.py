"""Fail when a function of the package or a recipe is longer than the house rules allow.

A function is counted from its `def` line to its last line, without its docstring (60 at most), so
that nobody saves on documentation; a recipe by all its lines (150 at most). Run it with
`python tools/check_lengths.py`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FUNCTION_LINES = 60
RECIPE_LINES = 150


def _span(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def long_functions(path: Path) -> Iterator[str]:
    """Yield one message for each function in `path` over the limit."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = _span(node)
            if ast.get_docstring(node) is not None:
                lines -= _span(node.body[0])
            if lines > FUNCTION_LINES:
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                yield f"{where}: {node.name} has {lines} lines (limit {FUNCTION_LINES})"


def main() -> int:
    """Print every violation; return the exit status."""
    messages = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        messages.extend(long_functions(path))
    for path in sorted((ROOT / "recipes").glob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > RECIPE_LINES:
            messages.append(f"{path.relative_to(ROOT)}: {lines} lines (limit {RECIPE_LINES})")
    print("\n".join(messages) or "Every function and recipe is within its limit.")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())

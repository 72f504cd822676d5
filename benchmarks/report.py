"""Output of a suite: a table, a JSON file and a plot."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.measure import Case, ratios
from benchmarks.suites import Suite


def table(suite: Suite) -> str:
    """Formats the cases with times, ratios and, if known, floating point rates."""
    reference = next(case for case in suite.cases if case.name == suite.reference)
    peaks = {c.name.split()[-1]: c.flops / c.median for c in suite.cases if c.name[:5] == "peak:"}
    width = max(len(case.name) for case in suite.cases)
    head = f"{'case':{width}}  {'ms':>9}  {'quartiles':>19}  {'x faster':>18}  GFLOP/s  of peak"
    lines = [suite.note, head] if suite.note else [head]
    for case in suite.cases:
        low, high = (1e3 * value for value in case.spread)
        slow, middle, fast = ratios(case, reference)
        line = (
            f"{case.name:{width}}  {1e3 * case.median:9.3f}  {low:9.3f}-{high:9.3f}  "
            f"{middle:6.2f} ({slow:.2f}-{fast:.2f})"
        )
        if case.frames:
            line += f"  {case.frames / case.median:11,.0f} frames/s"
        if case.flops:
            rate = case.flops / case.median
            line += f"  {rate / 1e9:7.0f}"
            peak = peaks.get("bfloat16" if "bf16" in case.name else "float32")
            if peak and not case.name.startswith("peak:"):
                line += f"  {rate / peak:6.0%}"
        lines.append(line)
    lines += [_shares(suite, whole) for whole in suite.parts]
    return "\n".join(lines)


def _shares(suite: Suite, whole: str) -> str:
    """Formats the share of each part of a step, by medians."""
    names = suite.parts[whole]
    parts = {case.name: case.median for case in suite.cases if case.name in names}
    total = sum(parts.values())
    shares = ", ".join(
        f"{name.removeprefix(f'{whole}: ')} {seconds / total:.0%}"
        for name, seconds in parts.items()
    )
    return f"of {whole} ({1e3 * total:.1f} ms, {1 / total:.0f} a second): {shares}"


def record(suite: Suite) -> dict[str, object]:
    """Returns the raw measurements."""
    return {
        "note": suite.note,
        "reference": suite.reference,
        "cases": [_record(case) for case in suite.cases],
    }


def _record(case: Case) -> dict[str, object]:
    return {
        "name": case.name,
        "flops": case.flops,
        "frames": case.frames,
        "first_call_seconds": case.first,
        "seconds": case.seconds,
    }


def write(folder: Path, name: str, suite: Suite, facts: dict[str, object]) -> None:
    """Writes ``NAME.json`` and ``NAME.png`` into the folder."""
    write_record(folder, name, record(suite), facts)

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(suite.cases) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.boxplot(
        [[1e3 * value for value in case.seconds] for case in suite.cases],
        orientation="horizontal",
        tick_labels=[case.name for case in suite.cases],
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds of one call")
    axes.set_title(name)
    figure.savefig(folder / f"{name}.png", dpi=120)


def write_record(
    folder: Path, name: str, content: dict[str, object], facts: dict[str, object]
) -> None:
    """Writes ``NAME.json`` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": facts, **content}, indent=1)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")

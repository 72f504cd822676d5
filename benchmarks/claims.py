"""The table of the paper's three claims about speed, from kept measurements and curves."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import suites
from benchmarks.measure import Case, ratios
from experiments.report import table
from experiments.summary import TimedRun, first_reaching, read, timed_runs

ROOT = Path(__file__).resolve().parents[1]
#: Returns whose time is compared between `fast` and SAC.
RETURNS = (3000, 4000, 5000)
#: Updates of SAC per environment step in the authors' settings of MBPO, by task of the same sizes.
MBPO_UPDATES = {"halfcheetah": {"HalfCheetah": 40, "Walker2d": 20}, "humanoid": {"Humanoid": 20}}
SAYS_MBPO, SAYS_REDQ = "ALM is 10 times faster than MBPO", "ALM is 6 times faster than REDQ"
SAYS_SAC = "ALM reaches SAC's return in half of the time"


def claims(records: Path, results: Path, task: str, device: str) -> str:
    """Formats the claims and what was measured.

    Args:
        records: folder with the records of the suites ``peers`` and ``epochs``.
        results: folder with the kept curves.
        task: task of the records and curves.
        device: type of the device of the records.

    Returns:
        Markdown: the claims, the parts of MBPO's step, and the minutes to given returns. The
        minutes are left out until timed runs of ``fast`` and ``sac`` on one machine reach them.

    Raises:
        FileNotFoundError: if a record is missing.
    """
    peers, epochs = (
        _load(records / f"{name}-{task}-{device}.json") for name in ("peers", "epochs")
    )
    samples = {case["name"]: case["seconds"] for case in peers["cases"]}
    cases = {name: Case(name, lambda: None, seconds=each) for name, each in samples.items()}
    counts = {int(key): median(count["further"]) for key, count in epochs["epochs"].items()}
    machine = f"{peers['machine']['device']}, {peers['machine']['threads']} threads"
    steps = list(_mbpo_steps(cases, counts, task))
    rows = [
        [SAYS_MBPO, f"{name}, {size:,} transitions", *_speedups(whole, cases)]
        for name, size, _, whole in steps
    ]
    redq = (suites.REDQ_PUBLISHED, suites.REDQ_DEFAULT)
    rows += [[SAYS_REDQ, name, *_speedups(cases[name], cases)] for name in redq]
    header = ["the paper", f"compared with ({machine})", "widths 256", "ALM's paper sizes"]
    lines = list(table(header, rows))
    header = ["MBPO", "transitions", "epochs", "model, ms", "imagining, ms", "SAC, ms", "step, ms"]
    lines += table(
        header,
        [
            [name, f"{size:,}", f"{counts[size]:g}", *(f"{1e3 * part:.1f}" for part in parts)]
            for name, size, parts, _ in steps
        ],
    )
    return "\n".join([*lines, *_minutes(results, task)])


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        name = path.stem.split("-")[0]
        raise FileNotFoundError(
            f"{path} is missing; write it with `python -m benchmarks {name} --out {path.parent}`"
        )
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _mbpo_steps(
    cases: dict[str, Case], counts: dict[int, float], task: str
) -> Iterator[tuple[str, int, list[float], Case]]:
    """Yields name, replay size, seconds of the parts and of the whole, and samples of the whole."""
    every = suites.MBPO_SIZES[task].every
    sac, imagine = cases[suites.SAC].seconds, cases[suites.MBPO_IMAGINE].seconds
    for name, updates in MBPO_UPDATES[task].items():
        title = f"MBPO, {updates} updates of SAC a step ({name})"
        for size, count in counts.items():
            epoch = cases[suites.mbpo_epoch(size)].seconds
            parts = [
                [count * seconds / every for seconds in epoch],
                [seconds / every for seconds in imagine],
                [updates * seconds for seconds in sac],
            ]
            whole = [sum(samples) for samples in zip(*parts, strict=True)]
            medians = [median(samples) for samples in (*parts, whole)]
            yield title, size, medians, Case(title, lambda: None, seconds=whole)


def _speedups(peer: Case, cases: dict[str, Case]) -> Iterator[str]:
    """Yields how many times faster ALM's step is: with widths and batch 256, then as published."""
    for name in (suites.ALM_SMALL, suites.ALM_PAPER):
        if name in cases:
            low, middle, high = ratios(cases[name], peer)
            yield f"{middle:.1f} ({low:.1f} to {high:.1f})"
        else:
            yield ""


def _minutes(results: Path, task: str) -> Iterator[str]:
    """Yields a table of the minutes to given returns, for machines that trained both."""
    machines: dict[str, dict[str, list[TimedRun]]] = defaultdict(lambda: defaultdict(list))
    for run in timed_runs(task, *read(results)):
        if run.label in ("fast", "sac"):
            machines[run.machine][run.label].append(run)
    rows = []
    for machine, runs in machines.items():
        for wanted in RETURNS if len(runs) == 2 else ():
            fast, sac = (_reached(runs[label], wanted) for label in ("fast", "sac"))
            if fast and sac:
                cells = [f"{wanted:,}", _cell(fast, runs["fast"]), _cell(sac, runs["sac"])]
                rows.append([SAYS_SAC, *cells, f"{median(fast) / median(sac):.2f}", machine])
    if rows:
        header = ["the paper", "return", "`fast`, minutes", "SAC, minutes", "share", "machine"]
        yield from table(header, rows)


def _reached(runs: list[TimedRun], wanted: float) -> list[float]:
    """Returns the minutes until the return was first reached, of the runs that reached it."""
    rows = (first_reaching(run.rows, wanted) for run in runs)
    return [row["seconds"] / 60 for row in rows if row is not None]


def _cell(minutes: list[float], runs: list[TimedRun]) -> str:
    return f"{median(minutes):.1f} ({len(minutes)} of {len(runs)} seeds)"

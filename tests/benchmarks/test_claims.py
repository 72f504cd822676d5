"""The table of the paper's claims has the arithmetic of the records, and only measured minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import suites
from benchmarks.claims import claims

MACHINE = {"device": "CPU", "threads": 2}
SECONDS = {
    suites.SAC: [0.010, 0.012, 0.014],
    suites.REDQ_DEFAULT: [0.6, 0.6, 0.6],
    suites.REDQ_PUBLISHED: [0.4, 0.4, 0.4],
    suites.mbpo_epoch(5000): [0.5, 0.5, 0.5],
    suites.mbpo_epoch(20_000): [2.0, 2.0, 2.0],
    suites.MBPO_IMAGINE: [1.0, 1.0, 1.0],
    suites.ALM_SMALL: [0.05, 0.05, 0.05],
    suites.ALM_PAPER: [0.2, 0.2, 0.2],
}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of records and of curves, without curves."""
    records, results = tmp_path / "records", tmp_path / "results"
    records.mkdir()
    results.mkdir()
    cases = [{"name": name, "seconds": seconds} for name, seconds in SECONDS.items()]
    write(records / "peers-halfcheetah-cpu.json", {"machine": MACHINE, "cases": cases})
    counts = {"5000": {"first": 40, "further": [9, 10, 20]}}
    counts["20000"] = {"first": 30, "further": [8, 7, 9]}
    write(records / "epochs-halfcheetah-cpu.json", {"machine": MACHINE, "epochs": counts})
    write(results / "runs.json", {})
    return records, results


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def curve(results: Path, what: str, seed: int, machine: str, timed: bool, minutes: float) -> None:
    """Writes a curve that gains 1,000 every ``minutes``, up to 4,000."""
    name = f"halfcheetah-{what}-seed{seed}.csv"
    lines = ["step,seed,return,return_std,frames,seconds"]
    lines += [f"{n},{seed},{1000 * n},0,{n},{60 * minutes * n}" for n in range(1, 5)]
    (results / name).write_text("\n".join(lines) + "\n")
    runs = json.loads((results / "runs.json").read_text())
    runs[name] = {"task": "halfcheetah", "what": what, "machine": machine, "timed": timed}
    write(results / "runs.json", runs)


def rows(text: str, start: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_parts_of_a_step_of_mbpo_add_up(folders) -> None:
    text = claims(*folders, "halfcheetah", "cpu")
    # 10 epochs of 0.5 s and imagining for 1 s every 250 steps: 20 and 4 ms.
    first = ["5,000", "10", "20.0", "4.0"]
    assert [row[1:] for row in rows(text, "MBPO, 40")] == [
        [*first, "480.0", "504.0"],
        ["20,000", "8", "64.0", "4.0", "480.0", "548.0"],
    ]
    assert rows(text, "MBPO, 20")[0][1:] == [*first, "240.0", "264.0"]


def test_ratios_are_those_of_the_samples(folders) -> None:
    text = claims(*folders, "halfcheetah", "cpu")
    mbpo = rows(text, "ALM is 10 times faster than MBPO")
    assert len(mbpo) == 4
    assert mbpo[0][1:] == [
        "MBPO, 40 updates of SAC a step (HalfCheetah), 5,000 transitions",
        "10.1 (9.3 to 10.9)",
        "2.5 (2.3 to 2.7)",
    ]
    redq = rows(text, "ALM is 6 times faster than REDQ")
    assert [row[2:] for row in redq] == [
        ["8.0 (8.0 to 8.0)", "2.0 (2.0 to 2.0)"],
        ["12.0 (12.0 to 12.0)", "3.0 (3.0 to 3.0)"],
    ]
    assert "CPU, 2 threads" in text


def test_minutes_are_left_out_until_one_machine_trained_both(folders) -> None:
    _, results = folders
    curve(results, "fast", 0, "A", True, 1.0)
    curve(results, "sac", 0, "B", True, 2.0)
    curve(results, "sac", 1, "A", False, 2.0)
    assert not rows(claims(*folders, "halfcheetah", "cpu"), "ALM reaches")
    curve(results, "sac", 2, "A", True, 2.0)
    curve(results, "sac", 3, "A", True, 3.0)
    found = rows(claims(*folders, "halfcheetah", "cpu"), "ALM reaches")
    assert [row[1:] for row in found] == [  # nobody reaches 5,000
        ["3,000", "3.0 (1 of 1 seeds)", "7.5 (2 of 2 seeds)", "0.40", "A"],
        ["4,000", "4.0 (1 of 1 seeds)", "10.0 (2 of 2 seeds)", "0.40", "A"],
    ]


def test_a_missing_record_is_named_with_its_command(folders) -> None:
    records, results = folders
    (records / "epochs-halfcheetah-cpu.json").unlink()
    with pytest.raises(FileNotFoundError, match="python -m benchmarks epochs --out"):
        claims(records, results, "halfcheetah", "cpu")

"""Arithmetic and tables of the results page, and the page of the kept curves."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import report
from experiments.summary import (
    AUTHORS,
    Point,
    read_published,
    sample_deviation,
    summarize_seeds,
    warmup_frames,
)

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"


def rows(returns: dict[int, float], warmup: int = 5_000) -> list[dict[str, float]]:
    """A curve with the given returns by frames; a frame takes 0.06 seconds."""
    return [
        {"step": frames - warmup, "return": value, "frames": frames, "seconds": 0.06 * frames}
        for frames, value in returns.items()
    ]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Kept curves of two seeds of SAC on HalfCheetah, the first one timed."""
    runs = {}
    for seed in (0, 4):
        name = f"halfcheetah-sac-seed{seed}.csv"
        curve = rows({10_000: 1_000.0 + seed, 20_000: 4_000.0 + seed})
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["seed", *curve[0]])
            writer.writeheader()
            writer.writerows({"seed": seed, **row} for row in curve)
        runs[name] = {
            "task": "halfcheetah",
            "what": "sac",
            "command": f"python experiments/sac.py --seed {seed}",
            "commit": "abc1234",
            "machine": "a laptop, 2 threads",
            "timed": seed == 0,
        }
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    (tmp_path / "authors.csv").write_text("task,step,mean,std\nhalfcheetah,15000,3000,400\n")
    (tmp_path / "anchors.csv").write_text(
        "method,task,frames,mean,std,seeds,interpolated,source\n"
        "MBPO,halfcheetah,10000,1769,432,5,yes,a/b@c\n"
        "DHMBPO,walker2d,10000,374,295,8,no,a/b@c\n"
    )
    return tmp_path


def test_the_sample_deviation_is_that_of_numpy() -> None:
    values = np.array([989.0, 3_755.0, 12.0, 400.0, 5_207.0])
    converted = sample_deviation(float(values.std()), 5)
    assert converted == pytest.approx(values.std(ddof=1))
    assert converted > values.std()


def test_seeds_are_summarized_by_frames() -> None:
    long = rows({6_000: 1.0, 7_000: 10.0, 8_000: 5.0})
    curves = {0: long, 1: rows({6_000: 2.0, 7_000: 20.0}), 2: rows({6_000: 9.0})}
    first, second = summarize_seeds(curves)  # one seed of three reaches 8,000 frames
    assert first[:3] == (6_000, 3, 4.0)
    assert first.std == pytest.approx(np.std([1.0, 2.0, 9.0], ddof=1))
    assert first.iqm == pytest.approx((1 + 4 * 2 + 9) / 6)
    assert second[:3] == (7_000, 2, 15.0)
    assert second.std == pytest.approx(50**0.5)
    assert np.isnan(second.iqm)
    (one,) = summarize_seeds({0: rows({6_000: 1.0})})
    assert one[:3] == (6_000, 1, 1.0)
    assert np.isnan(one.std)


def test_seeds_with_other_warmups_meet_at_the_same_frames() -> None:
    short, long = rows({8_000: 1.0}, warmup=2_000), rows({8_000: 3.0})
    assert (short[0]["step"], long[0]["step"]) == (6_000, 3_000)
    (point,) = summarize_seeds({0: short, 1: long})
    assert point[:3] == (8_000, 2, 2.0)
    assert warmup_frames({0: short}) == 2_000


def test_the_authors_scores_get_frames_and_sample_deviations(results: Path) -> None:
    published = read_published(results)
    (point,) = published["halfcheetah"][AUTHORS]
    assert point[:3] == (20_000, 5, 3_000.0)
    assert point.std == pytest.approx(400 * (5 / 4) ** 0.5)
    assert list(published["halfcheetah"]) == [AUTHORS, "MBPO"]
    (anchor,) = published["walker2d"]["DHMBPO"]
    assert anchor[:4] == (10_000, 8, 374.0, 295.0)  # these are sample deviations already


def test_cells_show_what_is_known() -> None:
    nan = float("nan")
    assert report.cell(None) == ""
    assert report.cell(Point(1, 1, 1_234.4, nan)) == "1,234 (n=1)"
    assert report.cell(Point(1, 2, -5.0, 2.0)) == "-5 +- 2 (n=2)"
    assert report.cell(Point(1, 3, 7.0, 2.0, 6.0)) == "7 +- 2, IQM 6 (n=3)"
    assert report.cell(Point(1, 8, 7.0, 2.0, interpolated=True)) == "~7 +- 2 (n=8)"


def test_the_page_shows_returns_frames_minutes_and_commands(results: Path) -> None:
    page = report.page(results, results)
    lines = page.splitlines()
    assert "|  | warm-up | 10,000 (5,000) | 20,000 (15,000) |" in lines
    assert "| `sac` | 5,000 | 1,002 +- 3 (n=2) | 4,002 +- 3 (n=2) |" in lines
    assert f"| {AUTHORS} |  |  | 3,000 +- 447 (n=5) |" in lines
    assert "| MBPO |  | ~1,769 +- 432 (n=5) |  |" in lines
    reached = ["10,000, 10.0 min", *["20,000, 20.0 min"] * 3]
    assert f"| `sac` | {' | '.join(reached)} |  |  |  |" in lines
    assert "- `halfcheetah`, preset `paper`: no run" in lines
    assert (
        "| `halfcheetah-sac-seed4.csv` | 20,000 | 15,000 | 20 * "
        "| `python experiments/sac.py --seed 4` | abc1234 | a laptop, 2 threads |" in lines
    )


def test_the_figure_names_methods_and_machines_and_repeats_itself(results: Path) -> None:
    report.page(results, results)
    figure = results / "results-halfcheetah.svg"
    first = figure.read_bytes()
    text = first.decode()
    for word in ("MBPO", AUTHORS, "sac, n=2", "sac (a laptop, 2 threads)", "minutes", "frames"):
        assert word in text
    report.page(results, results)
    assert figure.read_bytes() == first


def test_the_page_in_the_documentation_is_that_of_the_kept_curves(tmp_path: Path) -> None:
    page = report.page(RESULTS, tmp_path)
    assert (ROOT / "docs/results.md").read_text(encoding="utf-8") == page
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in (ROOT / "docs/_static").glob("results-*.svg")}


def test_every_kept_curve_is_on_the_page() -> None:
    runs = json.loads((RESULTS / "runs.json").read_text())
    curves = {path.name for path in RESULTS.glob("*seed*.csv")}
    assert curves - set(runs) == {"halfcheetah-quickstart-tau0.005-seed0.csv"}  # an older preset
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for name, run in runs.items():
        assert f"| `{name}` |" in page
        assert f"| `{run['command']}` | {run['commit']} | {run['machine']} |" in page


def test_every_source_of_published_results_is_named_with_its_license() -> None:
    with (RESULTS / "anchors.csv").open(newline="") as file:
        sources = {row["source"] for row in csv.DictReader(file)}
    readme = (RESULTS / "README.md").read_text(encoding="utf-8")
    for source in sources:
        assert re.search(rf"^\| `{re.escape(source)}` \| (MIT|Apache-2.0) \|", readme, re.MULTILINE)

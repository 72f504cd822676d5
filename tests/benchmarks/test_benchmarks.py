"""The benchmarks run, count and report what they say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from mmap import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__, long, scale, suites
from benchmarks.mbpo import MBPOSizes
from benchmarks.measure import Case, alternate, ratios
from benchmarks.report import table, write
from benchmarks.suites import SUITES, Suite
from benchmarks.workloads import TASKS, ALMWork, Sizes, flops

TINY = Sizes(batch=4, hidden=8, dynamics=8)
MBPO_TINY = {"halfcheetah": MBPOSizes(members=3, elites=2, width=8, batch=8, every=10, starts=20)}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(suites, "QUICKSTART", TINY)
    monkeypatch.setattr(long, "QUICKSTART", TINY)
    monkeypatch.setattr(suites, "REDQ_UPDATES_PER_STEP", 2)
    monkeypatch.setattr(suites, "MBPO_TRANSITIONS", (60, 80))
    monkeypatch.setattr(__main__, "MBPO_TRANSITIONS", (60, 80))
    monkeypatch.setattr(suites, "MBPO_SIZES", MBPO_TINY)
    monkeypatch.setattr(__main__, "MBPO_SIZES", MBPO_TINY)
    monkeypatch.setattr(suites, "NUM_ENVS", (1, 8))
    monkeypatch.setattr(suites, "FRAMES", 128)
    scales = {"pendulums": (1, 8), "environments": (1, 2), "seeds": (1, 2), "transitions": (9, 90)}
    monkeypatch.setattr(suites, "SCALES", scales)
    monkeypatch.setattr(suites, "WORKERS", {})
    monkeypatch.setattr(suites, "WORKER_FRAMES", 16)
    monkeypatch.setattr(scale, "CAPACITY", 64)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    __main__.main()


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_every_suite_prints_a_table_and_leaves_its_samples(monkeypatch, tmp_path, capsys) -> None:
    suites_here = [name for name in SUITES if sys.platform == "linux" or name != "scale_disk"]
    command(monkeypatch, *suites_here, "--short", "--device", "cpu", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    for name in suites_here:
        content = json.loads((tmp_path / f"{name}-halfcheetah-cpu.json").read_text())
        assert (tmp_path / f"{name}-halfcheetah-cpu.png").stat().st_size > 0
        assert content["machine"]["torch"] == torch.__version__
        assert content["reference"] in [case["name"] for case in content["cases"]]
        for case in content["cases"]:
            assert case["name"] in printed
            assert len(case["seconds"]) == 3
            assert min(case["seconds"]) > 0
    assert "of a whole step (" in printed
    if find_spec("stable_baselines3") is None:
        assert "pip install 'alm-torchrl[bench]'" in printed
    else:
        assert "SAC of Stable-Baselines3" in printed


def test_claims_are_made_from_the_records(monkeypatch, tmp_path, capsys) -> None:
    suites_ = ("peers", "epochs", "claims")
    command(monkeypatch, *suites_, "--short", "--device", "cpu", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert "| ALM is 10 times faster than MBPO | MBPO, 40 updates of SAC a step" in printed
    assert "| MBPO, 20 updates of SAC a step (Walker2d) | 60 |" in printed
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "epochs-halfcheetah-cpu.json", "peers-halfcheetah-cpu.json"
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="MBPO learns from vectors"):
        command(monkeypatch, "claims", "--task", "pixels", "--device", "cpu")


def test_every_number_of_environments_has_the_same_frames() -> None:
    suite = SUITES["environments"]("halfcheetah", torch.device("cpu"), True)
    cases = {case.name: case for case in suite.cases}
    assert list(cases)[:2] == ["collect, 1 environment", "collect, 8 environments"]
    assert cases["collect, 1 environment"].work().shape == (1, 128)
    assert cases["collect, 8 environments"].work().shape == (8, 16)
    for count in ("1 environment", "8 environments"):
        windows = cases[f"draw, {count}"].work()
        assert windows.shape == (TINY.batch, TINY.horizon)
        assert windows["validity_mask"][:, 0].all()
        cases[f"write, {count}"].work()
    alternate(suite.cases, 2)
    collect = cases["collect, 8 environments"]
    assert f"{128 / collect.median:,.0f} frames/s" in table(suite)


@pytest.mark.parametrize("kind", ["pendulums", "environments", "seeds", "transitions"])
def test_a_training_step_scales(kind) -> None:
    device = torch.device("cpu")
    for count in (1, 8) if kind != "transitions" else (12, 120):
        step = scale.training_step(kind, count, TASKS["halfcheetah"], device, TINY)
        envs, seeds = {"transitions": (1, 1), "seeds": (count, count)}.get(kind, (count, 1))
        assert len(step.replay) == step.replay.max_steps * envs  # full
        assert step.replay.max_steps == (count if kind == "transitions" else 64 // envs * seeds)
        for part in scale.PARTS * 2:
            getattr(step, part)()
        assert step._data.numel() == envs
        batch = (TINY.batch, TINY.horizon)
        assert step._batch.shape == (batch if seeds == 1 else (seeds, *batch))
        assert step._batch["validity_mask"].any()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_draw_from_the_disk_is_the_same() -> None:
    device = torch.device("cpu")
    step = scale.training_step("transitions", 120, TASKS["halfcheetah"], device, TINY)
    stored = step.replay.storage.get(slice(None))
    before = stored.clone()
    step.evict()
    assert (stored == before).all()


@pytest.mark.slow
def test_workers_collect_and_receive_weights(monkeypatch) -> None:
    monkeypatch.setattr(suites, "WORKERS", {"multi": 2})
    suite = SUITES["workers"]("halfcheetah", torch.device("cpu"), True)
    alternate(suite.cases, 2)
    names = [case.name for case in suite.cases]
    assert names[1:] == ["collect, 2 workers, multi", "send weights, 2 workers, multi"]
    assert "frames/s" in table(suite)
    assert suite.cases[1].work().shape == (2, 8)
    suite.cases[1].work.collector.shutdown()


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_the_loop_is_timed_without_its_first_tenth(capsys) -> None:
    small = ["training.batch_size=8", "agent.hidden_dim=8", "agent.dynamics_hidden_dim=8"]
    line, content = long.loop("halfcheetah", torch.device("cpu"), 40, small)
    assert 0 < content["share_collecting"] < 1
    assert 0 < content["steps_per_second"] < 10_000
    assert f"{content['steps_per_second']:.1f} environment steps/s" in line


def test_what_checkpoints_cost(monkeypatch, tmp_path: Path) -> None:
    options = ("--transitions", "20000", "--steps", "8", "--device", "cpu")
    command(monkeypatch, "saving", *options, "--out", str(tmp_path))
    content = json.loads((tmp_path / "saving-halfcheetah-cpu.json").read_text())
    assert len(content["seconds"]) == 4
    later = sorted(content["seconds"][1:])[1]
    assert content["share"] == pytest.approx(later / (later + 5000 * content["step"]))


def test_images_are_measured_where_they_can_be_rendered() -> None:
    small = Sizes(2, 2, 8, 8)
    work = ALMWork(replace(TASKS["pixels"], pixels=21), torch.device("cpu"), small)
    assert work.batch["pixels"].dtype == torch.uint8
    before = flops(work)
    larger = ALMWork(replace(TASKS["pixels"], pixels=42), torch.device("cpu"), small)
    assert flops(larger) > 2 * before
    with pytest.raises(SystemExit, match="measured on vectors"):
        SUITES["peers"]("pixels", torch.device("cpu"), True)


def test_memory_that_stays_is_no_leak(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(long, "SETTLING", 20)
    command(monkeypatch, "memory", "--updates", "20", "--device", "cpu", "--out", str(tmp_path))
    content = json.loads((tmp_path / "memory-halfcheetah-cpu.json").read_text())
    assert list(content["held"]) == [str(i) for i in range(21)]
    assert content["leaks"] is False


def test_a_leak_is_noticed(monkeypatch) -> None:
    kept = []

    def leak(batch: object) -> None:
        block = mmap(-1, 4 * 2**20)  # of the system, whatever the allocator has left over
        block.write(b"x" * len(block))
        kept.append(block)

    monkeypatch.setattr(long, "SETTLING", 2)
    monkeypatch.setattr(ALMWork, "update", property(lambda self: leak), raising=False)
    monkeypatch.setattr(ALMWork, "__init__", lambda self, *args, **options: None)
    with pytest.raises(SystemExit, match="memory grows"):
        command(monkeypatch, "memory", "--updates", "40", "--device", "cpu")


def test_the_arithmetic_of_a_linear_layer_is_known() -> None:
    layer, data = nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    forward = 2 * 3 * 5 * 7
    assert flops(lambda: layer(data)) == forward
    assert flops(lambda: layer(data).sum().backward()) == 3 * forward


def test_the_arithmetic_of_an_update_follows_the_batch() -> None:
    small, large = (
        flops(ALMWork(TASKS["halfcheetah"], torch.device("cpu"), Sizes(batch, 3, 8, 8)))
        for batch in (4, 8)
    )
    assert large == 2 * small > 0


def test_cases_take_turns() -> None:
    turns: list[str] = []
    cases = [Case(name, lambda name=name: turns.append(name)) for name in "ab"]
    alternate(cases, rounds=3)
    assert "".join(turns) == "abab" + "ababab"


def test_ratios_rates_and_shares(tmp_path: Path) -> None:
    slow = Case("slow", lambda: None, seconds=[4.0, 4.0, 8.0])
    fast = Case("fast", lambda: None, seconds=[1.0, 2.0, 4.0])
    peak = Case("peak: matmul float32", lambda: None, flops=10**9, seconds=[0.5, 0.5, 0.5])
    work = Case("update: eager 32-true", lambda: None, flops=10**9, seconds=[1.0, 1.0, 1.0])
    assert ratios(fast, slow) == (2.0, 2.0, 3.0)
    parts = {"a whole step": ["slow", "fast"]}
    suite = Suite([slow, fast, peak, work], "slow", "a note", parts)
    printed = table(suite).splitlines()
    assert printed[0] == "a note"
    assert "2.00 (2.00-3.00)" in printed[3]
    assert printed[5].split()[-2:] == ["1", "50%"]
    assert printed[-1] == "of a whole step (6000.0 ms, 0 a second): slow 67%, fast 33%"
    write(tmp_path, "name", suite, {"cpu": "x"})
    assert json.loads((tmp_path / "name.json").read_text())["cases"][1]["seconds"] == [1, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nonsense"], "no suite nonsense; choose from update"), (["--rounds", "1"], "at least 2")],
)
def test_what_cannot_be_measured_is_said(monkeypatch, capsys, arguments, message) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, *arguments)
    assert message in capsys.readouterr().err

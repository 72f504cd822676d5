"""When a run compiles its losses, and in which precision it computes them."""

from __future__ import annotations

import pytest
import torch

from alm_torchrl.training import choose_precision, compilation, precision, worth_compiling


@pytest.mark.parametrize(
    ("mode", "updates", "device", "compiler", "compiles"),
    [
        ("auto", 10_000, "cpu", True, True),
        ("auto", 9_999, "cpu", True, False),
        ("auto", 10_000, "cpu", False, False),
        ("auto", 1, "cuda", True, True),
        ("auto", 1, "cuda", False, False),
        ("always", 1, "cpu", False, True),
        ("never", 10**6, "cuda", True, False),
    ],
)
def test_the_modes(
    monkeypatch, mode: str, updates: int, device: str, compiler: bool, compiles: bool
) -> None:
    monkeypatch.setattr(compilation, "which", lambda name: name if compiler else None)
    assert worth_compiling(mode, updates, device) is compiles


def test_another_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="none of auto, always, never"):
        worth_compiling("on", 1)


@pytest.mark.parametrize(("bf16_seconds", "chosen"), [(0.7, "32-true"), (0.6, "bf16-mixed")])
def test_precision_by_measurement(monkeypatch, bf16_seconds: float, chosen: str) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: bf16_seconds}
    monkeypatch.setattr(precision, "_matmul_seconds", lambda dtype, device: seconds[dtype])
    assert choose_precision("auto") == chosen
    assert choose_precision("32-true") == "32-true"
    assert choose_precision("bf16-mixed") == "bf16-mixed"


def test_the_measurement_is_one() -> None:
    assert 0 < precision._matmul_seconds(torch.bfloat16, torch.device("cpu"), size=64) < 1
    assert choose_precision("auto") in ("32-true", "bf16-mixed")


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="none of 32-true, bf16-mixed, auto"):
        choose_precision("16")

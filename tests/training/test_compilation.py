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


@pytest.mark.parametrize(
    ("bf16_seconds", "chosen", "sizes"),
    [(0.7, "32-true", 4), (0.6, "bf16-mixed", 4), (3.9, "32-true", 4), (4.1, "32-true", 1)],
)
def test_precision_by_measurement(
    monkeypatch, bf16_seconds: float, chosen: str, sizes: int
) -> None:
    """And without the larger products where a small one is hopeless already."""
    seconds = {torch.float32: 1.0, torch.bfloat16: bf16_seconds}
    timed = set()

    def measured(dtype: torch.dtype, device: torch.device, size: int) -> float:
        timed.add(size)
        return seconds[dtype]

    monkeypatch.setattr(precision, "_matmul_seconds", measured)
    assert choose_precision("auto") == chosen
    assert len(timed) == sizes
    assert choose_precision("32-true") == "32-true"
    assert choose_precision("bf16-mixed") == "bf16-mixed"
    assert len(timed) == sizes


def test_the_measurement_is_one() -> None:
    assert 0 < precision._matmul_seconds(torch.bfloat16, torch.device("cpu"), size=64) < 1
    assert choose_precision("auto") in ("32-true", "bf16-mixed")


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="none of 32-true, bf16-mixed, auto"):
        choose_precision("16")

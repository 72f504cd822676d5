"""When a run compiles its losses, and in which precision it computes them."""

from __future__ import annotations

import pytest
import torch

from alm_torchrl.training import runtime
from alm_torchrl.training.runtime import choose_precision, worth_compiling


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
    monkeypatch.setattr(runtime, "which", lambda name: name if compiler else None)
    assert worth_compiling(mode, updates, device) is compiles


def test_another_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="choose auto, always or never"):
        worth_compiling("on", 1)


@pytest.mark.parametrize(
    ("device", "native", "chosen"),
    [
        ("cpu", True, "bf16-mixed"),
        ("cpu", False, "32-true"),
        ("cuda", True, "bf16-mixed"),
        ("cuda", False, "32-true"),
    ],
)
def test_precision_follows_the_hardware(monkeypatch, device: str, native: bool, chosen) -> None:
    capabilities = {"amx_bf16": native} if native else {}  # other architectures have no such entry
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert choose_precision("auto", device) == chosen
    assert choose_precision("32-true", device) == "32-true"
    assert choose_precision("bf16-mixed", device) == "bf16-mixed"


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="choose 32-true, bf16-mixed or auto"):
        choose_precision("16")

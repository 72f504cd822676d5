"""When a run compiles its losses."""

from __future__ import annotations

import pytest
import torch._dynamo
from torch import nn

from alm_torchrl.training import compilation, compile_loss


class Recorder(nn.Module):
    """Notes that it was compiled."""

    compiled = False

    def compile(self, *args, **kwargs) -> None:
        self.compiled = True


@pytest.fixture(autouse=True)
def _keep_the_setting():
    with torch._dynamo.config.patch(suppress_errors=False):
        yield


@pytest.mark.parametrize(
    ("mode", "updates", "compiler", "compiles"),
    [
        ("auto", 10_000, True, True),
        ("auto", 9_999, True, False),
        ("auto", 10_000, False, False),
        ("always", 1, False, True),
        ("never", 10**6, True, False),
    ],
)
def test_the_modes(monkeypatch, mode: str, updates: int, compiler: bool, compiles: bool) -> None:
    monkeypatch.setattr(compilation, "which", lambda name: name if compiler else None)
    loss = Recorder()
    assert compile_loss(loss, mode, updates) is compiles
    assert loss.compiled is compiles
    assert torch._dynamo.config.suppress_errors is (mode == "auto" and compiles)


def test_another_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="none of auto, always, never"):
        compile_loss(Recorder(), "on", 1)

"""A tiny agent in a tiny environment."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from alm_torchrl.training import ALMModule
from tests.training import tiny


@pytest.fixture
def make_module() -> Callable[..., ALMModule]:
    return tiny.make_module

"""Losses of small networks, as the tests of the objective have them."""

from tests.objectives.conftest import make_loss, make_windows

__all__ = ["make_loss", "make_windows"]

"""Prepares a script before it imports PyTorch and the simulator."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec


def prepare_script(*packages: str) -> None:
    """Exits if a package is missing, and lets MuJoCo render without a screen."""
    if missing := [name for name in packages if find_spec(name) is None]:
        sys.exit(f"{', '.join(missing)} not installed: pip install 'alm-torchrl[recipes]'")
    if sys.platform == "linux" and "DISPLAY" not in os.environ and _has_library("libEGL.so.1"):
        os.environ.setdefault("MUJOCO_GL", "egl")


def _has_library(name: str) -> bool:
    """Returns whether a shared library exists; MuJoCo cannot be imported without its renderer."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True

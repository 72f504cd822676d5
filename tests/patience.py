"""How long a test waits for processes: by what this machine takes to start one."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import cache


def patience(starts: float = 20.0) -> float:
    """Seconds in which this machine, as loaded as it is, starts a process that many times over.

    A test waits as long before it fails; one that succeeds does not wait.
    """
    return max(60.0, starts * _one_start())


@cache
def _one_start() -> float:
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torchrl.collectors"], check=True)
    return time.monotonic() - begin

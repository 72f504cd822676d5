"""Helpers for processes that another process has started."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import threading
from multiprocessing.util import get_temp_dir

#: Remedy for a process that ended before it could send an error.
GUARD_HINT = (
    'a script that starts processes needs an `if __name__ == "__main__":` guard; if it has one, '
    "see the output of the process above"
)


def leave_unguarded_script() -> None:
    """Exits a new process that runs its parent's script because the script has no main guard.

    The parent then raises a one-line error.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)


def exit_with_parent() -> None:
    """Makes this process exit when its parent process ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    shutil.rmtree(get_temp_dir(), ignore_errors=True)  # sockets of this process and its parent
    os._exit(1)

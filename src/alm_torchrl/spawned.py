"""What keeps processes that another one has started from outliving or repeating it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import threading
from multiprocessing.util import get_temp_dir

__all__ = ["GUARD_HINT", "exit_with_parent", "leave_unguarded_script"]

#: What to look at where a process has ended before it could say why.
GUARD_HINT = (
    'a script that starts processes needs an `if __name__ == "__main__":` guard around what starts '
    "them; where it has one, look above for what the process printed"
)


def leave_unguarded_script() -> None:
    """Ends a process that runs a script's top level again only because it lacks a guard.

    A new process imports the script that has started it. Without a guard it would come to the
    same call, and fail there with a traceback; its parent says what is wrong in one line.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)


def exit_with_parent() -> None:
    """Has this process end when the one that started it is gone, whatever it is doing then."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_for, args=(parent,), daemon=True).start()


def _wait_for(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    shutil.rmtree(get_temp_dir(), ignore_errors=True)  # sockets, and the parent's too
    os._exit(1)

"""A lock on a run's folder that works across processes and machines."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Seconds between two updates of the lock file by its owner.
_INTERVAL = 10.0
#: Seconds without an update after which an owner on another machine counts as ended.
_STALE = 60.0


class RunLock:
    """The file ``run.lock`` in a folder, which names the process that trains there.

    A stale lock is replaced: on this machine if its process has ended, and from another machine if
    the file has not been updated for a minute.

    Args:
        folder: existing folder of the run.

    Raises:
        OSError: if another run holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        owner |= {"started": _started(os.getpid()), "token": uuid.uuid4().hex}
        self._content = json.dumps(owner).encode()
        self._released = threading.Event()
        self._acquire()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Removes the file, unless another run has replaced it."""
        self._released.set()
        self._thread.join()
        with suppress(OSError):
            if self.path.read_bytes() == self._content:
                self.path.unlink()

    def _acquire(self) -> None:
        """Creates the file; waits while it is unclear whether its owner is alive."""
        # A requeued job starts while its predecessor may still be ending.
        patience = _STALE if "SLURM_RESTART_COUNT" in os.environ else 0.0
        begin = changed = time.monotonic()
        content, touched, beats = b"", -1, 0
        while not self._create():
            before, now = (content, touched), time.monotonic()
            try:
                content, touched = self.path.read_bytes(), self.path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            if (content, touched) != before:  # clocks of machines differ, so times are not compared
                beats = beats + 1 if before[1] >= 0 and content == before[0] else 0
                changed = now
            owner = _owner(content)
            here = os.name == "posix" and owner["machine"] == _machine()
            if not _lives(owner) if here else now - changed > _STALE:
                if self._take_over():
                    return
            elif (here or (beats and now - changed < 3 * _INTERVAL)) and now - begin >= patience:
                raise OSError(
                    f"{self.path.parent} is in use by process {owner['pid']} on {owner['host']}: "
                    "wait until it ends, or choose another run.folder"
                )
            else:
                if content != before[0]:
                    print(f"waiting for the owner of {self.path} to end", file=sys.stderr)
                time.sleep(min(1.0, _INTERVAL))

    def _create(self) -> bool:
        """Creates the file if it does not exist; atomic also on shared file systems."""
        try:
            with self.path.open("xb") as file:
                return bool(file.write(self._content))
        except FileExistsError:
            return False

    def _take_over(self) -> bool:
        """Replaces a stale file; if several runs do so, the last one gets the lock."""
        own = self.path.with_name(f"run.lock.{uuid.uuid4().hex}")
        own.write_bytes(self._content)
        own.replace(self.path)
        time.sleep(min(1.0, _INTERVAL))
        return self.path.read_bytes() == self._content

    def _keep(self) -> None:
        """Updates the file until the run ends; exits if another run has taken the lock."""
        while not self._released.wait(_INTERVAL):
            try:
                if self.path.read_bytes() != self._content:
                    sys.stderr.write(f"another run has taken {self.path}; this run exits\n")
                    sys.stderr.flush()
                    os._exit(1)
                os.utime(self.path)
            except OSError:
                continue  # the file server may be unavailable for a while


def _owner(content: bytes) -> dict[str, Any]:
    """Returns the owner named in an untrusted, possibly incomplete lock file."""
    owner: dict[str, Any] = {"host": "another machine", "pid": 0, "machine": "", "started": None}
    try:
        said = json.loads(content)
        if isinstance(said["pid"], int) and 0 < said["pid"] < 2**31:
            owner |= {name: said[name] for name in owner}
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return owner


def _machine() -> str:
    """Identifies a boot of a machine or a container, within which process ids are unique."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _lives(owner: dict[str, Any]) -> bool:
    """Returns whether the owner, not a later process with its id, runs on this machine."""
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(owner["pid"]) == owner["started"]


def _started(pid: int) -> str | None:
    """Returns the start time of a process, or None if it has ended or the time is unknown."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]

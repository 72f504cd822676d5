"""A lock that keeps a second run out of a run's folder, also from another machine."""

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

#: Seconds between two signs of life of the run that holds a lock.
_INTERVAL = 10.0
#: Seconds without one after which a run on another machine has ended. A requeued job waits as long.
_STALE = 60.0


class RunLock:
    """A folder's file ``run.lock``, which names the process that trains there.

    A process of this machine that has ended without removing it is known by its number and start;
    one of another machine by a file that has not been touched for a minute.

    Args:
        folder: of the run; it must exist.

    Raises:
        OSError: if another run holds the lock, with its host and process.
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
        """Removes the file, unless it has become another run's."""
        self._released.set()
        self._thread.join()
        with suppress(OSError):
            if self.path.read_bytes() == self._content:
                self.path.unlink()

    def _acquire(self) -> None:
        """Waits for a run that may have ended, and raises if it has not."""
        patience = _STALE if "SLURM_RESTART_COUNT" in os.environ else 0.0
        begin = changed = time.monotonic()
        content, touched, beats = b"", -1, 0
        while not self._create():
            before, now = (content, touched), time.monotonic()
            try:
                content, touched = self.path.read_bytes(), self.path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            if (content, touched) != before:  # clocks of machines differ: no time is compared
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
                    whose = f"process {owner['pid']} on {owner['host']}"
                    print(f"{self.path} is {whose}'s: waiting for its end", file=sys.stderr)
                time.sleep(min(1.0, _INTERVAL))

    def _create(self) -> bool:
        """Makes the file unless it is there, which is atomic on shared file systems too."""
        try:
            with self.path.open("xb") as file:
                return bool(file.write(self._content))
        except FileExistsError:
            return False

    def _take_over(self) -> bool:
        """Puts this run's file in the place of an old one; of several that do, the last gets it."""
        own = self.path.with_name(f"run.lock.{uuid.uuid4().hex}")
        own.write_bytes(self._content)
        own.replace(self.path)
        time.sleep(min(1.0, _INTERVAL))
        return self.path.read_bytes() == self._content

    def _keep(self) -> None:
        """Touches the file until the run ends, and ends it if another run has taken the lock."""
        while not self._released.wait(_INTERVAL):
            try:
                if self.path.read_bytes() != self._content:
                    sys.stderr.write(f"another run has taken {self.path}, and so this one ends\n")
                    sys.stderr.flush()
                    os._exit(1)
                os.utime(self.path)
            except OSError:
                continue  # a file server that is away for a while


def _owner(content: bytes) -> dict[str, Any]:
    """What a lock says, which may be half written, or anybody's."""
    owner: dict[str, Any] = {"host": "another machine", "pid": 0, "machine": "", "started": None}
    try:
        said = json.loads(content)
        if isinstance(said["pid"], int) and 0 < said["pid"] < 2**31:
            owner |= {name: said[name] for name in owner}
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return owner


def _machine() -> str:
    """Where a process number means the same process: a machine since its start, or a container."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _lives(owner: dict[str, Any]) -> bool:
    """Whether a process of this machine is the one that made a lock, not a later one."""
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(owner["pid"]) == owner["started"]


def _started(pid: int) -> str | None:
    """When a process has started, where the system says so; nothing for one that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]

"""TorchRL's multi-process collectors, with time limits and clear errors when a process fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.util import get_temp_dir
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.collectors import Collector, MultiAsyncCollector, MultiCollector, MultiSyncCollector

from alm_torchrl.files import one_line
from alm_torchrl.spawned import GUARD_HINT, exit_with_parent

_GRACE = 5.0  # seconds for TorchRL to notice a dead process itself


class WorkersLostError(ChildProcessError):
    """A worker did not start, died or did not answer, and is not replaced."""


class _Workers(MultiCollector):
    """A TorchRL collector with processes, whose calls raise an error instead of blocking forever.

    An exception in an environment becomes a ``RuntimeError`` with its message. The processes end
    with the collector and with their parent process.
    """

    procs: list[Any] = []  # noqa: RUF012 - set by TorchRL

    def __init__(
        self,
        create_envs: list[Callable[[], Any]],
        policy: Any,
        *,
        init_random_frames: int,
        seed: int,
        timeout: float,
        start_timeout: float,
        **options: Any,
    ) -> None:
        self._random_frames = init_random_frames
        self._timeout, self._start_timeout = timeout, start_timeout
        self._reports, writer = multiprocessing.Pipe(duplex=False)
        # Created before the workers, which inherit it and remove it if this process is killed.
        folder, longest = get_temp_dir(), 103 - len("/listener-xxxxxxxx")
        if len(os.fsencode(folder)) > longest:  # batches would be lost without an error
            raise ValueError(
                f"workers send batches through sockets in {folder}, but this path is longer than "
                f"{longest} bytes: set TMPDIR to a shorter one"
            )
        options["num_threads"] = torch.get_num_threads()  # TorchRL would change it
        options["collector_class"] = partial(Worker, reports=writer)
        start = partial(super().__init__, create_envs, policy, **options)
        try:
            self._call(start, starting=True)
            # Kill workers at exit: they block on their parent, which blocks interpreter shutdown.
            weakref.finalize(self, _kill, self.procs)
            self._set_random_frames(0)
            self.set_seed(seed)
        except BaseException:
            _kill(self.procs)
            raise
        finally:
            writer.close()

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yields batches."""
        batches = super().iterator()
        while (data := self._call(partial(next, batches, None))) is not None:
            yield data

    def update_policy_weights_(self, policy_or_weights: Any = None, **kwargs: Any) -> None:
        """Sends weights to all processes."""
        self._call(partial(super().update_policy_weights_, policy_or_weights, **kwargs))

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Resets all environments."""
        self._call(partial(super().reset, *args, **kwargs))

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seeds the processes, and seeds and resets their environments."""
        return self._call(partial(super().set_seed, seed, static_seed))

    def load_state_dict(self, state_dict: dict[str, Any], **_: Any) -> None:
        """Restores the frame count, so that the random frames are not repeated."""
        self._frames, self._iter = state_dict["frames"], state_dict["iter"]
        self._set_random_frames(self._frames)

    def shutdown(self, timeout: float | None = None, **_: Any) -> None:
        """Ends the processes."""
        super().shutdown(timeout=timeout, raise_on_error=False)
        _kill(self.procs)

    def _set_random_frames(self, frames: int) -> None:
        """Sets the frame at which random actions end, once ``frames`` frames are collected."""
        left, batch = self._random_frames - frames, self.requested_frames_per_batch
        # MultiAsyncCollector counts a batch when it arrives, and the other workers have already
        # started theirs: asked for n random batches, it collects n + num_workers - 1.
        if left > 0 and isinstance(self, MultiAsyncCollector):
            left = max(left - (self.num_workers - 1) * batch, batch)
        self.init_random_frames = frames + max(left, 0)

    def _call(self, call: Callable[[], Any], *, starting: bool = False) -> Any:
        """Runs a call that may block in a thread; raises an error if it fails or blocks."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001 - raised by future.result()
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        limit = self._start_timeout if starting else self._timeout
        deadline = time.monotonic() + limit
        try:
            while not wait([future], min(1.0, max(0.0, deadline - time.monotonic()))).done:
                if time.monotonic() >= deadline:
                    raise TimeoutError
                if _dead(self.procs):
                    deadline = min(deadline, time.monotonic() + _GRACE)
            return future.result()
        except Exception as error:  # noqa: BLE001 - explained and raised below
            failure = self._explain(error, limit, starting)
        raise failure

    def _explain(self, error: Exception, timeout: float, starting: bool) -> Exception:
        """Returns the error to raise for a failed call."""
        report = ""
        with suppress(EOFError, OSError):
            report = self._reports.recv() if self._reports.poll() else ""
        dead = _dead(self.procs)
        lost = isinstance(error.__cause__ or error, TimeoutError | EOFError | ConnectionError)
        if starting and (report or dead or lost):
            reason = report or f"{dead or f'no answer within {timeout:.0f} s'}; {GUARD_HINT}"
            return WorkersLostError(f"a worker could not start: {reason}")
        if report:
            return RuntimeError(report)
        if not dead and not isinstance(error, TimeoutError):
            return error
        _kill(self.procs)
        if dead:
            return WorkersLostError(
                f"{dead}: check the memory of the machine, and whether the simulator crashes"
            )
        return WorkersLostError(f"the workers did not answer within {timeout:.0f} s")


class SyncWorkers(_Workers, MultiSyncCollector):
    """Every batch has data of all workers."""


class AsyncWorkers(_Workers, MultiAsyncCollector):
    """Every batch has data of one worker; workers do not wait for each other."""


class Worker(Collector):
    """The collector of one process, which sends its exceptions to the parent process."""

    def __init__(self, *args: Any, reports: Connection, **options: Any) -> None:
        # Ctrl-C and the SIGTERM of a cluster reach all processes of a group. The parent finishes
        # its update, saves a checkpoint and ends the workers.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        exit_with_parent()
        self._reports = reports
        with self._reporting():
            super().__init__(*args, **options)

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yields batches."""
        with self._reporting():
            yield from super().iterator()

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Resets the environment."""
        with self._reporting():
            super().reset(*args, **kwargs)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            with suppress(OSError):
                self._reports.send(one_line(error))
            raise


def _dead(processes: list[Any]) -> str:
    """Describes the first process that has ended, if any."""
    for index, process in enumerate(processes):
        with suppress(ValueError):  # closed by TorchRL
            if process.exitcode is not None:
                return f"worker {index} ended with exit code {process.exitcode}"
    return ""


def _kill(processes: list[Any]) -> None:
    for act in (lambda process: process.kill(), lambda process: process.join(5)):
        for process in processes:
            with suppress(ValueError, AttributeError, AssertionError):  # closed, or never started
                act(process)

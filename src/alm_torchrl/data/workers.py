"""TorchRL's process collectors, which end in bounded time when a process dies or hangs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.util import get_temp_dir
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.collectors import Collector, MultiAsyncCollector, MultiCollector, MultiSyncCollector

from alm_torchrl.spawned import GUARD_HINT, exit_with_parent

__all__ = ["AsyncWorkers", "SyncWorkers", "WorkersLostError"]

_GRACE = 5.0  # seconds that TorchRL has to notice a dead process by itself


class WorkersLostError(ChildProcessError):
    """A worker could not start, died or did not answer, and is not replaced."""


class _Workers(MultiCollector):
    """A TorchRL process collector that says why it fails, and does so in bounded time.

    A process that dies or does not answer raises :class:`WorkersLostError`; what an environment
    raises is a ``RuntimeError`` with its message. The processes end with the collector, with an
    error or Ctrl-C while they start, and with the process that has started them.

    Args:
        create_envs: one function for each process.
        policy: the acting policy, or None for random actions.
        init_random_frames: uniformly random frames at the start.
        seed: seed of the environments and of the processes' random numbers.
        timeout: seconds that a batch, or another answer, may take.
        start_timeout: seconds that the processes may take to start.
        **options: of TorchRL's collector.

    Raises:
        WorkersLostError: if a process does not start.
        ValueError: if the path of the temporary folder is too long for a socket.
    """

    procs: list[Any] = []  # noqa: RUF012 - TorchRL sets it

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
        self._timeout = timeout
        self._reports, writer = multiprocessing.Pipe(duplex=False)
        # Made before the workers, it is theirs too, to remove if this is killed.
        _check_socket_folder(get_temp_dir())
        options["num_threads"] = torch.get_num_threads()  # the learner keeps those that it has
        options["collector_class"] = partial(Worker, reports=writer)
        try:
            with self._watching(start_timeout):
                super().__init__(create_envs, policy, **options)
            # Kill workers at exit: they block on their parent, which blocks interpreter shutdown.
            weakref.finalize(self, _kill, self.procs)
            self._count_random(0)
            self.set_seed(seed)
        except BaseException:
            _kill(self.procs)
            raise
        finally:
            writer.close()

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yields batches.

        Raises:
            RuntimeError: with the message of an environment that raised.
            WorkersLostError: if a process died, or did not answer.
        """
        batches = super().iterator()
        while (data := self._bounded(partial(next, batches, None))) is not None:
            yield data

    def update_policy_weights_(self, policy_or_weights: Any = None, **kwargs: Any) -> None:
        """Sends weights to every process."""
        self._bounded(partial(super().update_policy_weights_, policy_or_weights, **kwargs))

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Begins new episodes."""
        self._bounded(partial(super().reset, *args, **kwargs))

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seeds the environments and the processes, and begins new episodes."""
        return self._bounded(partial(super().set_seed, seed, static_seed))

    def load_state_dict(self, state_dict: dict[str, Any], **_: Any) -> None:
        """Goes on counting, so that the random frames are not repeated."""
        self._frames, self._iter = state_dict["frames"], state_dict["iter"]
        self._count_random(self._frames)

    def shutdown(self, timeout: float | None = None, **_: Any) -> None:
        """Ends the processes."""
        super().shutdown(timeout=timeout, raise_on_error=False)
        _kill(self.procs)

    def _count_random(self, frames: int) -> None:
        """Tells TorchRL's collector until which frame to act at random.

        MultiAsyncCollector starts every worker before it has counted a frame, and then counts a
        batch when it arrives, by when the others are under way: told ``n`` batches it draws
        ``n + num_workers - 1``.
        """
        left, batch = self._random_frames - frames, self.requested_frames_per_batch
        if left > 0 and isinstance(self, MultiAsyncCollector):
            left = max(left - (self.num_workers - 1) * batch, batch)
        self.init_random_frames = frames + max(left, 0)

    @contextmanager
    def _watching(self, timeout: float) -> Iterator[None]:
        """Ends all processes when one ends while they start, or when that takes too long.

        TorchRL waits for one after the other, without a limit.
        """
        done, reasons = threading.Event(), []

        def watch() -> None:
            deadline = time.monotonic() + timeout
            while not done.wait(0.2):
                reason = _dead(self.procs)
                if not reason and time.monotonic() > deadline:
                    reason = f"it is not ready after {timeout:.0f} s"
                if reason:
                    reasons.append(reason)
                    _kill(self.procs)

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        except Exception as error:
            if isinstance(error.__cause__ or error, EOFError | ConnectionError):
                reasons.append(_dead(self.procs))  # found by TorchRL before it was seen here
            report = self._report()
            if not report and not reasons:
                raise
            reason = report or f"{reasons[0]}; {GUARD_HINT}"
            raise WorkersLostError(f"a worker could not start: {reason}") from None
        finally:
            done.set()

    def _bounded(self, call: Callable[[], Any]) -> Any:
        """Calls what waits for the processes, and waits no longer than an answer may take.

        TorchRL waits without a limit in places, so the call has a thread of its own.
        """
        outcome: list[tuple[Any, Exception | None]] = []

        def run() -> None:
            try:
                outcome.append((call(), None))
            except Exception as error:  # noqa: BLE001 - raised below
                outcome.append((None, error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        deadline = time.monotonic() + self._timeout
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(1.0)
            if thread.is_alive() and _dead(self.procs):
                deadline = min(deadline, time.monotonic() + _GRACE)
        result, error = outcome[0] if outcome else (None, TimeoutError())
        if error is None:
            return result
        raise self._explain(error) from error

    def _explain(self, error: Exception) -> Exception:
        """What went wrong, of which TorchRL may know no more than that a process has ended."""
        if report := self._report():
            return RuntimeError(report)
        if dead := _dead(self.procs):
            _kill(self.procs)
            return WorkersLostError(
                f"{dead}: look for what ends it, such as the memory of the machine or a simulator "
                "that crashes"
            )
        if isinstance(error, TimeoutError):
            _kill(self.procs)
            return WorkersLostError(f"the workers did not answer within {self._timeout:.0f} s")
        return error

    def _report(self) -> str:
        """What was raised in a process first, if anything was."""
        with suppress(EOFError):
            if self._reports.poll():
                return self._reports.recv()
        return ""


class SyncWorkers(_Workers, MultiSyncCollector):
    """Workers of which each contributes to every batch."""


class AsyncWorkers(_Workers, MultiAsyncCollector):
    """Workers that collect on by themselves, each for batches of its own."""


class Worker(Collector):
    """What collects in a process, and reports what is raised there to the one that started it.

    Args:
        *args: of TorchRL's collector.
        reports: where to.
        **options: of TorchRL's collector.
    """

    def __init__(self, *args: Any, reports: Connection, **options: Any) -> None:
        # Ctrl-C, and a cluster's SIGTERM, reach every process of a group. The learner finishes its
        # update and makes a checkpoint then, and ends the workers itself.
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
        """Begins new episodes."""
        with self._reporting():
            super().reset(*args, **kwargs)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            with suppress(OSError):
                self._reports.send(f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000])
            raise


def _check_socket_folder(folder: str) -> None:
    """Raises if no socket fits into a folder: a worker's batch would be lost without an error."""
    longest = 103 - len("/listener-xxxxxxxx")
    if len(os.fsencode(folder)) > longest:
        raise ValueError(
            f"workers send batches through sockets in {folder}, whose path is longer than "
            f"{longest} bytes: set TMPDIR to a shorter one"
        )


def _dead(processes: list[Any]) -> str:
    """Names the first process that has ended."""
    for index, process in enumerate(processes):
        with suppress(ValueError):  # TorchRL has closed it
            if process.exitcode is not None:
                return f"worker {index} ended with exit code {process.exitcode}"
    return ""


def _kill(processes: list[Any]) -> None:
    for act in (lambda process: process.kill(), lambda process: process.join(5)):
        for process in processes:
            with suppress(ValueError, AttributeError, AssertionError):  # closed, or never started
                act(process)

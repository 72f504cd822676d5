"""Collection in processes of this machine, which goes on when one of them dies."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector, Collector, MultiAsyncCollector, MultiSyncCollector

__all__ = ["ProcessCollector", "WorkerLosses", "WorkersLostError"]

_GRACE = 20.0  # seconds that TorchRL has to notice a dead process and to end the others
_HOUR = 3600.0


class WorkersLostError(ChildProcessError):
    """More workers were lost than a run should replace, or one could not be replaced."""


class WorkerLosses:
    """Counts the workers that were lost, and says when there are too many to go on.

    Args:
        limit: losses within an hour that are made good.

    Raises:
        ValueError: if the limit is negative.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"max_losses must be at least 0, not {limit}")
        self.limit = limit
        self.total = 0
        self._times: deque[float] = deque(maxlen=limit + 1)

    def note(self, reason: str) -> None:
        """Counts a loss, and warns of it.

        Raises:
            WorkersLostError: if it is one too many.
        """
        self.total += 1
        self._times.append(time.monotonic())
        if len(self._times) > self.limit and self._times[-1] - self._times[0] < _HOUR:
            raise WorkersLostError(
                f"{reason}, and it is loss {self.limit + 1} within an hour: look for what ends the "
                "workers, such as the memory of the machine or a simulator that crashes"
            )
        warnings.warn(
            f"{reason}; it is replaced, and the episodes that were running end there", stacklevel=3
        )


class ProcessCollector(BaseCollector):
    """A TorchRL multi-process collector that is made anew when one of its processes dies.

    TorchRL's collectors end all processes when one is gone. The new ones begin new episodes: the
    next batch does not follow the last one, which shows in :attr:`losses`. An exception that the
    environment raises in a process ends the collection with its message.

    Args:
        create_envs: one function for each process.
        policy: the acting policy, or None for random actions.
        overlap: processes collect on by themselves, each for batches of its own.
        init_random_frames: uniformly random frames at the start.
        total_frames: frames after which iteration stops; -1 for never.
        seed: seed of the environments and of the processes' random numbers.
        timeout: seconds that a batch may take.
        max_losses: how often processes are replaced within an hour.
        **options: of TorchRL's collector.
    """

    def __init__(
        self,
        create_envs: list[Callable[[], Any]],
        policy: Any,
        *,
        overlap: bool,
        init_random_frames: int,
        total_frames: int,
        seed: int,
        timeout: float,
        max_losses: int,
        **options: Any,
    ) -> None:
        super().__init__()
        self._reports = tempfile.TemporaryDirectory(prefix="alm-torchrl-workers-")
        self._make = partial(
            MultiAsyncCollector if overlap else MultiSyncCollector,
            create_envs,
            policy,
            num_threads=torch.get_num_threads(),  # the learner keeps those that it has
            collector_class=ReportingCollector,
            init_fn=partial(prepare_process, self._reports.name),
            **options,
        )
        self._overlap = overlap
        self._batch = options["frames_per_batch"]
        self.num_workers = len(create_envs)
        self.init_random_frames = init_random_frames
        self.total_frames = total_frames
        self._seed = seed
        self._timeout = timeout
        self._losses = WorkerLosses(max_losses)
        self._weights: TensorDictBase | None = None
        self._frames = self._iter = 0
        self._inner: Any = None
        self._running: list[Any] = []
        # Python waits for children when it ends, and TorchRL's wait for a word of their parent.
        weakref.finalize(self, _kill, self._running)
        self._start()

    @property
    def losses(self) -> int:
        """How often processes were replaced."""
        return self._losses.total

    @property
    def procs(self) -> list[Any]:
        """The worker processes."""
        return list(self._running)

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yields batches, from other processes where some were lost.

        Raises:
            RuntimeError: with the message of an environment that raised, or if too many processes
                were lost.
        """
        while self.total_frames < 0 or self._frames < self.total_frames:
            try:
                data = self._bounded(partial(next, self._batches))
            except Exception as error:  # noqa: BLE001 - sorted out there
                self._replace(error)
                continue
            self._frames += data.numel()
            self._iter += 1
            yield data

    def update_policy_weights_(self, policy_or_weights: Any = None, **kwargs: Any) -> None:
        """Sends weights to every process, as in TorchRL, and keeps them for those that follow."""
        self._weights = policy_or_weights
        try:
            self._bounded(partial(self._inner.update_policy_weights_, policy_or_weights, **kwargs))
        except Exception as error:  # noqa: BLE001 - sorted out there
            self._replace(error)

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Begins new episodes."""
        self._bounded(partial(self._inner.reset, *args, **kwargs))

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seeds the environments and the processes, and begins new episodes."""
        self._seed = seed
        return self._bounded(partial(self._inner.set_seed, seed, static_seed))

    def state_dict(self) -> OrderedDict[str, int]:
        """The frames and batches so far."""
        return OrderedDict(frames=self._frames, iter=self._iter)

    def load_state_dict(self, state_dict: dict[str, Any], **_: Any) -> None:
        """Goes on counting, so that the random frames are not repeated."""
        self._frames, self._iter = state_dict["frames"], state_dict["iter"]
        self._inner.init_random_frames = self._random_frames()

    def shutdown(self, timeout: float | None = None, **_: Any) -> None:
        """Ends the processes."""
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.shutdown(timeout=timeout, raise_on_error=False)
            _kill(self._running)
        self._reports.cleanup()

    def _start(self) -> None:
        """Makes the processes, seeds them, and sends them what the lost ones had."""
        self._inner = self._make(init_random_frames=self._random_frames(), total_frames=-1)
        self._running[:] = self._inner.procs
        self._batches = iter(self._inner)
        seed = (self._seed + 1009 * self.losses) % 2**31  # others than those before
        self._bounded(partial(self._inner.set_seed, seed))
        if self._weights is not None:
            self._bounded(partial(self._inner.update_policy_weights_, self._weights))

    def _random_frames(self) -> int:
        """What TorchRL's collector must be told to go on acting at random as long as asked.

        MultiAsyncCollector starts every worker before it has counted a frame, and then counts a
        batch when it arrives, by when the others are under way: told ``n`` batches it draws
        ``n + num_workers - 1``.
        """
        left = max(0, self.init_random_frames - self._frames)
        if left and self._overlap:
            return max(left - (self.num_workers - 1) * self._batch, self._batch)
        return left

    def _replace(self, error: Exception) -> None:
        """Starts anew if a process died, and raises what else there was."""
        while True:
            reports = sorted(Path(self._reports.name).glob("*.txt"))
            if reports:
                raise RuntimeError(reports[0].read_text()) from error
            lost = isinstance(error, TimeoutError) or self._dead()
            if not lost or self._inner is None:  # None: it could not even be made again
                raise error
            self._stop()
            self._losses.note(f"a worker process was lost ({' '.join(str(error).split())})")
            try:
                return self._start()
            except Exception as again:  # noqa: BLE001 - sorted out above
                error = again

    def _dead(self) -> str:
        """Names the processes that have ended."""
        ended = (f"process {i}: {_exit_code(p)}" for i, p in enumerate(self._running))
        return ", ".join(text for text in ended if not text.endswith("None"))

    def _stop(self) -> None:
        """Ends all processes at once."""
        _kill(self.procs)
        inner, self._inner = self._inner, None
        inner.shutdown(timeout=5, raise_on_error=False)

    def _bounded(self, call: Callable[[], Any]) -> Any:
        """Waits for an answer of the processes, and no longer than one can be expected.

        TorchRL waits without a limit in places, so the call has a thread of its own.

        Raises:
            TimeoutError: if there was no answer in time.
            ChildProcessError: if a process was dead before.
        """
        if dead := self._dead():
            raise ChildProcessError(dead)
        outcome: list[tuple[Any, Exception | None]] = []

        def run() -> None:
            try:
                outcome.append((call(), None))
            except Exception as error:  # noqa: BLE001 - raised below
                outcome.append((None, error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        started, died = time.monotonic(), None
        while True:
            thread.join(1.0)
            if not thread.is_alive():
                break
            now = time.monotonic()
            if died is None and self._dead():
                died = now
            if now - started > self._timeout or (died is not None and now - died > _GRACE):
                raise TimeoutError(f"no answer of the workers within {now - started:.0f} s")
        result, error = outcome[0]
        if error is not None:
            raise error
        return result


class ReportingCollector(Collector):
    """What collects in a process: writes down what the environment raises, where it is found."""

    reports: ClassVar[str] = ""

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yields batches."""
        try:
            yield from super().iterator()
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            Path(self.reports, f"{os.getpid()}.txt").write_text(text)
            raise


def prepare_process(reports: str) -> None:
    """Sets a new worker process up.

    Ctrl-C reaches every process of a terminal. The learner's makes a checkpoint then, and ends the
    others itself.
    """
    ReportingCollector.reports = reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _exit_code(process: Any) -> str:
    """How a process ended; ends in None if it has not."""
    try:
        return f"exit code {process.exitcode}"
    except ValueError:
        return "closed"


def _kill(processes: list[Any]) -> None:
    for process in processes:
        with suppress(ValueError):
            process.kill()
            process.join(5)

"""Collection by Ray actors on any number of machines, each of which is replaced when it dies."""

from __future__ import annotations

import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.collectors import Collector
from torchrl.collectors.distributed import RayCollector
from torchrl.envs.utils import ExplorationType

from alm_torchrl.data.workers import WorkersLostError

__all__ = ["RayWorkers"]

_QUIET = {"include_dashboard": False, "log_to_driver": False}  # where Ray is started here
_HOUR = 3600.0


class RayWorkers(RayCollector):
    """A :class:`~torchrl.collectors.distributed.RayCollector` that replaces actors that die.

    Weights go through Ray's object store, with the request for the next batch. A process group,
    as TorchRL's scheme has it, would have to be made anew for all whenever one actor is replaced.
    An exception that the environment raises in an actor ends the collection with its message.

    Args:
        create_envs: one function for each actor.
        policy: the acting policy, or None for random actions.
        overlap: actors collect on while the last batch is learnt from; a batch is of one actor.
        frames_per_batch: frames in a batch.
        init_random_frames: uniformly random frames at the start.
        total_frames: frames after which iteration stops; -1 for never.
        seed: seed of the environments and of the actors' random numbers.
        timeout: seconds that a batch, or another answer, may take.
        start_timeout: seconds that actors may take to start.
        max_restarts: actors replaced within an hour.
        ray_init_config: arguments of ``ray.init``, where Ray is not running yet.
        remote_configs: what an actor asks of the cluster; one CPU if left out.
        **options: of the :class:`~torchrl.collectors.Collector` in every actor.

    Raises:
        ImportError: if Ray is not installed.
        WorkersLostError: if the actors cannot start, or the cluster has no room for them.
    """

    def __init__(
        self,
        create_envs: list[Callable[[], Any]],
        policy: Any,
        *,
        overlap: bool,
        frames_per_batch: int,
        init_random_frames: int,
        total_frames: int,
        seed: int,
        timeout: float,
        start_timeout: float,
        max_restarts: int,
        ray_init_config: dict[str, Any] | None = None,
        remote_configs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if find_spec("ray") is None:
            raise ImportError("kind='ray' needs Ray: pip install 'alm-torchrl[ray]'")
        self._create_envs = create_envs
        self._remote_config = remote_configs or {"num_cpus": 1}
        if max_restarts < 0:
            raise ValueError(f"max_restarts must be at least 0, not {max_restarts}")
        self.restarts = 0
        self._restart_times: deque[float] = deque(maxlen=max_restarts + 1)
        self._timeout, self._start_timeout = timeout, start_timeout
        self._weights: Any = None  # in the object store
        self._informed = [True] * len(create_envs)
        self._random = [False] * len(create_envs)
        self._random_left = init_random_frames
        self._seed = seed
        devices = {
            name: options.pop(name, None)
            for name in ("device", "storing_device", "env_device", "policy_device")
        }
        begin = partial(
            super().__init__,
            create_envs,
            policy,
            frames_per_batch=frames_per_batch,
            total_frames=total_frames if total_frames >= 0 else 2**62,
            exploration_type=ExplorationType.RANDOM,
            collector_class=RayWorker,
            collector_kwargs=options,
            sync=not overlap,
            ray_init_config=_QUIET | (ray_init_config or {}),
            remote_configs=self._remote_config,
            weight_sync_schemes={},
            **devices,
        )
        self._start_within_timeout(begin)
        self.init_random_frames = init_random_frames
        self._begin()

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yields batches, ``[num_workers, ...]``, or of one actor where they overlap.

        Raises:
            RuntimeError: with the message of an environment that raised.
            WorkersLostError: if too many actors were lost, or there is no room for another.
        """
        pending = {self._request(i): i for i in range(self.num_workers)} if not self._sync else {}
        while self.collected_frames < self.total_frames:
            data = self._gather() if self._sync else self._first(pending)
            self.collected_frames += data.numel()
            yield data

    def update_policy_weights_(self, policy_or_weights: Any = None, **_: Any) -> None:
        """Sends weights to every actor, with the next request that it gets.

        Args:
            policy_or_weights: a module or its weights; the policy that the collector was made with
                if left out.
        """
        import ray

        source = self.policy if policy_or_weights is None else policy_or_weights
        weights = TensorDict.from_module(source) if isinstance(source, nn.Module) else source
        self._weights = ray.put(weights.data.to("cpu"))
        self._informed = [False] * self.num_workers

    def reset(self, *_: Any, **__: Any) -> None:
        """Begins new episodes."""
        for future in [actor.reset.remote() for actor in self.remote_collectors]:
            self._get(future, self._timeout)

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seeds the environments and the actors, and begins new episodes."""
        self._seed = seed
        for actor in self.remote_collectors:
            seed = self._get(actor.set_seed.remote(seed, static_seed), self._start_timeout)
        return seed

    def state_dict(self) -> OrderedDict[str, int]:
        """The frames so far."""
        return OrderedDict(frames=self.collected_frames)

    def load_state_dict(self, state_dict: dict[str, Any], **_: Any) -> None:
        """Goes on counting, so that the random frames are not repeated."""
        self.collected_frames = state_dict["frames"]
        self._random_left = max(0, self.init_random_frames - self.collected_frames)

    def _start_within_timeout(self, begin: Callable[[], None]) -> None:
        """Starts the actors in a thread of its own, since TorchRL waits for them without end."""
        failed: list[Exception] = []

        def run() -> None:
            try:
                begin()
            except Exception as error:  # noqa: BLE001 - raised below
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self._start_timeout)
        if thread.is_alive():
            self.stop_remote_collectors()  # which ends the wait
            raise self._no_room(self._start_timeout)
        if failed:
            raise failed[0]

    def _no_room(self, timeout: float) -> WorkersLostError:
        return WorkersLostError(
            f"no answer of a Ray worker within {timeout:.0f} s: each of {self.num_workers} asks "
            f"for {self._remote_config}, and the cluster may have no room"
        )

    def _begin(self) -> None:
        """Waits until the actors are there."""
        from ray.exceptions import RayActorError

        try:
            self.set_seed(self._seed)
        except RayActorError as error:
            self.shutdown()
            raise WorkersLostError(
                "a Ray worker could not start: is this version of alm-torchrl, with all that the "
                f"environment needs, installed on its machine? ({' '.join(str(error).split())})"
            ) from error

    def _gather(self) -> TensorDictBase:
        """A batch of every actor."""
        pending = {self._request(i): i for i in range(self.num_workers)}
        parts: dict[int, TensorDictBase] = {}
        while pending:
            index, data = self._wait(pending)
            if data is None:
                pending[self._request(index)] = index
            else:
                parts[index] = data
        return torch.stack([parts[i] for i in range(self.num_workers)])

    def _first(self, pending: dict[Any, int]) -> TensorDictBase:
        """The first batch that is there; its actor goes on before it is learnt from."""
        while True:
            index, data = self._wait(pending)
            pending[self._request(index)] = index
            if data is not None:
                return data

    def _request(self, index: int) -> Any:
        """Asks an actor for a batch, and sends it the newest weights if it has others."""
        weights = None if self._informed[index] else self._weights
        self._informed[index] = True
        self._random[index] = self._random_left > 0
        if self._random[index]:
            self._random_left -= self._frames_per_batch_corrected
        return self.remote_collectors[index].collect.remote(weights, self._random[index])

    def _wait(self, pending: dict[Any, int]) -> tuple[int, TensorDictBase | None]:
        """The next actor that has answered, and its batch, if it was not replaced."""
        import ray

        ready, _ = ray.wait(list(pending), timeout=self._timeout)
        future = ready[0] if ready else next(iter(pending))
        index = pending.pop(future)
        reason = f"did not answer within {self._timeout:.0f} s"
        if ready:
            try:
                data = ray.get(future, timeout=self._timeout)
            except ray.exceptions.RayError as error:  # of the actor, its node, or their objects
                reason = f"was lost ({type(error).__name__})"
            else:
                if isinstance(data, str):
                    raise RuntimeError(data)
                return index, data
        self._replace(index, reason)
        return index, None

    def _replace(self, index: int, reason: str) -> None:
        """Makes another actor in the place of one that was lost."""
        import ray

        if self._random[index]:
            self._random_left += self._frames_per_batch_corrected
        while True:
            self._count_restart(f"Ray worker {index} {reason}")
            with suppress(ray.exceptions.RayError):
                ray.kill(self.remote_collectors[index])
            kwargs, config = self.collector_kwargs[index], self._remote_config
            self.add_collectors([self._create_envs[index]], 1, self.policy, [kwargs], [config])
            actor = self.remote_collectors[index] = self.remote_collectors.pop()
            self._informed[index] = self._weights is None
            try:
                seed = self._seed + 1009 * self.restarts + index  # others than those before
                self._get(actor.set_seed.remote(seed), self._start_timeout)
                return
            except ray.exceptions.RayActorError as error:
                reason = f"was lost again ({type(error).__name__})"

    def _count_restart(self, reason: str) -> None:
        """Counts a lost actor, and warns of it.

        Raises:
            WorkersLostError: if it is one too many.
        """
        self.restarts += 1
        self._restart_times.append(time.monotonic())
        limit, times = self._restart_times.maxlen, self._restart_times
        if len(times) == limit and times[-1] - times[0] < _HOUR:
            raise WorkersLostError(
                f"{reason}, and it is loss {limit} within an hour: look for what ends the "
                "workers, such as the memory of the machine or a simulator that crashes"
            )
        warnings.warn(
            f"{reason}; it is replaced, and the episodes that were running end there", stacklevel=2
        )

    def _get(self, future: Any, timeout: float) -> Any:
        """An actor's answer outside collection, within the time that one may take.

        Raises:
            WorkersLostError: if there is none.
        """
        import ray

        try:
            return ray.get(future, timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            self.shutdown()
            raise self._no_room(timeout) from None


class RayWorker(Collector):
    """What collects in an actor."""

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seeds the environment and this process, and begins a new episode."""
        torch.manual_seed(seed)
        seed = super().set_seed(seed % 2**31, static_seed)
        self.reset()
        return seed

    def collect(self, weights: TensorDictBase | None, random: bool) -> TensorDictBase | str | None:
        """A batch, with the weights given and at random if asked, or what was raised.

        Ray would ask the actor for its length on the way to raising that elsewhere, and an endless
        collector has none, so that the actor would die of it.
        """
        if weights is not None:
            self.update_policy_weights_(weights)
        self.init_random_frames = float("inf") if random else -1
        try:
            return self.next()
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            return f"{type(error).__name__}: {' '.join(str(error).split())}"

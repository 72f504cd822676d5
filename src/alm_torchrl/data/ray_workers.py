"""Collection by Ray actors on one or several machines, which are replaced if they die."""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import ray
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs.utils import ExplorationType

from alm_torchrl.data.workers import WorkersLostError
from alm_torchrl.files import one_line

_HOUR = 3600.0

_Pending = dict[Any, tuple[int, bool]]  # a future batch: index of the actor, and whether random


class RayWorkers(BaseCollector):
    """A collector with Ray actors that replaces actors that die.

    Weights are sent through Ray's object store, with the request for the next batch. TorchRL's
    ``RayCollector`` sends them through a process group, which a new actor cannot join. The cluster
    runs until this process ends.
    """

    def __init__(
        self,
        create_env: Callable[[], Any],
        policy: Any,
        *,
        num_workers: int,
        overlap: bool,
        frames_per_batch: int,
        init_random_frames: int,
        total_frames: int,
        seed: int,
        timeout: float,
        start_timeout: float,
        max_restarts: int,
        remote_configs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if max_restarts < 0:
            raise ValueError(f"max_restarts must be at least 0, not {max_restarts}")
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False)
        self.num_workers = num_workers
        self.policy = policy
        self.requested_frames_per_batch, self.total_frames = frames_per_batch, total_frames
        self.init_random_frames = init_random_frames
        self.collected_frames = self.restarts = 0
        self._restart_times: deque[float] = deque(maxlen=max_restarts + 1)
        self._overlap, self._timeout, self._start_timeout = overlap, timeout, start_timeout
        self._random_left = init_random_frames
        self._weights: Any = None  # a reference into the object store
        self._outdated: set[int] = set()  # actors that do not have the newest weights
        self._frames = frames_per_batch if overlap else frames_per_batch // num_workers
        self._resources = remote_configs or {"num_cpus": 1}
        self._start_actor: Callable[[], Any] = partial(
            ray.remote(**self._resources)(RayWorker).remote,
            create_env,
            policy,
            frames_per_batch=self._frames,
            total_frames=-1,
            exploration_type=ExplorationType.RANDOM,
            **options,
        )
        self.actors: list[Any] = [self._start_actor() for _ in range(num_workers)]
        try:
            self.set_seed(seed)  # waits until the actors have started
        except ray.exceptions.RayActorError as error:
            self.shutdown()
            raise WorkersLostError(
                "a Ray worker could not start: install this version of alm-torchrl and the "
                f"environment's packages on its machine ({one_line(error)})"
            ) from error

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yields batches: ``[num_workers, ...]``, or of one actor with ``overlap``."""
        pending: _Pending = {}
        parts: dict[int, TensorDictBase] = {}
        while self.total_frames < 0 or self.collected_frames < self.total_frames:
            if not pending:
                for index in range(self.num_workers):
                    self._request(index, pending)
            index, data = self._next_answer(pending)
            if self._overlap:
                self._request(index, pending)
            else:
                parts[index] = data
                if len(parts) < self.num_workers:
                    continue
                data = torch.stack([parts.pop(i) for i in range(self.num_workers)])
            self.collected_frames += data.numel()
            yield data

    def update_policy_weights_(self, policy_or_weights: Any = None, **_: Any) -> None:
        """Sends weights, by default the policy's, to each actor with its next request."""
        source = self.policy if policy_or_weights is None else policy_or_weights
        weights = TensorDict.from_module(source) if isinstance(source, nn.Module) else source
        self._weights = ray.put(weights.data.to("cpu"))
        self._outdated = set(range(self.num_workers))

    def reset(self, *_: Any, **__: Any) -> None:
        """Resets all environments."""
        for answer in [actor.reset.remote() for actor in self.actors]:
            self._get(answer, self._timeout)

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seeds the actors, and seeds and resets their environments."""
        self._seed = seed
        for actor in self.actors:
            seed = self._get(actor.set_seed.remote(seed, static_seed), self._start_timeout)
        return seed

    def state_dict(self) -> OrderedDict[str, int]:
        """Returns the frame count."""
        return OrderedDict(frames=self.collected_frames)

    def load_state_dict(self, state_dict: dict[str, Any], **_: Any) -> None:
        """Restores the frame count, so that the random frames are not repeated."""
        self.collected_frames = state_dict["frames"]
        self._random_left = max(0, self.init_random_frames - self.collected_frames)

    def shutdown(self, *_: Any, **__: Any) -> None:
        """Ends the actors."""
        while self.actors:
            ray.kill(self.actors.pop())

    def _request(self, index: int, pending: _Pending) -> None:
        """Requests a batch from an actor; sends the newest weights if it does not have them."""
        weights = self._weights if index in self._outdated else None
        self._outdated.discard(index)
        random = self._random_left > 0
        self._random_left -= random * self._frames
        pending[self.actors[index].collect.remote(weights, random)] = index, random

    def _next_answer(self, pending: _Pending) -> tuple[int, TensorDictBase]:
        """Returns the next batch and the index of its actor; replaces lost actors."""
        while True:
            ready, _ = ray.wait(list(pending), timeout=self._timeout)
            future = ready[0] if ready else next(iter(pending))
            index, random = pending.pop(future)
            reason = f"did not answer within {self._timeout:.0f} s"
            if ready:
                try:
                    data = ray.get(future, timeout=self._timeout)
                except ray.exceptions.RayError as error:  # of the actor, its machine or its objects
                    reason = f"was lost ({type(error).__name__})"
                else:
                    if isinstance(data, str):
                        raise RuntimeError(data)
                    return index, data
            self._random_left += random * self._frames
            self._replace(index, reason)
            self._request(index, pending)

    def _replace(self, index: int, reason: str) -> None:
        """Replaces a lost actor by a new one."""
        limit, times = self._restart_times.maxlen, self._restart_times
        while True:
            self.restarts += 1
            times.append(time.monotonic())
            if len(times) == limit and times[-1] - times[0] < _HOUR:
                raise WorkersLostError(
                    f"Ray worker {index} {reason}; this is loss {limit} within an hour: check the "
                    "memory of the machines, and whether the simulator crashes"
                )
            warnings.warn(
                f"Ray worker {index} {reason}; it is replaced, and its episodes are truncated",
                stacklevel=2,
            )
            with suppress(ray.exceptions.RayError):
                ray.kill(self.actors[index])
            self.actors[index] = self._start_actor()
            self._outdated.add(index)
            seed = self._seed + 1009 * self.restarts + index  # a new seed
            try:
                self._get(self.actors[index].set_seed.remote(seed), self._start_timeout)
                return
            except ray.exceptions.RayActorError as error:
                reason = f"was lost again ({type(error).__name__})"

    def _get(self, answer: Any, timeout: float) -> Any:
        """Returns an actor's answer; raises a :class:`WorkersLostError` after the timeout."""
        try:
            return ray.get(answer, timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            self.shutdown()
            raise WorkersLostError(
                f"a Ray worker did not answer within {timeout:.0f} s: check that the cluster has "
                f"room for {self.num_workers} workers with {self._resources} each"
            ) from None


class RayWorker(Collector):
    """The collector of one actor."""

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seeds this process, and seeds and resets the environment."""
        torch.manual_seed(seed)
        seed = super().set_seed(seed % 2**31, static_seed)
        self.reset()
        return seed

    def collect(self, weights: TensorDictBase | None, random: bool) -> TensorDictBase | str:
        """Returns a batch, or the message of an exception."""
        if weights is not None:
            self.update_policy_weights_(weights)
        self.init_random_frames = float("inf") if random else -1
        try:
            return self.next()
        except Exception as error:  # noqa: BLE001 - raised by RayWorkers
            # Raising here would kill the actor, because Ray calls len() on an endless collector.
            return one_line(error)

"""Collection by Ray actors on one or several machines; an actor that dies is replaced."""

from __future__ import annotations

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

from alm_torchrl.data.workers import WorkersLostError, call_with_timeout
from alm_torchrl.files import one_line

_QUIET = {"include_dashboard": False, "log_to_driver": False}  # options of a cluster started here
_HOUR = 3600.0


class RayWorkers(RayCollector):
    """A :class:`~torchrl.collectors.distributed.RayCollector` that replaces actors that die.

    Weights are sent through Ray's object store, with the request for the next batch: the process
    group that TorchRL uses would have to be rebuilt whenever an actor is replaced. An exception of
    an environment ends the collection with its message. The arguments are those of
    :func:`~alm_torchrl.data.make_collector` and of TorchRL's collectors.
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
            raise ImportError("kind='ray' requires Ray: pip install 'alm-torchrl[ray]'")
        if max_restarts < 0:
            raise ValueError(f"max_restarts must be at least 0, not {max_restarts}")
        self.restarts = 0
        self._restart_times: deque[float] = deque(maxlen=max_restarts + 1)
        self._create_envs, self._seed = create_envs, seed
        self._remote_config = remote_configs or {"num_cpus": 1}
        self._timeout, self._start_timeout = timeout, start_timeout
        self._weights: Any = None  # a reference into the object store
        self._has_weights = [True] * len(create_envs)  # whether the actor has the newest weights
        self._random = [False] * len(create_envs)  # whether the actor's pending batch is random
        self._random_left = init_random_frames
        names = ("device", "storing_device", "env_device", "policy_device")
        devices = {name: options.pop(name, None) for name in names}
        start = partial(
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
        try:
            call_with_timeout(start, start_timeout)
        except TimeoutError:
            self.stop_remote_collectors()  # which also ends the thread
            raise self._no_answer(start_timeout) from None
        self.init_random_frames = init_random_frames
        self._seed_new_actors()

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yields batches: ``[num_workers, ...]``, or of one actor with ``overlap``."""
        pending: dict[Any, int] = {}
        parts: dict[int, TensorDictBase] = {}
        while self.collected_frames < self.total_frames:
            if not pending:
                pending = {self._request(i): i for i in range(self.num_workers)}
            index, data = self._wait(pending)
            if data is None or not self._sync:
                pending[self._request(index)] = index
            if data is None:
                continue
            if self._sync:
                parts[index] = data
                if len(parts) < self.num_workers:
                    continue
                data = torch.stack([parts.pop(i) for i in range(self.num_workers)])
            self.collected_frames += data.numel()
            yield data

    def update_policy_weights_(self, policy_or_weights: Any = None, **_: Any) -> None:
        """Sends weights, by default the policy's, to each actor with its next request."""
        import ray

        source = self.policy if policy_or_weights is None else policy_or_weights
        weights = TensorDict.from_module(source) if isinstance(source, nn.Module) else source
        self._weights = ray.put(weights.data.to("cpu"))
        self._has_weights = [False] * self.num_workers

    def reset(self, *_: Any, **__: Any) -> None:
        """Resets all environments."""
        for future in [actor.reset.remote() for actor in self.remote_collectors]:
            self._get(future, self._timeout)

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seeds the actors and their environments, and resets these."""
        self._seed = seed
        for actor in self.remote_collectors:
            seed = self._get(actor.set_seed.remote(seed, static_seed), self._start_timeout)
        return seed

    def state_dict(self) -> OrderedDict[str, int]:
        """Returns the frame count."""
        return OrderedDict(frames=self.collected_frames)

    def load_state_dict(self, state_dict: dict[str, Any], **_: Any) -> None:
        """Restores the frame count, so that the random frames are not repeated."""
        self.collected_frames = state_dict["frames"]
        self._random_left = max(0, self.init_random_frames - self.collected_frames)

    def _seed_new_actors(self) -> None:
        """Seeds the actors, which waits until they have started."""
        from ray.exceptions import RayActorError

        try:
            self.set_seed(self._seed)
        except RayActorError as error:
            self.shutdown()
            raise WorkersLostError(
                "a Ray worker could not start: install this version of alm-torchrl and the "
                f"environment's packages on its machine ({one_line(error)})"
            ) from error

    def _request(self, index: int) -> Any:
        """Requests a batch from an actor; sends the newest weights if it does not have them."""
        weights = None if self._has_weights[index] else self._weights
        self._has_weights[index] = True
        self._random[index] = self._random_left > 0
        if self._random[index]:
            self._random_left -= self._frames_per_batch_corrected
        return self.remote_collectors[index].collect.remote(weights, self._random[index])

    def _wait(self, pending: dict[Any, int]) -> tuple[int, TensorDictBase | None]:
        """Returns the next actor that answers and its batch, or None if it was replaced."""
        import ray

        ready, _ = ray.wait(list(pending), timeout=self._timeout)
        future = ready[0] if ready else next(iter(pending))
        index = pending.pop(future)
        reason = f"did not answer within {self._timeout:.0f} s"
        if ready:
            try:
                data = ray.get(future, timeout=self._timeout)
            except ray.exceptions.RayError as error:  # of the actor, its machine, or its objects
                reason = f"was lost ({type(error).__name__})"
            else:
                if isinstance(data, str):
                    raise RuntimeError(data)
                return index, data
        self._replace(index, reason)
        return index, None

    def _replace(self, index: int, reason: str) -> None:
        """Starts a new actor in place of a lost one."""
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
            self._has_weights[index] = self._weights is None
            try:
                seed = self._seed + 1009 * self.restarts + index  # not used before
                self._get(actor.set_seed.remote(seed), self._start_timeout)
                return
            except ray.exceptions.RayActorError as error:
                reason = f"was lost again ({type(error).__name__})"

    def _count_restart(self, reason: str) -> None:
        """Warns of a lost actor; raises a :class:`WorkersLostError` if there were too many."""
        self.restarts += 1
        self._restart_times.append(time.monotonic())
        limit, times = self._restart_times.maxlen, self._restart_times
        if len(times) == limit and times[-1] - times[0] < _HOUR:
            raise WorkersLostError(
                f"{reason}, loss {limit} within an hour: check the memory of the machines, "
                "and whether the simulator crashes"
            )
        warnings.warn(f"{reason}; it is replaced, and its episodes are truncated", stacklevel=2)

    def _get(self, future: Any, timeout: float) -> Any:
        """Returns an actor's answer; raises a :class:`WorkersLostError` after the timeout."""
        import ray

        try:
            return ray.get(future, timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            self.shutdown()
            raise self._no_answer(timeout) from None

    def _no_answer(self, timeout: float) -> WorkersLostError:
        return WorkersLostError(
            f"no answer of a Ray worker within {timeout:.0f} s: each of {self.num_workers} asks "
            f"for {self._remote_config}; check that the cluster has room for them"
        )


class RayWorker(Collector):
    """The collector of one actor."""

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seeds this process and the environment, and resets it."""
        torch.manual_seed(seed)
        seed = super().set_seed(seed % 2**31, static_seed)
        self.reset()
        return seed

    def collect(self, weights: TensorDictBase | None, random: bool) -> TensorDictBase | str | None:
        """Returns a batch, or the message of an exception."""
        if weights is not None:
            self.update_policy_weights_(weights)
        self.init_random_frames = float("inf") if random else -1
        try:
            return self.next()
        except Exception as error:  # noqa: BLE001 - raised by RayWorkers
            # Raised here, it would kill the actor: Ray would call len() of an endless collector.
            return one_line(error)

"""A data source that steps the environment and yields training batches."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector
from torchrl.data import ReplayBuffer
from torchrl.envs import EnvBase

from alm_torchrl.envs.failures import EnvironmentFailedError, check_finite, failing_as
from alm_torchrl.files import one_line
from alm_torchrl.modules import NoiseSchedule, plain_numbers
from alm_torchrl.training.acting import CPUPolicy, PolicyPublisher
from alm_torchrl.training.seeds import StackedNoise


@dataclass(eq=False, repr=False)
class ExperienceStream:
    """Steps the environment, stores the steps, and yields training batches.

    The warm-up stores frames, and then yields ``warmup_updates`` batches. After the warm-up, the
    stream stores each collected batch, yields ``updates_per_step`` batches per environment step,
    and advances the noise, so acting and the updates after it use the same noise scale. If a Ray
    actor was replaced, it truncates the running episodes in the replay buffer.

    Args:
        collector: an endless TorchRL collector.
        replay: see :func:`alm_torchrl.data.make_replay_buffer`.
        total_steps: environment steps after the warm-up.
        warmup_steps: frames collected before the first update.
        warmup_updates: updates on the warm-up frames, before the policy acts.
        updates_per_step: updates per environment step; may be a fraction.
        noise: the noise schedule of the agent.
        policy: gets the new weights: the policy of the collector, or the publisher for workers.
        on_batch: called with every stored batch, such as :meth:`ALMAgent.update_statistics`.
        num_seeds: seeds with equal shares of the environments. Steps, frames and updates are
            counted for one seed.
        num_processes: processes that train one agent. Steps and frames are counted for all.
    """

    collector: BaseCollector
    replay: ReplayBuffer
    _: KW_ONLY
    total_steps: int
    warmup_steps: int = 5000
    warmup_updates: int = 0
    updates_per_step: float = 1.0
    noise: NoiseSchedule | StackedNoise | None = None
    policy: CPUPolicy | PolicyPublisher | None = None
    on_batch: Callable[[TensorDictBase], None] | None = None
    num_seeds: int = 1
    num_processes: int = 1

    def __post_init__(self) -> None:
        for name in ("total_steps", "warmup_steps", "warmup_updates", "updates_per_step"):
            setattr(self, name, plain_numbers(getattr(self, name)))
        if self.total_steps < 1 or self.warmup_steps < 0 or self.updates_per_step <= 0:
            raise ValueError(
                "expected total_steps >= 1, warmup_steps >= 0 and updates_per_step > 0, got "
                f"{self.total_steps}, {self.warmup_steps} and {self.updates_per_step}"
            )
        warmup_updates = self.warmup_updates
        if warmup_updates < 0 or (warmup_updates and not self.warmup_steps):
            raise ValueError(f"{warmup_updates=} must not be negative, and needs warmup_steps > 0")
        self.frames = self.updates = 0
        self.stopping = False  # True ends the run after this update, or batch of the warm-up
        self._batches = self._last_frames = self._restarts = 0
        self.on_collected: Callable[[], None] = lambda: None
        self.episode_returns: deque[float] = deque(maxlen=100)
        self._ages: deque[float] = deque(maxlen=100)
        if len(self) == self.warmup_updates:
            raise ValueError(
                f"total_steps={self.total_steps} with updates_per_step={self.updates_per_step} "
                "give no update: raise one of them"
            )

    @property
    def steps(self) -> int:
        """Environment steps after the warm-up, as in the authors' curves."""
        return max(0, self.frames - self.warmup_steps)

    @property
    def env(self) -> EnvBase | BaseCollector:
        """The environments, or the collector if they run in its workers."""
        return getattr(self.collector, "env", self.collector)

    @property
    def policy_staleness(self) -> float | None:
        """Number of updates that the acting weights lack, as a mean over the last 100 batches.

        It is None before the first batch of a :class:`VersionedPolicy`.
        """
        return sum(self._ages) / len(self._ages) if self._ages else None

    def __len__(self) -> int:
        """Returns the number of updates; without it, Lightning would collect one step ahead."""
        return self._due(self.total_steps)

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Collects steps and yields batches; failures raise :class:`EnvironmentFailedError`."""
        batches = iter(self.collector)
        while True:
            learning = self.frames >= self.warmup_steps
            due = self._due(min(self.steps, self.total_steps)) if learning else 0
            while self.updates < due:
                self.updates += 1
                yield self.replay.sample()
            if self.updates >= len(self):
                return
            if self.stopping and not self.updates:
                raise KeyboardInterrupt
            if self.steps and self.noise is not None:
                self.noise.advance(self._last_frames)
            data = self._collect(batches)
            if data is None:
                return
            self._store(data)
            self.on_collected()

    def state_dict(self) -> dict[str, Any]:
        """Returns the counters, without the replay buffer."""
        return {
            "frames": self.frames,
            "updates": self.updates,
            "batches": self._batches,
            "last_frames": self._last_frames,
            "episode_returns": list(self.episode_returns),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counters."""
        self.frames = state_dict["frames"]
        self.updates = state_dict["updates"]
        self._last_frames = state_dict["last_frames"]
        self.episode_returns.extend(state_dict["episode_returns"])
        self._batches = state_dict["batches"]
        collected = self.frames * self.num_seeds // self.num_processes
        self.collector.load_state_dict({"frames": collected, "iter": self._batches}, strict=False)

    def restart(self) -> None:
        """Resets the environments and publishes the newest weights, for a resumed run."""
        with failing_as("the environment failed when it was reset"):
            self.collector.reset()
        if self.policy is not None:
            self.policy.restart(self.updates)

    def shutdown(self) -> None:
        """Closes the environments and ends the workers; errors become warnings."""
        try:
            self.collector.shutdown()
        except Exception as error:  # noqa: BLE001 - an environment may raise anything
            warnings.warn(f"the environment failed on closing: {one_line(error)}", stacklevel=2)

    def _due(self, steps: int) -> int:
        """Returns the number of updates that are due after ``steps`` environment steps."""
        return self.warmup_updates + int(steps * self.updates_per_step)

    def _collect(self, batches: Iterator[TensorDictBase]) -> TensorDictBase | None:
        """Returns the collector's next batch, or None at its end; raises if it is not finite."""
        where = f"after frame {self.frames}"
        with failing_as(f"the environment failed {where}"):
            if (self.steps or self.updates) and self.policy is not None:
                self.policy.publish(self.updates)
            data = next(batches, None)
        if data is not None:
            check_finite(data, where, EnvironmentFailedError)
        return data

    def _store(self, data: TensorDictBase) -> None:
        restarts = getattr(self.collector, "restarts", 0)
        if restarts != self._restarts:
            self._restarts = restarts
            self.replay.truncate_open_episodes()
        acted_with = data.get("policy_update", None)
        if acted_with is not None and self.frames >= self.warmup_steps:
            self._ages.append(self.updates - acted_with.float().mean().item())
        self.replay.extend(data)
        if self.on_batch is not None:
            self.on_batch(data)
        self._batches += 1
        self._last_frames = data.numel() * self.num_processes // self.num_seeds
        self.frames += self._last_frames
        returns = data.get(("next", "episode_reward"), None)
        if returns is not None:
            self.episode_returns.extend(returns[data.get(("next", "done"))].tolist())

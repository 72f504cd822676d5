"""Experience as a data source: environment steps and the batches that follow them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector
from torchrl.data import ReplayBuffer

from alm_torchrl.modules import NoiseSchedule
from alm_torchrl.training.acting import PolicyCopy
from alm_torchrl.training.seeds import StackedNoise

__all__ = ["Experience"]


class Experience:
    """Steps the environment, stores what happened, and yields the batches to learn from.

    Warm-up frames are stored without an update. After them every collected batch is stored first,
    then sampled as often as ``updates_per_step`` asks, and only then is the noise moved on, so
    that acting and the updates after it see the same scale.

    Args:
        collector: a TorchRL collector that never stops by itself.
        replay: the buffer that :func:`alm_torchrl.data.make_replay_buffer` makes.
        total_steps: environment steps to learn from, after the warm-up (the authors' counter).
        warmup_steps: frames collected before the first update.
        updates_per_step: updates for each environment step; may be a fraction.
        noise: the schedule to advance with every environment step.
        policy: the collector's, if it has to be told when there are new weights.
        num_seeds: seeds trained at once, between which the collector's environments are divided;
            steps, frames and updates are then those of one seed.

    Raises:
        ValueError: if a number is out of range, or so small that no update would follow.
    """

    def __init__(
        self,
        collector: BaseCollector,
        replay: ReplayBuffer,
        *,
        total_steps: int,
        warmup_steps: int = 5000,
        updates_per_step: float = 1.0,
        noise: NoiseSchedule | StackedNoise | None = None,
        policy: PolicyCopy | None = None,
        num_seeds: int = 1,
    ) -> None:
        if total_steps < 1 or warmup_steps < 0 or updates_per_step <= 0:
            raise ValueError(
                "expected total_steps >= 1, warmup_steps >= 0 and updates_per_step > 0, got "
                f"{total_steps}, {warmup_steps} and {updates_per_step}"
            )
        self.collector = collector
        self.replay = replay
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.updates_per_step = updates_per_step
        self.noise = noise
        self.policy = policy
        self.num_seeds = num_seeds
        self.frames = 0
        self.episode_returns: deque[float] = deque(maxlen=100)
        if len(self) < 1:
            raise ValueError(
                f"{total_steps} steps at {updates_per_step} updates per step give no update"
            )

    @property
    def steps(self) -> int:
        """Environment steps after the warm-up: the x-axis of the authors' curves."""
        return max(0, self.frames - self.warmup_steps)

    def __len__(self) -> int:
        """Updates altogether. Without a length, Lightning would collect one step ahead."""
        return int(self.total_steps * self.updates_per_step)

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Yields ``len(self)`` batches, collecting as it goes."""
        updates = 0
        for data in self.collector:
            self._store(data)
            due = min(int(self.steps * self.updates_per_step), len(self))
            while updates < due:
                updates += 1
                yield self.replay.sample()
            if updates >= len(self):
                return
            if self.noise is not None and self.steps > 0:
                self.noise.advance(data.numel() // self.num_seeds)
            if self.policy is not None and self.steps > 0:
                self.policy.publish()

    def _store(self, data: TensorDictBase) -> None:
        self.replay.extend(data)
        self.frames += data.numel() // self.num_seeds
        outcome = data.get("next")
        returns = outcome.get("episode_reward", None)
        if returns is not None:
            self.episode_returns.extend(returns[outcome.get("done")].tolist())

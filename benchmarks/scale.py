"""A whole training step with more environments, seeds and transitions; collection in workers."""

from __future__ import annotations

import ctypes
import os
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from tensordict import TensorDict
from torchrl.envs import EnvBase, StepCounter, TransformedEnv

from alm_torchrl.agent import ALMAgent
from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.envs import make_env
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import (
    PolicyPublisher,
    TargetUpdate,
    Update,
    VersionedPolicy,
    make_optimizer,
    stack_seeds,
)
from benchmarks.environments import Pendulums
from benchmarks.measure import Case
from benchmarks.workloads import Sizes, Task, windows

Kind: TypeAlias = Literal["pendulums", "environments", "seeds", "transitions"]
#: The parts of a training step, in order.
PARTS = ("collect", "write", "draw", "update")
#: Transitions of each seed in the replay buffer, unless their number is varied.
CAPACITY = 100_000
#: Random transitions that are written at a time to fill a replay buffer.
CHUNK = 100_000


class TrainingStep:
    """The parts of a training step, each a method; call them in the order of ``PARTS``.

    One step of every environment, its write to a full replay buffer, a draw, and an update of every
    seed. The replay buffer is full of random transitions in episodes of up to 1,000 steps.

    Args:
        env: environments ``[num_envs]``, or one environment.
        task: sizes of observation and action.
        device: device of the update.
        sizes: sizes of networks and batch.
        seeds: number of seeds trained together.
        capacity: size of the replay buffer.
        storage: see :func:`~alm_torchrl.data.make_replay_buffer`.
    """

    def __init__(
        self,
        env: EnvBase,
        task: Task,
        device: torch.device,
        sizes: Sizes,
        *,
        seeds: int = 1,
        capacity: int,
        storage: Literal["memory", "memmap"] = "memory",
    ) -> None:
        num_envs = env.numel()
        agents = [make_agent(env, sizes).to(device) for _ in range(seeds)]
        losses = [ALMLoss(**agent.networks(), horizon=sizes.horizon) for agent in agents]
        agent, loss = stack_seeds(agents, losses)
        self._update = Update(loss, make_optimizer(loss), TargetUpdate(loss, tau=0.005))
        collector = make_collector(
            env, agent.policy(), frames_per_batch=num_envs, policy_device=device
        )
        self._collected = iter(collector)
        self.replay = make_replay_buffer(
            capacity // num_envs * num_envs,
            batch_size=sizes.batch,
            window_length=sizes.horizon,
            num_envs=num_envs,
            device=device,
            per_env=seeds > 1,
            storage=storage,
        )
        self._fill(task, num_envs)

    def collect(self) -> None:
        """Steps every environment."""
        self._data = next(self._collected)

    def write(self) -> None:
        """Writes these steps to the replay buffer."""
        self.replay.extend(self._data)

    def draw(self) -> None:
        """Draws a batch of windows for every seed."""
        self._batch = self.replay.sample()

    def update(self) -> None:
        """Makes one update of every seed."""
        self._update(self._batch)

    def evict(self) -> None:
        """Removes the files of the replay buffer from the memory; on Linux only."""
        from mmap import MADV_DONTNEED, PAGESIZE

        advise = ctypes.CDLL(None).madvise
        for value in self.replay.storage.get(slice(None)).values(True, True):
            start = value.data_ptr() // PAGESIZE * PAGESIZE
            end = value.data_ptr() + value.nbytes
            with Path(value.filename).open("rb+") as file:
                os.fsync(file.fileno())  # only pages without changes can be removed
                advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _fill(self, task: Task, num_envs: int) -> None:
        steps = self.replay.max_steps
        chunk = min(steps, CHUNK // num_envs)
        shape = (chunk,) if num_envs == 1 else (num_envs, chunk)
        rows = windows(task, shape, torch.device("cpu"))
        rows["next", "done"][..., 999::1000, :] = True
        rows["next", "done"][..., -1, :] = True
        for start in range(0, steps, chunk):
            self.replay.extend(rows[..., : steps - start])


def make_agent(env: EnvBase, sizes: Sizes) -> ALMAgent:
    """Returns an agent of the given sizes."""
    return ALMAgent.from_env(env, hidden_dim=sizes.hidden, dynamics_hidden_dim=sizes.dynamics)


def training_step(
    kind: Kind, count: int, task: Task, device: torch.device, sizes: Sizes
) -> TrainingStep:
    """Returns a step with ``count`` of the given kind, and one of everything else.

    ``"pendulums"`` are computed in one batch, and ``"environments"`` of the task one by one. Each
    of the ``"seeds"`` has an environment. ``"transitions"`` are in memory-mapped files.
    """
    if kind == "pendulums":
        env = TransformedEnv(Pendulums(count, device), StepCounter(200))
        task = Task("", observations=3, actions=1)
        return TrainingStep(env, task, device, sizes, capacity=CAPACITY)
    num_envs = 1 if kind == "transitions" else count
    env = make_env(task.id, seed=0, num_envs=num_envs, **task.options())
    options: dict[str, Any] = {"capacity": CAPACITY}
    if kind == "seeds":
        options = {"seeds": count, "capacity": CAPACITY * count}
    elif kind == "transitions":
        options = {"capacity": count, "storage": "memmap"}
    return TrainingStep(env, task, device, sizes, **options)


class Collecting:
    """Collects one batch at each call; see :func:`~alm_torchrl.data.make_collector`."""

    def __init__(self, env: Any, policy: VersionedPolicy, frames: int, **options: Any) -> None:
        self.collector = make_collector(env, policy, frames_per_batch=frames, seed=0, **options)
        self._batches = iter(self.collector)
        self.publisher = PolicyPublisher(policy, self.collector)

    def __call__(self) -> Any:
        """Returns the next batch."""
        return next(self._batches)

    def send(self) -> None:
        """Sends the weights of the policy."""
        self.publisher.restart(1)


def worker_cases(
    task: Task, frames: int, sizes: Sizes, workers: dict[str, int]
) -> tuple[list[Case], str]:
    """Returns cases that collect ``frames`` frames or send weights, and a note with their bytes.

    Args:
        task: the task; every worker has one environment.
        frames: frames of a batch, over all workers.
        sizes: sizes of the networks.
        workers: number of workers for each kind of collector.
    """
    make = partial(make_env, task.id, **task.options())
    env = make()
    policy = VersionedPolicy(make_agent(env, sizes).policy())
    alone = Collecting(env, policy, frames)
    cases = [Case("collect, in this process", alone, frames=frames)]
    for kind, count in workers.items():
        collecting = Collecting(make, policy, frames, kind=kind, num_workers=count)
        name = f"{count} workers, {kind}"
        cases.append(Case(f"collect, {name}", collecting, frames=frames))
        cases.append(Case(f"send weights, {name}", collecting.send))
    weights, batch = TensorDict.from_module(policy).data, alone()
    return cases, (
        f"{task.id}, {sizes}; the weights have {_bytes(weights):,} bytes, and a frame "
        f"{_bytes(batch) // batch.numel():,}"
    )


def _bytes(data: Any) -> int:
    return sum(value.nbytes for value in data.values(True, True))

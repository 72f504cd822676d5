"""A tiny training in two processes: ``python -m tests.training.ranks MODE FOLDER UPDATES``.

Lightning starts the second process by the same command. Each leaves what it holds at the end as
``rank<n>.pt`` in the folder.

``step`` updates on the batches in ``batches.pt``, of which each process takes every other row, with
every random draw replaced by its mean. ``run`` collects for itself, and so does ``fail``, where the
environment of the second process raises before long. ``bf16`` is ``run`` in bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import Transform, TransformedEnv
from torchrl.envs.utils import ExplorationType

from alm_torchrl.training import ALMModule, find_checkpoint, make_trainer, silence_library_warnings
from tests.training import tiny


class GivenBatches:
    """Yields batches that are given, in place of experience."""

    def __init__(self, batches: list[TensorDictBase]) -> None:
        self.batches = batches
        self.updates = self.frames = self.steps = self.warmup_updates = 0
        self.episode_returns: list[float] = []
        self.policy_staleness = None

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[TensorDictBase]:
        for batch in self.batches:
            self.updates += 1
            yield batch


def generated_rows(tensordict: TensorDictBase) -> torch.Tensor:
    """The same rows of the batch in one process and in two: pairs of neighbors alternate."""
    step = 2 if tensordict.shape[0] > 4 else 1
    return torch.arange(tensordict.shape[0]) // step % 2 == 0


def given_module(batches: list[TensorDictBase]) -> ALMModule:
    """A module whose updates depend on the batches alone."""
    module = tiny.make_module().double()
    module.loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    module.loss.generated_rows = generated_rows
    module.experience = GivenBatches(batches)
    return module


class Failing(Transform):
    """Raises at the 60th step."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self.count += 1
        if self.count == 60:
            raise ValueError("the joint came off")
        return next_tensordict


def main(mode: str, folder: Path, updates: int) -> None:
    """Trains in two processes."""
    start = find_checkpoint(folder / "checkpoints")
    trainer = make_trainer(
        folder,
        seed=0,
        title="ranks",
        eval_every=updates,
        checkpoint_every=None if mode == "step" else 10,
        accelerator="cpu",
        devices=2,
        tensorboard=False,
        start=start,
    )
    trainer.progress_bar_callback.disable()
    if mode == "step":
        batches = torch.load(folder / "batches.pt", weights_only=False)
        module = given_module([batch[trainer.global_rank :: 2] for batch in batches])
        trainer.limit_val_batches = 0
    else:
        fails = mode == "fail" and trainer.global_rank == 1
        env = TransformedEnv(tiny.make_env(), Failing()) if fails else None
        precision = "bf16-mixed" if mode == "bf16" else "32-true"
        module = tiny.make_module(updates, num_processes=2, env=env, precision=precision)
    trainer.fit(module)
    torch.save(
        {
            "loss": module.loss.state_dict(),
            "observations": None if mode == "step" else observations(module),
            "drawn": torch.rand(3),
        },
        folder / f"rank{trainer.global_rank}.pt",
    )


def observations(module: ALMModule) -> TensorDict:
    """What the replay buffer of this process holds."""
    return module.experience.replay.storage.get(slice(None))["observation"].clone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    silence_library_warnings()
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))

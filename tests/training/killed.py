"""Runs a tiny training in a child for every line of standard input, which names its folder.

The libraries are imported once, so that a test can kill many runs in a short time. The child's
process number is printed, and its exit status once it has ended.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from alm_torchrl.training import find_checkpoint, make_trainer, silence_library_warnings
from tests.training.tiny import make_module


def main(folder: Path) -> None:
    """Trains for 400 updates, from the newest checkpoint in the folder."""
    start = find_checkpoint(folder / "checkpoints")
    trainer = make_trainer(
        folder,
        seed=0,
        title="killed",
        eval_every=100,
        checkpoint_every=5,
        accelerator="cpu",
        tensorboard=False,
        start=start,
    )
    trainer.progress_bar_callback.disable()
    trainer.fit(make_module(400))


if __name__ == "__main__":
    torch.set_num_threads(1)
    silence_library_warnings()
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            status = 1
            try:
                main(Path(line.strip()))
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

"""Sampling of windows: their first transitions, and the transitions that follow."""

from __future__ import annotations

from typing import Any

import torch
from torchrl.data import RandomSampler, Storage, TensorStorage
from torchrl.data.replay_buffers import SampleUnit, Writer


class EpisodeWindows(SampleUnit):
    """Expands each sampled transition to the window that starts there.

    A window ends with its episode or with the newest transition. The rest of the window repeats its
    last transition and is False in ``info["validity_mask"]``. Unlike
    :class:`~torchrl.data.Sequence`, it does not synchronize with the GPU.
    """

    def __init__(self, length: int, writer: Writer) -> None:
        self.length = length
        self.writer = writer

    def expand(
        self, index: torch.Tensor | tuple, info: dict[str, Any], storage: Storage
    ) -> tuple[torch.Tensor | tuple, dict[str, Any]]:
        """Expands ``n`` indices (rows, or rows and environments) to those of ``n`` windows.

        The indices and ``info["validity_mask"]`` are ``[n * T]``. All steps of a window have the
        ``info["priority_weight"]`` of its first transition.
        """
        start, *envs = index if isinstance(index, tuple) else (index,)
        written = storage.shape[0]
        newest = (self.writer.state_dict()["_cursor"] - 1) % written
        steps = torch.arange(self.length, device=start.device)
        reach = torch.minimum(steps, ((newest - start) % written).unsqueeze(1))
        envs = [env.unsqueeze(1).expand_as(reach) for env in envs]
        done = storage.get(slice(None)).get(("next", "done"))
        ends = done[(start.unsqueeze(1) + reach) % written, *envs].squeeze(-1)
        open_before = torch.cat([torch.ones_like(ends[:, :1]), ~ends[:, :-1]], 1)
        valid = (open_before & (reach == steps)).int().cumprod(1)
        last = valid.sum(1, keepdim=True) - 1
        rows = (start.unsqueeze(1) + torch.minimum(steps, last)) % written
        info = {**info, "validity_mask": valid.bool().flatten()}
        if "priority_weight" in info:
            info["priority_weight"] = info["priority_weight"].repeat_interleave(self.length)
        flat = tuple(part.flatten() for part in (rows, *envs))
        return (flat if envs else flat[0]), info


class PerEnvSampler(RandomSampler):
    """Samples the same number of transitions from each environment, in environment order."""

    def sample(self, storage: TensorStorage, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """Returns rows and environments, each ``[num_envs * batch_size]``."""
        written, num_envs = storage.shape
        total, device = num_envs * batch_size, storage.device
        rows = torch.randint(written, (total,), generator=storage._rng, device=device)
        return (rows, torch.arange(total, device=device) // batch_size), {}

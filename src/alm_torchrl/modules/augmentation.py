"""Augmentation of observations inside the losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import InteractionType
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor, nn


class RandomShift(nn.Module):
    """Shifts each image by a few random pixels and repeats the border.

    This is the augmentation of DrQ-v2 (Yarats et al., 2022, arXiv 2107.09645). All channels of an
    image, and so all frames of a stack, have the same shift.

    Args:
        pad: largest shift in each direction, in pixels (DrQ-v2: 4 at 84x84).

    Examples:
        >>> images = torch.arange(2 * 9 * 32 * 32).reshape(2, 9, 32, 32)
        >>> RandomShift(2)(images).shape
        torch.Size([2, 9, 32, 32])
    """

    def __init__(self, pad: int = 4) -> None:
        super().__init__()
        if pad < 0:
            raise ValueError(f"pad must be at least 0, got {pad}")
        self.pad = pad

    def forward(self, images: Tensor) -> Tensor:
        """Shifts ``[..., C, H, W]``."""
        flat = images.reshape(-1, *images.shape[-3:])
        count, channels, height, width = flat.shape
        shift = torch.randint(-self.pad, self.pad + 1, (2, count, 1), device=images.device)
        # Clamping the index repeats the border, like padding before a crop.
        rows = (torch.arange(height, device=images.device) + shift[0]).clamp(0, height - 1)
        columns = (torch.arange(width, device=images.device) + shift[1]).clamp(0, width - 1)
        image = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
        channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
        shifted = flat[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
        return shifted.reshape(images.shape)


class Augmented(nn.Module):
    """A network whose inputs are augmented in training.

    There is one augmentation for each input; ``None`` leaves an input unchanged. Augmentation is
    off in ``eval()`` mode and under deterministic exploration types, as in the policy of
    :class:`~alm_torchrl.agent.ALMAgent`.
    """

    def __init__(self, network: nn.Module, augmentations: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.network = network
        self.augmentations = nn.ModuleList(
            nn.Identity() if augmentation is None else augmentation
            for augmentation in augmentations
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """Runs the network on the inputs, augmented in training."""
        if self.training and interaction_type() in (None, InteractionType.RANDOM):
            inputs = tuple(
                augment(value) for augment, value in zip(self.augmentations, inputs, strict=True)
            )
        return self.network(*inputs)

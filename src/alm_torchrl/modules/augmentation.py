"""Augmentation of observations inside the losses, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import InteractionType
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor, nn

__all__ = ["Augmented", "RandomShift", "without_augmentation"]


class RandomShift(nn.Module):
    """Shifts every image by a few random pixels, and repeats the border to fill in.

    The augmentation of DrQ-v2 (Yarats et al., 2022, arXiv 2107.09645): as there, padding by ``pad``
    with the border's values and cropping at a random place. All channels of an image, and so all
    frames of a stack, are shifted alike; images are shifted apart from one another. It is a gather
    of pixels, exact for every dtype.

    Args:
        pad: largest shift in each direction, in pixels (DrQ-v2: 4 at 84x84).

    Raises:
        ValueError: if ``pad`` is negative.

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
        # A clamped index repeats the border, as padding before the crop would.
        rows = (torch.arange(height, device=images.device) + shift[0]).clamp(0, height - 1)
        columns = (torch.arange(width, device=images.device) + shift[1]).clamp(0, width - 1)
        image = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
        channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
        shifted = flat[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
        return shifted.reshape(images.shape)

    def extra_repr(self) -> str:
        """The setting, for ``repr``."""
        return f"pad={self.pad}"


class Augmented(nn.Module):
    """A network whose inputs are augmented while it is trained.

    They are left alone in ``eval()`` mode and wherever the exploration type asks for something
    deterministic. :meth:`LatentModule.acting` leaves the augmentation out altogether, so that a
    policy never sees it.

    Args:
        network: what reads the inputs.
        augmentations: one for each input; ``None`` leaves an input as it is.
    """

    def __init__(self, network: nn.Module, augmentations: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.network = network
        self.augmentations = nn.ModuleList(
            nn.Identity() if augmentation is None else augmentation
            for augmentation in augmentations
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """Augments the inputs, if this is training, and runs the network on them."""
        if self.training and interaction_type() in (None, InteractionType.RANDOM):
            inputs = tuple(
                augment(value) for augment, value in zip(self.augmentations, inputs, strict=True)
            )
        return self.network(*inputs)

    def acting(self) -> nn.Module:
        """The network alone."""
        return self.network


def without_augmentation(network: nn.Module) -> nn.Module:
    """A network as it acts, which shares every parameter with the one that is trained.

    Args:
        network: an :class:`Augmented` one, or any other with a method ``acting``.

    Returns:
        What ``acting()`` returns; the network itself if it has no such method.
    """
    acting = getattr(network, "acting", None)
    return network if acting is None else acting()

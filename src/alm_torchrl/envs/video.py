"""Videos of rendered frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def write_video(pixels: Tensor, path: Path, fps: float, size: int | None = None) -> None:
    """Writes rendered frames as an animated GIF, or as MP4 with imageio.

    Args:
        pixels: frames, uint8 ``[T, H, W, 3]``, or stacks ``[T, 3 * n, H, W]`` with the newest frame
            last, which alone is shown.
        path: the file, with the ending ``.gif`` or ``.mp4``.
        fps: frames per second.
        size: largest height and width in pixels; frames are shrunk to it.
    """
    from PIL import Image

    if pixels.shape[-1] != 3:
        pixels = pixels[:, -3:].movedim(1, -1)
    frames = [Image.fromarray(frame.contiguous().cpu().numpy()) for frame in pixels]
    if size is not None:
        for frame in frames:
            frame.thumbnail((size, size))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mp4":
        import imageio

        arrays: list[Any] = [np.asarray(frame) for frame in frames]
        imageio.mimwrite(path, arrays, fps=fps, macro_block_size=2)
    else:
        duration = round(1000 / fps)
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)

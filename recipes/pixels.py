"""Trains ALM from rendered images: ``python recipes/pixels.py [task=...] [option=...]``.

It is recipes/mujoco.py with the convolutional encoder and hyperparameters for images, which stand
in conf/pixels.yaml. ``encoder=pixels_and_vector`` joins the images with the task's vector.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The project's root rather than this folder, where mujoco.py would pass for the simulator.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.mujoco import launch

if __name__ == "__main__":
    launch("pixels")

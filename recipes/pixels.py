"""Trains ALM from rendered images: ``python recipes/pixels.py [task=...] [option=...]``.

This is recipes/mujoco.py with the convolutional encoder and the preset of conf/pixels.yaml.
``encoder=pixels_and_vector`` adds the task's vector to the images.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Replace this folder by the project's root: mujoco.py would shadow the package mujoco.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.mujoco import launch

if __name__ == "__main__":
    launch("pixels")

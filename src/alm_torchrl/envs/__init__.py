"""Environments, their transforms and their random generators."""

from alm_torchrl.envs.failures import EnvironmentFailedError
from alm_torchrl.envs.generators import random_states, set_random_states
from alm_torchrl.envs.make import frame_stacks, make_env
from alm_torchrl.envs.transforms import Distractors, History, RenderFrames

__all__ = [
    "Distractors",
    "EnvironmentFailedError",
    "History",
    "RenderFrames",
    "frame_stacks",
    "make_env",
    "random_states",
    "set_random_states",
]

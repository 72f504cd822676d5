"""Replay buffers of windows, and collectors."""

from alm_torchrl.data.collectors import make_collector
from alm_torchrl.data.incremental import IncrementalReplay, ReplayChunk
from alm_torchrl.data.replay import WindowReplayBuffer, bytes_per_transition, make_replay_buffer
from alm_torchrl.data.workers import WorkersLostError

__all__ = [
    "IncrementalReplay",
    "ReplayChunk",
    "WindowReplayBuffer",
    "WorkersLostError",
    "bytes_per_transition",
    "make_collector",
    "make_replay_buffer",
]

"""Environments as TorchRL sees them: Gymnasium tasks with the specs the agent is built from."""

from alm_torchrl.envs.gymnasium import make_env, random_states, set_random_states
from alm_torchrl.envs.history import stack_history

__all__ = ["make_env", "random_states", "set_random_states", "stack_history"]

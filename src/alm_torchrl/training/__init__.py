"""Training on Lightning; needs ``pip install 'alm-torchrl[recipes]'``."""

from importlib.util import find_spec

if find_spec("lightning") is None:
    raise ImportError("alm_torchrl.training needs Lightning: pip install 'alm-torchrl[recipes]'")

from alm_torchrl.envs.failures import EnvironmentFailedError
from alm_torchrl.training.acting import CPUPolicy, PolicyPublisher, VersionedPolicy
from alm_torchrl.training.checkpoints import Checkpoint, find_checkpoint
from alm_torchrl.training.experience import ExperienceStream
from alm_torchrl.training.measurements import Diagnostics, Measurement, ValueBias
from alm_torchrl.training.module import ALMModule
from alm_torchrl.training.runtime import silence_library_warnings
from alm_torchrl.training.seeds import StackedAgent, StackedLoss, TargetUpdate, stack_seeds
from alm_torchrl.training.trainer import make_trainer
from alm_torchrl.training.update import CapturedUpdate, Update, make_optimizer

__all__ = [
    "ALMModule",
    "CPUPolicy",
    "CapturedUpdate",
    "Checkpoint",
    "Diagnostics",
    "EnvironmentFailedError",
    "ExperienceStream",
    "Measurement",
    "PolicyPublisher",
    "StackedAgent",
    "StackedLoss",
    "TargetUpdate",
    "Update",
    "ValueBias",
    "VersionedPolicy",
    "find_checkpoint",
    "make_optimizer",
    "make_trainer",
    "silence_library_warnings",
    "stack_seeds",
]

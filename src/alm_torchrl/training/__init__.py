"""Training on Lightning; needs ``pip install 'alm-torchrl[recipes]'``."""

from importlib.util import find_spec

if find_spec("lightning") is None:
    raise ImportError("alm_torchrl.training needs Lightning: pip install 'alm-torchrl[recipes]'")

from alm_torchrl.training.acting import PolicyCopy, SentPolicy, StampedPolicy
from alm_torchrl.training.callbacks import (
    EvaluationSchedule,
    LearningCurve,
    SaveAgent,
    StopOnSignal,
    Video,
)
from alm_torchrl.training.checkpoints import Checkpoint, Checkpoints, find_checkpoint
from alm_torchrl.training.compilation import worth_compiling
from alm_torchrl.training.experience import EnvironmentFailedError, Experience
from alm_torchrl.training.measurements import Diagnostics, Measurement, ValueBias
from alm_torchrl.training.module import ALMModule
from alm_torchrl.training.precision import choose_precision
from alm_torchrl.training.processes import is_lost_process, rank_seed
from alm_torchrl.training.progress import ProgressBar, quiet_notices
from alm_torchrl.training.seeds import (
    StackedAgent,
    StackedLoss,
    StackedNoise,
    StackedPolicy,
    StackedSoftUpdate,
    stack_seeds,
)
from alm_torchrl.training.trainer import make_trainer
from alm_torchrl.training.update import CapturedUpdate, Update, make_optimizer

__all__ = [
    "ALMModule",
    "CapturedUpdate",
    "Checkpoint",
    "Checkpoints",
    "Diagnostics",
    "EnvironmentFailedError",
    "EvaluationSchedule",
    "Experience",
    "LearningCurve",
    "Measurement",
    "PolicyCopy",
    "ProgressBar",
    "SaveAgent",
    "SentPolicy",
    "StackedAgent",
    "StackedLoss",
    "StackedNoise",
    "StackedPolicy",
    "StackedSoftUpdate",
    "StampedPolicy",
    "StopOnSignal",
    "Update",
    "ValueBias",
    "Video",
    "choose_precision",
    "find_checkpoint",
    "is_lost_process",
    "make_optimizer",
    "make_trainer",
    "quiet_notices",
    "rank_seed",
    "stack_seeds",
    "worth_compiling",
]

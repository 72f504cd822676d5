"""Training on Lightning; needs ``pip install 'alm-torchrl[recipes]'``."""

from importlib.util import find_spec

if find_spec("lightning") is None:
    raise ImportError("alm_torchrl.training needs Lightning: pip install 'alm-torchrl[recipes]'")

from alm_torchrl.training.acting import CPUPolicy, PolicyPublisher, VersionedPolicy
from alm_torchrl.training.callbacks import (
    EvaluationSchedule,
    LearningCurve,
    SaveAgent,
    StopOnSignal,
    Video,
)
from alm_torchrl.training.checkpoints import Checkpoint, Checkpoints, find_checkpoint
from alm_torchrl.training.compilation import worth_compiling
from alm_torchrl.training.experience import EnvironmentFailedError, ExperienceStream
from alm_torchrl.training.measurements import Diagnostics, Measurement, ValueBias
from alm_torchrl.training.module import ALMModule
from alm_torchrl.training.precision import choose_precision
from alm_torchrl.training.processes import is_lost_process, rank_seed
from alm_torchrl.training.progress import ProgressBar, silence_library_warnings
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
    "CPUPolicy",
    "CapturedUpdate",
    "Checkpoint",
    "Checkpoints",
    "Diagnostics",
    "EnvironmentFailedError",
    "EvaluationSchedule",
    "ExperienceStream",
    "LearningCurve",
    "Measurement",
    "PolicyPublisher",
    "ProgressBar",
    "SaveAgent",
    "StackedAgent",
    "StackedLoss",
    "StackedNoise",
    "StackedPolicy",
    "StackedSoftUpdate",
    "StopOnSignal",
    "Update",
    "ValueBias",
    "VersionedPolicy",
    "Video",
    "choose_precision",
    "find_checkpoint",
    "is_lost_process",
    "make_optimizer",
    "make_trainer",
    "rank_seed",
    "silence_library_warnings",
    "stack_seeds",
    "worth_compiling",
]

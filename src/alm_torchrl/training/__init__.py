"""Training: TorchRL's Trainer, and Lightning (``pip install 'alm-torchrl[recipes]'``)."""

from typing import TYPE_CHECKING

from alm_torchrl.lazy import lazy_imports
from alm_torchrl.training.acting import CPUPolicy, PolicyPublisher, VersionedPolicy
from alm_torchrl.training.alm_trainer import ALMTrainer
from alm_torchrl.training.experience import ExperienceStream
from alm_torchrl.training.seeds import StackedAgent, StackedLoss, TargetUpdate, stack_seeds
from alm_torchrl.training.update import CapturedUpdate, Update, make_optimizer

if TYPE_CHECKING:
    from alm_torchrl.training.checkpoints import Checkpoint, find_checkpoint
    from alm_torchrl.training.measurements import Diagnostics, Measurement, ValueBias
    from alm_torchrl.training.module import ALMModule
    from alm_torchrl.training.runtime import silence_library_warnings
    from alm_torchrl.training.trainer import make_trainer

__all__ = [
    "ALMModule",
    "ALMTrainer",
    "CPUPolicy",
    "CapturedUpdate",
    "Checkpoint",
    "Diagnostics",
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
__getattr__, __dir__ = lazy_imports(  # the others do not need Lightning
    globals(),
    {
        "ALMModule": "alm_torchrl.training.module",
        "Checkpoint": "alm_torchrl.training.checkpoints",
        "Diagnostics": "alm_torchrl.training.measurements",
        "Measurement": "alm_torchrl.training.measurements",
        "ValueBias": "alm_torchrl.training.measurements",
        "find_checkpoint": "alm_torchrl.training.checkpoints",
        "make_trainer": "alm_torchrl.training.trainer",
        "silence_library_warnings": "alm_torchrl.training.runtime",
    },
)

"""Training: TorchRL's Trainer, and Lightning (``pip install 'alm-torchrl[recipes]'``)."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

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
_WITH_LIGHTNING = {
    "ALMModule": "module",
    "Checkpoint": "checkpoints",
    "Diagnostics": "measurements",
    "Measurement": "measurements",
    "ValueBias": "measurements",
    "find_checkpoint": "checkpoints",
    "make_trainer": "trainer",
    "silence_library_warnings": "runtime",
}


def __getattr__(name: str) -> Any:
    """Imports a name that needs Lightning on first use, so that the others do not need it."""
    if name not in _WITH_LIGHTNING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("lightning") is None:
        raise ImportError(f"{name} needs Lightning: pip install 'alm-torchrl[recipes]'")
    value = getattr(import_module(f"{__name__}.{_WITH_LIGHTNING[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

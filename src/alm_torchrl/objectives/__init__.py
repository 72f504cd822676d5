"""The objective of Aligned Latent Models, and its mathematics."""

from alm_torchrl.objectives import functional
from alm_torchrl.objectives.alm import ALMLoss
from alm_torchrl.objectives.contract import check_encoder
from alm_torchrl.objectives.imagined import ImaginedReplay
from alm_torchrl.objectives.latent_model import Batch

__all__ = ["ALMLoss", "Batch", "ImaginedReplay", "check_encoder", "functional"]

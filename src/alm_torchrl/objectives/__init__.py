"""The objective of Aligned Latent Models, and its mathematics."""

from alm_torchrl.objectives import functional
from alm_torchrl.objectives.alm import ALMLoss

__all__ = ["ALMLoss", "functional"]

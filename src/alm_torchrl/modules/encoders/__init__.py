"""Encoders: from observations to a distribution over the latent."""

from alm_torchrl.modules.encoders.base import Encoder
from alm_torchrl.modules.encoders.frozen import FrozenEncoder
from alm_torchrl.modules.encoders.history import RecurrentEncoder, WindowEncoder, state_primer
from alm_torchrl.modules.encoders.normalization import NormalizedInputs, RunningNorm
from alm_torchrl.modules.encoders.pixels import ConvNet, MultiInputEncoder, PixelEncoder
from alm_torchrl.modules.encoders.vectors import IdentityEncoder, LinearEncoder, MLPEncoder

__all__ = [
    "ConvNet",
    "Encoder",
    "FrozenEncoder",
    "IdentityEncoder",
    "LinearEncoder",
    "MLPEncoder",
    "MultiInputEncoder",
    "NormalizedInputs",
    "PixelEncoder",
    "RecurrentEncoder",
    "RunningNorm",
    "WindowEncoder",
    "state_primer",
]

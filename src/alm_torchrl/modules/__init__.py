"""The networks of Aligned Latent Models as TensorDict modules."""

from alm_torchrl.modules.actor import Actor, NoiseSchedule
from alm_torchrl.modules.augmentation import Augmented, RandomShift
from alm_torchrl.modules.dynamics import (
    ContinuationModel,
    LatentDynamics,
    QValueEnsemble,
    RewardModel,
    TransitionClassifier,
)
from alm_torchrl.modules.encoders.base import Encoder
from alm_torchrl.modules.encoders.frozen import FrozenEncoder
from alm_torchrl.modules.encoders.history import RecurrentEncoder, WindowEncoder, state_primer
from alm_torchrl.modules.encoders.normalization import NormalizedInputs, RunningNorm
from alm_torchrl.modules.encoders.pixels import ConvNet, MultiInputEncoder, PixelEncoder
from alm_torchrl.modules.encoders.vectors import IdentityEncoder, LinearEncoder, MLPEncoder
from alm_torchrl.modules.heads import (
    CategoricalHead,
    FixedScaleHead,
    GaussianHead,
    LatentHead,
    LayerNormHead,
    SimplicialHead,
)
from alm_torchrl.modules.latent import LatentModule
from alm_torchrl.modules.networks import LayerNormMLP, mlp, orthogonal_init
from alm_torchrl.modules.rebuildable import plain_numbers
from alm_torchrl.modules.two_hot import TwoHot

__all__ = [
    "Actor",
    "Augmented",
    "CategoricalHead",
    "ContinuationModel",
    "ConvNet",
    "Encoder",
    "FixedScaleHead",
    "FrozenEncoder",
    "GaussianHead",
    "IdentityEncoder",
    "LatentDynamics",
    "LatentHead",
    "LatentModule",
    "LayerNormHead",
    "LayerNormMLP",
    "LinearEncoder",
    "MLPEncoder",
    "MultiInputEncoder",
    "NoiseSchedule",
    "NormalizedInputs",
    "PixelEncoder",
    "QValueEnsemble",
    "RandomShift",
    "RecurrentEncoder",
    "RewardModel",
    "RunningNorm",
    "SimplicialHead",
    "TransitionClassifier",
    "TwoHot",
    "WindowEncoder",
    "mlp",
    "orthogonal_init",
    "plain_numbers",
    "state_primer",
]

"""The networks of Aligned Latent Models as TensorDict modules."""

from alm_torchrl.modules.actor import Actor, NoiseSchedule
from alm_torchrl.modules.dynamics import LatentDynamics, RewardModel, TransitionClassifier
from alm_torchrl.modules.encoders import MLPEncoder
from alm_torchrl.modules.latent import GaussianLatentModule
from alm_torchrl.modules.networks import TrunkMLP, orthogonal_init, plain_mlp
from alm_torchrl.modules.value import QValueEnsemble

__all__ = [
    "Actor",
    "GaussianLatentModule",
    "LatentDynamics",
    "MLPEncoder",
    "NoiseSchedule",
    "QValueEnsemble",
    "RewardModel",
    "TransitionClassifier",
    "TrunkMLP",
    "orthogonal_init",
    "plain_mlp",
]

"""The building blocks that ALM's networks are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrl.modules import MLP

from alm_torchrl.distributions import full_precision

__all__ = ["FullPrecisionLinear", "LayerNormMLP", "mlp", "orthogonal_init"]


class FullPrecisionLinear(nn.Linear):
    """A linear layer that autocast leaves in the precision of its weights.

    For an output in units of return: bfloat16 has eight significant bits, and so steps of 2
    between 256 and 512, as coarse as the differences between actions that a value is asked for.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., D]`` to ``[..., out_features]``, at least float32."""
        x = x.to(self.weight.dtype)
        if not torch.amp.is_autocast_available(x.device.type):  # such as the meta device
            return full_precision(super().forward(x))
        with torch.autocast(x.device.type, enabled=False):
            return full_precision(super().forward(x))


def orthogonal_init(module: nn.Module) -> nn.Module:
    """Initializes every linear layer orthogonally (gain 1) with zero biases, as ALM does.

    Convolutions are initialized orthogonally with the gain of a ReLU.

    Args:
        module: the network, changed in place.

    Returns:
        The same module.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.orthogonal_(layer.weight, nn.init.calculate_gain("relu"))
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return module


def mlp(in_features: int, out_features: int, hidden_dim: int) -> nn.Module:
    """Linear-ELU-Linear-ELU-Linear, the network of encoder, latent dynamics and actor.

    Args:
        in_features: size of the (concatenated) inputs.
        out_features: size of the output.
        hidden_dim: width of both hidden layers.

    Returns:
        A module from one or several ``[..., D_i]`` tensors to ``[..., out_features]``.
    """
    network = MLP(
        in_features=in_features,
        out_features=out_features,
        num_cells=[hidden_dim, hidden_dim],
        activation_class=nn.ELU,
    )
    return orthogonal_init(network)


class LayerNormMLP(nn.Sequential):
    """Linear-LayerNorm-Tanh-Linear-ELU-Linear, the network of reward, classifier and values.

    The normalized and squashed first layer keeps these heads stable on latents that reach +-30.

    Args:
        in_features: size of the concatenated inputs.
        out_features: size of the output.
        hidden_dim: width of both hidden layers.
    """

    def __init__(self, in_features: int, out_features: int, hidden_dim: int) -> None:
        super().__init__(
            nn.Linear(in_features, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.Tanh(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ELU(),
            FullPrecisionLinear(hidden_dim, out_features),
        )
        orthogonal_init(self)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Concatenates ``[..., D_i]`` inputs and maps them to ``[..., out_features]``."""
        return super().forward(torch.cat(inputs, dim=-1))

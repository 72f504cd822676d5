"""Building blocks of ALM's networks."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor, nn

from alm_torchrl.distributions import full_precision


class MLPKwargs(TypedDict, total=False):
    """Keyword arguments that every network passes to :func:`mlp` or :class:`LayerNormMLP`."""

    depth: int
    activation_class: type[nn.Module] | str
    norm_class: type[nn.Module] | str | None


def concatenate(*inputs: Tensor) -> Tensor:
    """Concatenates along the last dimension and casts integers and booleans to float."""
    parts = [value if value.is_floating_point() else value.float() for value in inputs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def as_weights(value: Tensor, network: nn.Module) -> Tensor:
    """Casts float64, the default of NumPy and many simulators, to the dtype of the weights."""
    if value.dtype != torch.float64:
        return value
    # Not parameters(): the losses run networks with weights that are not parameters.
    weights = (getattr(layer, "weight", None) for layer in network.modules())
    return value.to(next((w.dtype for w in weights if w is not None), torch.float32))


class TensorModule(TensorDictModule):
    """A ``TensorDictModule`` for a network that returns tensors.

    ``TensorDictModule`` also accepts other outputs. It searches the installed packages for pandas
    at every output, which takes longer than a small layer.
    """

    @dispatch(auto_batch_size=False)
    def forward(
        self, tensordict: TensorDictBase, tensordict_out: TensorDictBase | None = None
    ) -> TensorDictBase:
        """Writes the outputs of the network, to ``tensordict`` by default."""
        outputs = self.module(*[tensordict[key] for key in self.in_keys])
        if not isinstance(outputs, tuple):
            outputs = (outputs,)
        keys = self.out_keys_source
        if len(outputs) != len(keys):
            raise ValueError(f"the network returned {len(outputs)} outputs; expected {[*keys]}")
        out = tensordict if tensordict_out is None else tensordict_out
        for key, value in zip(keys, outputs, strict=True):
            out.set(key, value)
        return out


class ConcatSequential(nn.Sequential):
    """A sequence of layers that first concatenates its inputs."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Maps inputs ``[..., D_i]`` to the output of the last layer."""
        return super().forward(concatenate(*inputs))


class FullPrecisionLinear(nn.Linear):
    """A linear layer that ignores autocast and returns float32 or higher precision.

    bfloat16 is too coarse for returns: between 256 and 512, its step is 2.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., D]`` to ``[..., out_features]``."""
        x = x.to(self.weight.dtype)
        if not torch.amp.is_autocast_available(x.device.type):  # the meta device, for example
            return full_precision(super().forward(x))
        with torch.autocast(x.device.type, enabled=False):
            return full_precision(super().forward(x))


def orthogonal_init(module: nn.Module) -> nn.Module:
    """Initializes linear layers orthogonally (gain 1) with zero biases, in place, as ALM does.

    Convolutions get the gain of a ReLU.
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


def mlp(
    in_features: int,
    out_features: int,
    hidden_dim: int,
    *,
    depth: int = 2,
    activation_class: type[nn.Module] | str = nn.ELU,
    norm_class: type[nn.Module] | str | None = None,
) -> nn.Sequential:
    """The network of encoder, latent dynamics and actor: Linear-ELU-Linear-ELU-Linear by default.

    It concatenates its inputs, each ``[..., D_i]``.

    Args:
        in_features: size of the concatenated inputs.
        out_features: size of the output.
        hidden_dim: width of the hidden layers.
        depth: number of hidden layers; 0 makes a linear map.
        activation_class: activation after each hidden layer, a class of ``torch.nn`` or its name.
        norm_class: normalization before each activation, called with ``hidden_dim``.
    """
    layers: list[nn.Module] = []
    size = in_features
    for _ in range(depth):
        layers += _hidden_layer(size, hidden_dim, norm_class, activation_class)
        size = hidden_dim
    network = ConcatSequential(*layers, nn.Linear(size, out_features))
    orthogonal_init(network)
    return network


class LayerNormMLP(ConcatSequential):
    """The network of reward, classifier and values: Linear-LayerNorm-Tanh-Linear-ELU-Linear.

    See :func:`mlp` for the arguments. The first hidden layer has ``norm_class`` and Tanh; the
    others have ``activation_class``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_dim: int,
        *,
        depth: int = 2,
        activation_class: type[nn.Module] | str = nn.ELU,
        norm_class: type[nn.Module] | str | None = nn.LayerNorm,
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        layers = _hidden_layer(in_features, hidden_dim, norm_class, nn.Tanh)
        for _ in range(depth - 1):
            layers += _hidden_layer(hidden_dim, hidden_dim, None, activation_class)
        super().__init__(*layers, FullPrecisionLinear(hidden_dim, out_features))
        orthogonal_init(self)


def _hidden_layer(
    in_features: int,
    out_features: int,
    norm_class: type[nn.Module] | str | None,
    activation_class: type[nn.Module] | str,
) -> list[nn.Module]:
    norm = [] if norm_class is None else [_class(norm_class)(out_features)]
    activation = _class(activation_class)()
    if isinstance(activation, nn.ELU) and not norm:
        # The gradient then needs only the output, which the next layer keeps anyway, and no exp.
        activation.inplace = True
    return [nn.Linear(in_features, out_features), *norm, activation]


def _class(layer: type[nn.Module] | str) -> Any:
    """Returns a layer class, given as a class or by its name in ``torch.nn``."""
    found = getattr(nn, layer, None) if isinstance(layer, str) else layer
    if found is None:
        raise ValueError(f"torch.nn has no layer {layer!r}; pass the class or a name in torch.nn")
    return found

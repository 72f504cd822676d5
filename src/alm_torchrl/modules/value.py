"""The action-value networks."""

from __future__ import annotations

from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, cat, nn

from alm_torchrl.modules.networks import LayerNormMLP

__all__ = ["QValueEnsemble"]


class QValueEnsemble(TensorDictModule):
    r"""Several independent action values :math:`Q_\psi(z, a)` on the latent, side by side.

    ALM uses two and takes their minimum everywhere. A single module that writes ``[..., 1]`` (any
    TorchRL ``ValueOperator``) can stand in its place.

    Args:
        latent_dim: size ``D`` of the latent.
        action_dim: size ``A`` of the action.
        hidden_dim: width of the two hidden layers.
        num_networks: number ``N`` of networks.
        latent_key: where the latent ``[..., D]`` is read.
        action_key: where the action ``[..., A]`` is read.
        value_key: where the values ``[..., N]`` are written, in units of return.

    Examples:
        >>> import torch
        >>> q = QValueEnsemble(latent_dim=50, action_dim=6)
        >>> q(latent=torch.randn(4, 50), action=torch.rand(4, 6)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        hidden_dim: int = 512,
        *,
        num_networks: int = 2,
        latent_key: NestedKey = "latent",
        action_key: NestedKey = "action",
        value_key: NestedKey = "state_action_value",
    ) -> None:
        networks = [
            LayerNormMLP(latent_dim + action_dim, 1, hidden_dim) for _ in range(num_networks)
        ]
        super().__init__(
            _SideBySide(networks), in_keys=[latent_key, action_key], out_keys=[value_key]
        )


class _SideBySide(nn.ModuleList):
    """Runs its modules on the same inputs and concatenates their outputs.

    A plain loop: fusing the networks into batched matrix products was measured to be slower.
    """

    def forward(self, *inputs: Tensor) -> Tensor:
        return cat([network(*inputs) for network in self], dim=-1)

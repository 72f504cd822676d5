"""The action-value networks."""

from __future__ import annotations

from typing import Unpack

from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, cat, nn

from alm_torchrl.modules.networks import LayerNormMLP, MLPKwargs
from alm_torchrl.modules.rebuildable import Rebuildable


class QValueEnsemble(Rebuildable, TensorDictModule):
    r"""Several independent action values :math:`Q_\psi(z, a)`.

    It reads a latent ``[..., D]`` and an action ``[..., A]``. ALM uses two values and takes their
    minimum. Any module that writes ``[..., 1]``, such as a TorchRL ``ValueOperator``, can replace
    the ensemble.

    Args:
        num_networks: number ``N`` of networks.
        value_key: entry of the values ``[..., N]``, in units of return.
        **mlp_kwargs: further arguments of :class:`LayerNormMLP`.

    Examples:
        >>> import torch
        >>> QValueEnsemble(50, 6)(latent=torch.randn(4, 50), action=torch.rand(4, 6)).shape
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
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        size = latent_dim + action_dim
        super().__init__(
            _Ensemble(LayerNormMLP(size, 1, hidden_dim, **mlp_kwargs) for _ in range(num_networks)),
            in_keys=[latent_key, action_key],
            out_keys=[value_key],
        )


class _Ensemble(nn.ModuleList):
    """Runs its modules on the same inputs and concatenates their outputs."""

    def forward(self, *inputs: Tensor) -> Tensor:
        # A loop, because batched matrix products are slower.
        return cat([network(*inputs) for network in self], dim=-1)

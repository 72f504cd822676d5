"""The networks that read a latent ``[..., D]`` and an action ``[..., A]``."""

from __future__ import annotations

from typing import Unpack

from tensordict.utils import NestedKey
from torch import Tensor, cat, nn

from alm_torchrl.data.transitions import next_key, tuple_key
from alm_torchrl.distributions import full_precision
from alm_torchrl.modules.heads import DEFAULT_HEAD, LatentHead
from alm_torchrl.modules.latent import LatentModule
from alm_torchrl.modules.networks import LayerNormMLP, MLPKwargs, TensorModule, mlp
from alm_torchrl.modules.rebuildable import Rebuildable
from alm_torchrl.modules.two_hot import TwoHot, TwoHotNetwork


class LatentDynamics(LatentModule):
    r"""The latent dynamics :math:`m_\phi(z_{t+1} \mid z_t, a_t)`.

    Args:
        head: the distribution of the latent. It needs a KL divergence with the distribution of
            the encoder, so pass ``encoder.head``.
        residual: adds the latent to the predicted location, so that the network predicts a change.
        **mlp_kwargs: further arguments of :func:`mlp`.

    Examples:
        >>> import torch
        >>> dynamics = LatentDynamics(latent_dim=50, action_dim=6)
        >>> dynamics(latent=torch.randn(4, 50), action=torch.rand(4, 6))[-1].shape
        torch.Size([4, 50])
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        hidden_dim: int = 1024,
        *,
        head: LatentHead = DEFAULT_HEAD,
        residual: bool = False,
        latent_key: NestedKey = "latent",
        action_key: NestedKey = "action",
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        outputs = head.network_size(latent_dim)
        network = mlp(latent_dim + action_dim, outputs, hidden_dim, **mlp_kwargs)
        super().__init__(
            _Residual(network) if residual else network,
            [latent_key, action_key],
            head=head,
            latent_key=next_key(latent_key),
        )
        self.latent_dim = latent_dim
        self.action_dim = action_dim


class _Residual(nn.Module):
    """Adds the latent to the first outputs of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        raw = full_precision(self.network(latent, action))
        loc, rest = raw.split([latent.shape[-1], raw.shape[-1] - latent.shape[-1]], -1)
        return cat([latent + loc, rest], -1)


class _Prediction(Rebuildable, TensorModule):
    """Values ``[..., N]`` from a network, or from logits ``[..., N, bins]`` with ``two_hot``."""

    def __init__(
        self,
        network: nn.Module,
        in_keys: list[NestedKey],
        out_key: NestedKey,
        two_hot: TwoHot | None,
    ) -> None:
        out_keys = [out_key]
        if two_hot is not None:
            *parents, name = tuple_key(out_key)
            network, out_keys = (
                TwoHotNetwork(network, two_hot),
                [(*parents, f"{name}_logits"), out_key],
            )
        super().__init__(network, in_keys=in_keys, out_keys=out_keys)
        self.two_hot = two_hot


class RewardModel(_Prediction):
    r"""The reward :math:`r_\theta(z_t, a_t)`, ``[..., 1]``.

    Args:
        two_hot: bins of a categorical reward; by default the network predicts the number. It adds
            an entry with the logits ``[..., 1, bins]``, named after ``out_key``.
        out_key: entry of the reward.
        **mlp_kwargs: further arguments of :class:`LayerNormMLP`.

    Examples:
        >>> import torch
        >>> RewardModel(50, 6)(latent=torch.randn(4, 50), action=torch.rand(4, 6)).shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        hidden_dim: int = 512,
        *,
        two_hot: TwoHot | None = None,
        latent_key: NestedKey = "latent",
        action_key: NestedKey = "action",
        out_key: NestedKey = "predicted_reward",
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        outputs = 1 if two_hot is None else two_hot.bins
        network = LayerNormMLP(latent_dim + action_dim, outputs, hidden_dim, **mlp_kwargs)
        super().__init__(network, [latent_key, action_key], out_key, two_hot)


class ContinuationModel(Rebuildable, TensorModule):
    r"""The probability :math:`d_\psi(z_{t+1})` that the episode continues after a step.

    It reads the next latent, because a terminal state is easier to recognize than the step that
    leads there. It writes the logit ``[..., 1]``. A time limit is not a termination.

    Args:
        out_key: entry of the logit.
        **mlp_kwargs: further arguments of :func:`mlp`.

    Examples:
        >>> import torch
        >>> ContinuationModel(50)(next_latent=torch.randn(4, 50)).shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        latent_dim: int,
        hidden_dim: int = 512,
        *,
        latent_key: NestedKey = "latent",
        out_key: NestedKey = "continuation_logit",
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        network = mlp(latent_dim, 1, hidden_dim, **mlp_kwargs)
        super().__init__(network, in_keys=[next_key(latent_key)], out_keys=[out_key])


class TransitionClassifier(Rebuildable, TensorModule):
    r"""The classifier that tells encoded transitions from imagined ones.

    It writes logits ``[..., 2]``. Class 1 is a next latent encoded from the real next observation,
    and class 0 is one sampled from the latent dynamics; see
    :func:`alm_torchrl.objectives.functional.log_ratio`.

    Args:
        out_key: entry of the logits.
        **mlp_kwargs: further arguments of :class:`LayerNormMLP`.

    Examples:
        >>> import torch
        >>> z, a = torch.randn(4, 50), torch.rand(4, 6)
        >>> TransitionClassifier(50, 6)(latent=z, action=a, next_latent=z).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        hidden_dim: int = 512,
        *,
        latent_key: NestedKey = "latent",
        action_key: NestedKey = "action",
        out_key: NestedKey = "transition_logits",
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        super().__init__(
            LayerNormMLP(2 * latent_dim + action_dim, 2, hidden_dim, **mlp_kwargs),
            in_keys=[latent_key, action_key, next_key(latent_key)],
            out_keys=[out_key],
        )


class QValueEnsemble(_Prediction):
    r"""Several independent action values :math:`Q_\psi(z, a)`.

    ALM uses two values and takes their minimum. Any module that writes ``[..., 1]``, such as a
    TorchRL ``ValueOperator``, can replace the ensemble.

    Args:
        num_networks: number ``N`` of networks.
        two_hot: bins of categorical values; by default the networks predict the numbers. It adds an
            entry with the logits ``[..., N, bins]``, named after ``out_key``.
        out_key: entry of the values ``[..., N]``, in units of return.
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
        two_hot: TwoHot | None = None,
        latent_key: NestedKey = "latent",
        action_key: NestedKey = "action",
        out_key: NestedKey = "state_action_value",
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        size, outputs = latent_dim + action_dim, 1 if two_hot is None else two_hot.bins
        networks = _Ensemble(
            LayerNormMLP(size, outputs, hidden_dim, **mlp_kwargs) for _ in range(num_networks)
        )
        super().__init__(networks, [latent_key, action_key], out_key, two_hot)


class _Ensemble(nn.ModuleList):
    """Runs its modules on the same inputs and concatenates their outputs."""

    def forward(self, *inputs: Tensor) -> Tensor:
        # Batched matrix products are slower than this loop.
        return cat([network(*inputs) for network in self], dim=-1)

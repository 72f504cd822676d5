"""Dynamics, reward, continuation and classifier, which read a latent ``[..., D]`` and an action."""

from __future__ import annotations

from typing import Any, Unpack

from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey

from alm_torchrl.data.transitions import next_key
from alm_torchrl.modules.heads import DEFAULT_HEAD, LatentHead
from alm_torchrl.modules.latent import LatentModule
from alm_torchrl.modules.networks import LayerNormMLP, MLPKwargs, mlp
from alm_torchrl.modules.rebuildable import Rebuildable


class LatentDynamics(LatentModule):
    r"""The latent dynamics :math:`m_\phi(z_{t+1} \mid z_t, a_t)`.

    Args:
        head: the distribution of the latent. It needs a KL divergence with the distribution of
            the encoder, so pass ``encoder.head``.
        next_latent_key: entry of the predicted latent; ``("next", latent_key)`` by default.
        **mlp_kwargs: further arguments of :func:`mlp`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> td = TensorDict(latent=torch.randn(4, 50), action=torch.rand(4, 6), batch_size=[4])
        >>> LatentDynamics(latent_dim=50, action_dim=6)(td)["next", "latent"].shape
        torch.Size([4, 50])
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        hidden_dim: int = 1024,
        *,
        head: LatentHead = DEFAULT_HEAD,
        latent_key: NestedKey = "latent",
        action_key: NestedKey = "action",
        next_latent_key: NestedKey | None = None,
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        super().__init__(
            mlp(latent_dim + action_dim, head.network_size(latent_dim), hidden_dim, **mlp_kwargs),
            [latent_key, action_key],
            head=head,
            latent_key=next_latent_key or next_key(latent_key),
        )
        self.latent_dim = latent_dim
        self.action_dim = action_dim


class RewardModel(Rebuildable, TensorDictModule):
    r"""The reward :math:`r_\theta(z_t, a_t)` as a function of the latent.

    Args:
        reward_key: entry of the prediction ``[..., 1]``, in the environment's units.
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
        latent_key: NestedKey = "latent",
        action_key: NestedKey = "action",
        reward_key: NestedKey = "predicted_reward",
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        super().__init__(
            LayerNormMLP(latent_dim + action_dim, 1, hidden_dim, **mlp_kwargs),
            in_keys=[latent_key, action_key],
            out_keys=[reward_key],
        )


class ContinuationModel(RewardModel):
    r"""The probability :math:`d_\theta(z_t, a_t)` that a step does not terminate, as a logit.

    Truncation by a time limit is not termination. The network is that of :class:`RewardModel`.

    Args:
        logit_key: entry of the logit ``[..., 1]``.
        **options: further arguments of :class:`RewardModel`.
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        hidden_dim: int = 512,
        *,
        logit_key: NestedKey = "continuation_logit",
        **options: Any,
    ) -> None:
        super().__init__(latent_dim, action_dim, hidden_dim, reward_key=logit_key, **options)


class TransitionClassifier(Rebuildable, TensorDictModule):
    r"""The classifier that tells encoded transitions from imagined ones.

    Class 1 is a next latent encoded from the real next observation, and class 0 is one sampled
    from the latent dynamics. Hence ``logits[1] - logits[0]`` estimates
    :math:`\log e_\phi(z_{t+1} \mid s_{t+1}) - \log m_\phi(z_{t+1} \mid z_t, a_t)`
    (see :func:`alm_torchrl.objectives.functional.log_ratio`).

    Args:
        next_latent_key: entry of the next latent ``[..., D]``; ``("next", latent_key)`` by default.
        logits_key: entry of the two logits ``[..., 2]``.
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
        next_latent_key: NestedKey | None = None,
        logits_key: NestedKey = "transition_logits",
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        super().__init__(
            LayerNormMLP(2 * latent_dim + action_dim, 2, hidden_dim, **mlp_kwargs),
            in_keys=[latent_key, action_key, next_latent_key or next_key(latent_key)],
            out_keys=[logits_key],
        )

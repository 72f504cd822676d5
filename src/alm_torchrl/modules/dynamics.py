"""The latent world model: dynamics, reward, and the classifier of transitions."""

from __future__ import annotations

from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey

from alm_torchrl.modules.described import described
from alm_torchrl.modules.heads import GaussianHead, LatentHead
from alm_torchrl.modules.latent import LatentModule, next_key
from alm_torchrl.modules.networks import LayerNormMLP, mlp

__all__ = ["ContinuationModel", "LatentDynamics", "RewardModel", "TransitionClassifier"]


@described
class LatentDynamics(LatentModule):
    r"""The latent dynamics :math:`m_\phi(z_{t+1} \mid z_t, a_t)`.

    Args:
        latent_dim: size ``D`` of the latent.
        action_dim: size ``A`` of the action.
        hidden_dim: width of the two hidden layers.
        head: the latent's distribution, which must have a KL divergence with the encoder's: take
            the encoder's own head. :class:`GaussianHead` by default.
        latent_key: where the latent ``[..., D]`` is read.
        action_key: where the action ``[..., A]`` is read.
        next_latent_key: where the next latent is written, with the distribution's parameters
            beside it; ``("next", latent_key)`` by default.

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
        head: LatentHead | None = None,
        latent_key: NestedKey = "latent",
        action_key: NestedKey = "action",
        next_latent_key: NestedKey | None = None,
    ) -> None:
        head = GaussianHead() if head is None else head
        super().__init__(
            mlp(latent_dim + action_dim, head.network_size(latent_dim), hidden_dim),
            [latent_key, action_key],
            head=head,
            latent_key=next_latent_key or next_key(latent_key),
        )
        self.latent_dim = latent_dim
        self.action_dim = action_dim


class RewardModel(TensorDictModule):
    r"""The reward :math:`r_\theta(z_t, a_t)` as a function of the latent.

    Args:
        latent_dim: size ``D`` of the latent.
        action_dim: size ``A`` of the action.
        hidden_dim: width of the two hidden layers.
        latent_key: where the latent ``[..., D]`` is read.
        action_key: where the action ``[..., A]`` is read.
        reward_key: where the prediction ``[..., 1]`` is written, in the environment's units.

    Examples:
        >>> import torch
        >>> reward = RewardModel(latent_dim=50, action_dim=6)
        >>> reward(latent=torch.randn(4, 50), action=torch.rand(4, 6)).shape
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
    ) -> None:
        super().__init__(
            LayerNormMLP(latent_dim + action_dim, 1, hidden_dim),
            in_keys=[latent_key, action_key],
            out_keys=[reward_key],
        )


class ContinuationModel(TensorDictModule):
    r"""The probability :math:`d_\theta(z_t, a_t)` that a step does not terminate, as a logit.

    A time limit is no termination.

    Args:
        latent_dim: size ``D`` of the latent.
        action_dim: size ``A`` of the action.
        hidden_dim: width of the two hidden layers.
        latent_key: where the latent ``[..., D]`` is read.
        action_key: where the action ``[..., A]`` is read.
        logit_key: where the logit ``[..., 1]`` is written.

    Examples:
        >>> import torch
        >>> continuation = ContinuationModel(latent_dim=50, action_dim=6)
        >>> continuation(latent=torch.randn(4, 50), action=torch.rand(4, 6)).shape
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
        logit_key: NestedKey = "continuation_logit",
    ) -> None:
        super().__init__(
            LayerNormMLP(latent_dim + action_dim, 1, hidden_dim),
            in_keys=[latent_key, action_key],
            out_keys=[logit_key],
        )


class TransitionClassifier(TensorDictModule):
    r"""The classifier that tells encoded transitions from imagined ones.

    Class 1 is a next latent encoded from the real next observation, class 0 one drawn from the
    latent dynamics, so that ``logits[1] - logits[0]`` estimates
    :math:`\log e_\phi(z_{t+1} \mid s_{t+1}) - \log m_\phi(z_{t+1} \mid z_t, a_t)`
    (see :func:`alm_torchrl.objectives.functional.log_ratio`).

    Args:
        latent_dim: size ``D`` of the latent.
        action_dim: size ``A`` of the action.
        hidden_dim: width of the two hidden layers.
        latent_key: where the latent ``[..., D]`` is read.
        action_key: where the action ``[..., A]`` is read.
        next_latent_key: where the next latent ``[..., D]`` is read; ``("next", latent_key)`` by
            default.
        logits_key: where the two logits ``[..., 2]`` are written.

    Examples:
        >>> import torch
        >>> classifier = TransitionClassifier(latent_dim=50, action_dim=6)
        >>> z = torch.randn(4, 50)
        >>> classifier(latent=z, action=torch.rand(4, 6), next_latent=z).shape
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
    ) -> None:
        super().__init__(
            LayerNormMLP(2 * latent_dim + action_dim, 2, hidden_dim),
            in_keys=[latent_key, action_key, next_latent_key or next_key(latent_key)],
            out_keys=[logits_key],
        )

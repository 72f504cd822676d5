"""The last observations as one entry, for encoders of a window."""

from __future__ import annotations

from tensordict.utils import NestedKey
from torchrl.envs import CatFrames, Compose, Transform, UnsqueezeTransform

__all__ = ["stack_history"]


def stack_history(
    length: int, in_key: NestedKey = "observation", out_key: NestedKey = "history"
) -> Transform:
    """A transform that adds the last observations, oldest first, as a window.

    Before there were as many, the first observation of the episode is repeated. A window
    ``[L, O]`` takes ``L`` times the memory of an observation in a replay buffer, twice in a
    transition.

    Args:
        length: observations in a window, ``L``.
        in_key: the observation, ``[..., O]``.
        out_key: where the window is written, ``[..., L, O]``.

    Returns:
        TorchRL's transforms, to be appended to an environment.

    Raises:
        ValueError: if ``length`` is less than 1.

    Examples:
        >>> from torchrl.envs import TransformedEnv
        >>> from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv
        >>> env = TransformedEnv(ContinuousActionVecMockEnv(), stack_history(4))
        >>> env.rollout(3)["history"].shape
        torch.Size([3, 4, 7])
    """
    if length < 1:
        raise ValueError(f"a window has at least 1 observation, not {length}")
    return Compose(
        UnsqueezeTransform(dim=-2, in_keys=[in_key], out_keys=[out_key]),
        CatFrames(N=length, dim=-2, in_keys=[out_key], out_keys=[out_key], padding="same"),
    )

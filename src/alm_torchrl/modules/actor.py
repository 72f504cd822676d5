"""The policy on the latent and its noise schedule."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
)
from tensordict.utils import NestedKey
from torch import Tensor, nn

from alm_torchrl.distributions import ClampedNormal, full_precision
from alm_torchrl.modules.latent import suffix_key
from alm_torchrl.modules.networks import MLPKwargs, TensorModule, mlp
from alm_torchrl.modules.rebuildable import Rebuildable


class NoiseSchedule(Rebuildable, nn.Module):
    r"""The scale of the action noise, annealed linearly over training.

    Policy and losses share the buffer ``scale``; a state dict contains it and the step count.

    Args:
        start: initial standard deviation, in units of half the action range.
        end: standard deviation after ``num_steps`` steps.
        num_steps: number of annealing steps; ALM counts them after the random warm-up.

    Examples:
        >>> noise = NoiseSchedule(start=1.0, end=0.1, num_steps=100)
        >>> noise.advance(50)
        >>> round(float(noise.scale), 3)
        0.55
    """

    scale: Tensor
    step_count: Tensor

    def __init__(self, start: float = 1.0, end: float = 0.1, num_steps: int = 100_000) -> None:
        super().__init__()
        if num_steps < 1 or start < 0 or end < 0:
            raise ValueError(
                f"expected num_steps >= 1 and scales >= 0, got {start=}, {end=}, {num_steps=}"
            )
        self.start = start
        self.end = end
        self.num_steps = num_steps
        self.register_buffer("scale", torch.tensor(float(start)))
        self.register_buffer("step_count", torch.tensor(0))

    @torch.no_grad()
    def advance(self, steps: int = 1) -> None:
        """Advances the schedule in place, without device synchronization."""
        self.step_count.add_(steps)
        progress = (self.step_count / self.num_steps).clamp(max=1.0)
        self.scale.copy_(self.start + (self.end - self.start) * progress)


class Actor(Rebuildable, ProbabilisticTensorDictSequential):
    r"""The policy :math:`\pi_\theta(a \mid z)`: a squashed mean with scheduled, clipped noise.

    From a latent ``[..., D]``, it writes ``<action>_loc``, ``<action>_scale`` and an action, each
    ``[..., A]``. The mean is the ``tanh`` of the network output. The noise is clipped in the
    losses; :meth:`acting` returns the policy without the clip.

    Args:
        low: lower bound of the action, one entry for each of its ``A`` dimensions.
        high: upper bound of the action.
        noise: the noise schedule; a new :class:`NoiseSchedule` by default.
        noise_clip: largest absolute noise in the losses; ``None`` for no clip.
        scale_to_range: scales mean, noise and clip to the action range. With ``False``, the mean
            stays in :math:`\pm 1` and the action is clamped to the range, as in the authors' code.
        normalize_mean: divides the network output by its mean absolute value before the ``tanh``
            if this value exceeds one, so that the policy does not saturate (Wang et al. 2020,
            "Striving for Simplicity and Performance in Off-Policy DRL").
        **mlp_kwargs: further arguments of :func:`mlp`.

    Raises:
        ValueError: if the range is empty, unbounded or of unequal lengths, or if it does not
            overlap :math:`\pm 1` although ``scale_to_range=False``.

    Examples:
        >>> Actor(50, low=[-0.4] * 17, high=[0.4] * 17)(latent=torch.randn(4, 50))[-1].shape
        torch.Size([4, 17])
    """

    def __init__(
        self,
        latent_dim: int,
        low: Sequence[float],
        high: Sequence[float],
        hidden_dim: int = 512,
        *,
        noise: NoiseSchedule | None = None,
        noise_clip: float | None = 0.3,
        scale_to_range: bool = True,
        normalize_mean: bool = False,
        latent_key: NestedKey = "latent",
        action_key: NestedKey = "action",
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        lower, upper = torch.as_tensor(low).float(), torch.as_tensor(high).float()
        _check_range(lower, upper)
        middle, half = (upper + lower) / 2, (upper - lower) / 2
        if not scale_to_range:
            _check_reach(lower, upper)
            middle, half = torch.zeros_like(middle), torch.ones_like(half)
        network = _ActorNetwork(
            mlp(latent_dim, len(lower), hidden_dim, **mlp_kwargs),
            NoiseSchedule() if noise is None else noise,
            middle,
            half,
            normalize_mean,
        )
        limits = {
            "low": _uniform_or_tensor(lower),
            "high": _uniform_or_tensor(upper),
            "noise_clip": None if noise_clip is None else _uniform_or_tensor(noise_clip * half),
        }
        params = [suffix_key(action_key, "_loc"), suffix_key(action_key, "_scale")]
        super().__init__(
            TensorModule(network, in_keys=[latent_key], out_keys=params),
            _ActionHead(action_key, limits, "random"),
        )
        self.action_key = action_key

    @property
    def noise(self) -> NoiseSchedule:
        """The noise schedule."""
        return self[0].module.noise

    def acting(self) -> ProbabilisticTensorDictSequential:
        """Returns the policy with unclipped noise for data collection; it shares the networks.

        The action has noise under ``ExplorationType.RANDOM``, which collectors set; otherwise it is
        the mean.
        """
        limits = {**self[-1].distribution_kwargs, "noise_clip": None}
        head = _ActionHead(self.action_key, limits, "deterministic")
        return ProbabilisticTensorDictSequential(self[0], head)


class _ActorNetwork(nn.Module):
    """Maps a latent to the mean and the noise scale of the action."""

    middle: Tensor
    half_range: Tensor

    def __init__(
        self,
        network: nn.Module,
        noise: NoiseSchedule,
        middle: Tensor,
        half_range: Tensor,
        normalize: bool,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.network = network
        self.noise = noise
        self.register_buffer("middle", middle)
        self.register_buffer("half_range", half_range)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        raw = full_precision(self.network(latent))
        if self.normalize:
            raw = raw / raw.abs().mean(-1, keepdim=True).clamp_min(1.0)
        loc = self.middle + self.half_range * torch.tanh(raw)
        return loc, (self.half_range * self.noise.scale).expand_as(loc)


class _ActionHead(ProbabilisticTensorDictModule):
    """Draws the action from a :class:`ClampedNormal` with the given limits."""

    def __init__(self, action_key: NestedKey, limits: dict[str, Any], interaction: str) -> None:
        super().__init__(
            in_keys={name: suffix_key(action_key, f"_{name}") for name in ("loc", "scale")},
            out_keys=[action_key],
            distribution_class=ClampedNormal,
            distribution_kwargs=limits,
            default_interaction_type=interaction,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> _ActionHead:
        # Moves the limits to the device, so that sampling does not copy them from the host.
        super()._apply(fn, recurse)
        for name, value in self.distribution_kwargs.items():
            if isinstance(value, Tensor):
                self.distribution_kwargs[name] = fn(value)
        return self


def _check_range(low: Tensor, high: Tensor) -> None:
    if low.ndim != 1 or low.shape != high.shape:
        raise ValueError(
            "low and high need one entry per action dimension, got shapes "
            f"{tuple(low.shape)} and {tuple(high.shape)}"
        )
    if not bool((low < high).all() and low.isfinite().all() and high.isfinite().all()):
        found = f"{low.tolist()} to {high.tolist()}"
        raise ValueError(f"the action range must be finite with low < high, got {found}")


def _check_reach(low: Tensor, high: Tensor) -> None:
    """Raises if no mean in +-1 is in the range, and warns if the range extends beyond +-1."""
    message = (
        "with scale_to_range=False the mean action stays in +-1 and {} of the range "
        f"{low.tolist()} to {high.tolist()}; set scale_to_range=True (agent.scale_to_range=true in "
        "the recipe)"
    )
    if bool(((low >= 1) | (high <= -1)).any()):
        raise ValueError(message.format("reaches no part"))
    if bool(((low < -1) | (high > 1)).any()):
        warnings.warn(message.format("never reaches the ends"), stacklevel=3)


def _uniform_or_tensor(values: Tensor) -> Tensor | float:
    """Returns one number if all entries are equal: the usual case then needs no copy to a GPU."""
    return values[0].item() if bool((values == values[0]).all()) else values

"""The policy on the latent, and the schedule of its noise."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from tensordict.utils import NestedKey
from torch import Tensor, nn

from alm_torchrl.distributions import ClampedNormal, full_precision
from alm_torchrl.modules.latent import suffix_key
from alm_torchrl.modules.networks import mlp

__all__ = ["Actor", "NoiseSchedule"]


class NoiseSchedule(nn.Module):
    r"""The scale of the action noise, annealed linearly over training.

    Acting and every loss read the same buffer, ``scale``, and a state dict holds it together with
    the step count. Move it (with its actor) before an ``ALMLoss`` is built on it, or move the loss,
    which takes its networks along.

    Args:
        start: standard deviation before the first step, in units of half the action range.
        end: standard deviation from ``num_steps`` on.
        num_steps: number of steps to anneal over; ALM counts environment steps after the random
            warm-up.

    Raises:
        ValueError: if ``num_steps`` is not positive or a scale is negative.

    Examples:
        >>> noise = NoiseSchedule(start=1.0, end=0.1, num_steps=100)
        >>> noise.advance(50)
        >>> round(float(noise.scale), 3)
        0.55
        >>> noise.advance(100)
        >>> round(float(noise.scale), 3)
        0.1
    """

    scale: Tensor
    step_count: Tensor

    def __init__(self, start: float = 1.0, end: float = 0.1, num_steps: int = 100_000) -> None:
        super().__init__()
        if num_steps < 1 or start < 0 or end < 0:
            raise ValueError(
                "expected num_steps >= 1 and scales >= 0, got "
                f"start={start}, end={end}, num_steps={num_steps}"
            )
        self.start = start
        self.end = end
        self.num_steps = num_steps
        self.register_buffer("scale", torch.tensor(float(start)))
        self.register_buffer("step_count", torch.tensor(0))

    @torch.no_grad()
    def advance(self, steps: int = 1) -> None:
        """Moves the schedule on, in place and without waiting for the device."""
        self.step_count.add_(steps)
        progress = (self.step_count / self.num_steps).clamp(max=1.0)
        self.scale.copy_(self.start + (self.end - self.start) * progress)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"start={self.start}, end={self.end}, num_steps={self.num_steps}"


class Actor(ProbabilisticTensorDictSequential):
    r"""The policy :math:`\pi_\theta(a \mid z)`: a squashed mean and scheduled, clipped noise.

    It writes ``<action>_loc``, ``<action>_scale`` and an action. The mean is
    ``tanh`` of the network: mapped onto the action range with ``scale_to_range=True``, where the
    noise and its clip scale along (a :math:`\pm 0.4` task sees the same policy as a :math:`\pm 1`
    one), or left in :math:`\pm 1` and clamped, as the authors do, with ``False``. An end of the
    range beyond :math:`\pm 1` is then out of the mean's reach, which a warning says.

    Inside losses the noise is clipped; :meth:`acting` gives the same policy without the clip, for
    a collector.

    Args:
        latent_dim: size ``D`` of the latent.
        low: lower end of the action range, one entry per action dimension.
        high: upper end of the action range, like ``low``.
        hidden_dim: width of the two hidden layers.
        noise: the schedule of the noise; a new :class:`NoiseSchedule` by default.
        noise_clip: largest absolute noise in the losses, in units of half the action range
            (in action units where the range is not scaled); ``None`` for no clip.
        scale_to_range: whether the mean spans the action range.
        normalize_mean: whether the network's output is scaled down before the ``tanh`` where its
            mean absolute value exceeds one, so that the policy does not saturate (Wang et al.
            2020, "Striving for Simplicity and Performance in Off-Policy DRL").
        latent_key: where the latent ``[..., D]`` is read.
        action_key: where the action ``[..., A]`` is written.

    Raises:
        ValueError: if the range is empty, unbounded or of unequal lengths, or if it lies beyond
            :math:`\pm 1` where it is not scaled to.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> actor = Actor(latent_dim=50, low=[-0.4] * 17, high=[0.4] * 17)
        >>> td = actor(TensorDict(latent=torch.randn(4, 50), batch_size=[4]))
        >>> td["action"].shape, bool(td["action"].abs().max() <= 0.4)
        (torch.Size([4, 17]), True)
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
    ) -> None:
        lower, upper = _check_range(low, high)
        if not scale_to_range:
            _check_reach(lower, upper)
        half = (upper - lower) / 2 if scale_to_range else torch.ones_like(upper)
        middle = (upper + lower) / 2 if scale_to_range else torch.zeros_like(upper)
        network = _ActorNetwork(
            mlp(latent_dim, len(lower), hidden_dim),
            NoiseSchedule() if noise is None else noise,
            middle,
            half,
            normalize_mean,
        )
        loc, scale = suffix_key(action_key, "_loc"), suffix_key(action_key, "_scale")
        super().__init__(
            TensorDictModule(network, in_keys=[latent_key], out_keys=[loc, scale]),
            _action_distribution(
                loc,
                scale,
                action_key,
                low=_uniform_or_tensor(lower),
                high=_uniform_or_tensor(upper),
                noise_clip=None if noise_clip is None else _uniform_or_tensor(noise_clip * half),
            ),
        )
        self.action_key = action_key

    @property
    def noise(self) -> NoiseSchedule:
        """The schedule of the noise, shared by acting and losses."""
        return self[0].module.noise

    def acting(self) -> ProbabilisticTensorDictSequential:
        """The same networks and schedule with unclipped noise, for collecting experience.

        The noise is drawn where ``ExplorationType.RANDOM`` is set, as collectors do; anywhere else
        the action is the mean.
        """
        head = self[-1]
        loc, scale = head.in_keys
        kwargs = {**head.distribution_kwargs, "noise_clip": None}
        acting = _action_distribution(loc, scale, self.action_key, **kwargs)
        acting.default_interaction_type = InteractionType.DETERMINISTIC
        return ProbabilisticTensorDictSequential(self[0], acting)


class _ActorNetwork(nn.Module):
    """Latent to the action's mean and noise scale, both in action units."""

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


def _action_distribution(
    loc: NestedKey,
    scale: NestedKey,
    action_key: NestedKey,
    low: Tensor | float,
    high: Tensor | float,
    noise_clip: Tensor | float | None,
) -> ProbabilisticTensorDictModule:
    return _ActionHead(
        in_keys={"loc": loc, "scale": scale},
        out_keys=[action_key],
        distribution_class=ClampedNormal,
        distribution_kwargs={"low": low, "high": high, "noise_clip": noise_clip},
        default_interaction_type="random",
    )


class _ActionHead(ProbabilisticTensorDictModule):
    """Takes the range along when it is moved, so that no draw copies it from the host."""

    def _apply(self, fn: Any, recurse: bool = True) -> _ActionHead:
        super()._apply(fn, recurse)
        for name, value in self.distribution_kwargs.items():
            if isinstance(value, Tensor):
                self.distribution_kwargs[name] = fn(value)
        return self


def _check_range(low: Sequence[float], high: Sequence[float]) -> tuple[Tensor, Tensor]:
    lower, upper = torch.as_tensor(low).float(), torch.as_tensor(high).float()
    if lower.ndim != 1 or lower.shape != upper.shape:
        raise ValueError(
            "low and high need one entry per action dimension, got shapes "
            f"{tuple(lower.shape)} and {tuple(upper.shape)}"
        )
    if not bool((lower < upper).all() and lower.isfinite().all() and upper.isfinite().all()):
        raise ValueError(f"the action range must be finite with low < high, got {low} to {high}")
    return lower, upper


def _check_reach(low: Tensor, high: Tensor) -> None:
    """Raises if a mean in +-1 reaches nothing of the range; warns if it does not reach an end."""
    remedy = "choose scale_to_range=True (agent.scale_to_range=true in the recipe)"
    if bool(((low >= 1) | (high <= -1)).any()):
        raise ValueError(
            f"with scale_to_range=False the action's mean is in +-1, which the range "
            f"{low.tolist()} to {high.tolist()} does not reach, so that every action is the same: "
            f"{remedy}"
        )
    if bool(((low < -1) | (high > 1)).any()):
        warnings.warn(
            f"with scale_to_range=False the action's mean is in +-1, and never reaches the ends of "
            f"the range {low.tolist()} to {high.tolist()}: {remedy}",
            stacklevel=3,
        )


def _uniform_or_tensor(values: Tensor) -> Tensor | float:
    """One number where all entries agree, so that the usual case needs no transfer to a GPU."""
    return values[0].item() if bool((values == values[0]).all()) else values

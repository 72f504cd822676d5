"""The choices of :class:`~alm_torchrl.objectives.ALMLoss`."""

from __future__ import annotations

from typing import Any, Literal, get_args

Reduction = Literal["none", "mean", "sum"]
ShortWindows = Literal["mask", "drop"]
Consistency = Literal["reverse_kl", "forward_kl", "squared_distance", "classifier"]
LatentTarget = Literal["moving_average", "stop_gradient", "online"]
ActorObjective = Literal["lambda_returns", "bound", "value"]

_CHOICES = {
    "reduction": Reduction,
    "short_windows": ShortWindows,
    "consistency": Consistency,
    "latent_target": LatentTarget,
    "actor_objective": ActorObjective,
}


def check_choices(loss: Any) -> None:
    """Raises if an attribute of the loss is not one of its choices."""
    for name, literal in _CHOICES.items():
        value, choices = getattr(loss, name), get_args(literal)
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")

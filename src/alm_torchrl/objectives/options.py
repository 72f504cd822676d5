"""The choices of :class:`~alm_torchrl.objectives.ALMLoss`."""

from __future__ import annotations

from typing import Any, Literal, get_args

Reduction = Literal["none", "mean", "sum"]
#: The use of windows cut short by an episode's end, in the world-model loss.
ShortWindows = Literal["mask", "drop"]
#: The distance between dynamics and encoder in the world-model loss.
Consistency = Literal["reverse_kl", "forward_kl", "squared_distance", "classifier"]
#: The encoder of the dynamics' targets and of the latents of the other losses.
LatentTarget = Literal["moving_average", "stop_gradient", "online"]
#: The quantity that the actor maximizes.
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

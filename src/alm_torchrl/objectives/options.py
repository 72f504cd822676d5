"""The losses of :class:`~alm_torchrl.objectives.ALMLoss`, and the choices of its options."""

from __future__ import annotations

from typing import Any, Literal

LOSS_KEYS = ("loss_world_model", "loss_reward", "loss_classifier", "loss_value", "loss_actor")
#: The losses of the first transitions; the others read whole windows.
FIRST_STEP_KEYS = {*LOSS_KEYS[1:], "loss_continuation"}

Reduction = Literal["none", "mean", "sum"]
LossFunction = Literal["l2", "smooth_l1", "l1"]
ShortWindows = Literal["mask", "drop"]
Consistency = Literal["reverse_kl", "forward_kl", "squared_distance", "classifier"]
LatentTarget = Literal["moving_average", "stop_gradient", "online"]
ActorObjective = Literal["lambda_returns", "bound", "value"]

CHOICES: dict[str, Any] = {
    "reduction": Reduction,
    "loss_function": LossFunction,
    "use_prioritized_weights": Literal["auto", True, False],
    "short_windows": ShortWindows,
    "consistency": Consistency,
    "latent_target": LatentTarget,
    "actor_objective": ActorObjective,
}

"""Returns of a policy, bias of its values, and diagnostics of its model."""

from alm_torchrl.evaluation.bias import (
    Bias,
    UnknownReturnsError,
    lower_bound,
    monte_carlo_returns,
    rollout_for_bias,
    value_bias,
)
from alm_torchrl.evaluation.diagnostics import (
    Calibration,
    classifier_calibration,
    effective_rank,
    model_error,
    split_into_windows,
)
from alm_torchrl.evaluation.returns import evaluate_policy
from alm_torchrl.evaluation.terminations import Terminations, terminations

__all__ = [
    "Bias",
    "Calibration",
    "Terminations",
    "UnknownReturnsError",
    "classifier_calibration",
    "effective_rank",
    "evaluate_policy",
    "lower_bound",
    "model_error",
    "monte_carlo_returns",
    "rollout_for_bias",
    "split_into_windows",
    "terminations",
    "value_bias",
]

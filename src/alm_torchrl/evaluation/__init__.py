"""How good a policy is, and what its model claims."""

from alm_torchrl.evaluation.bias import (
    Bias,
    UnknownReturnsError,
    monte_carlo_returns,
    normalized_bias,
    value_bias,
    visit,
)
from alm_torchrl.evaluation.bound import lower_bound
from alm_torchrl.evaluation.diagnostics import (
    Calibration,
    calibration,
    classifier_calibration,
    cut_windows,
    effective_rank,
    model_error,
    rollout_error,
)
from alm_torchrl.evaluation.returns import evaluate_policy

__all__ = [
    "Bias",
    "Calibration",
    "UnknownReturnsError",
    "calibration",
    "classifier_calibration",
    "cut_windows",
    "effective_rank",
    "evaluate_policy",
    "lower_bound",
    "model_error",
    "monte_carlo_returns",
    "normalized_bias",
    "rollout_error",
    "value_bias",
    "visit",
]

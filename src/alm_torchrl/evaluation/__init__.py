"""How good a policy is, and what its model claims."""

from alm_torchrl.evaluation.bound import lower_bound
from alm_torchrl.evaluation.returns import evaluate_policy

__all__ = ["evaluate_policy", "lower_bound"]

"""Options of recipes/mujoco.py for task, agent and objective. Presets are in conf/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


def fixed(default: Any = MISSING, *, before: Any = MISSING, named: bool = True) -> Any:
    """Declares an option that cannot change when a run is resumed.

    Args:
        default: value if conf/ sets none; a type is called to make it.
        before: value in runs older than the option (``"${seed}"`` copies another option). The
            default is ``default``; without both, every config.yaml must contain the option.
        named: whether an overridden value becomes part of the run's folder name.
    """
    return _declare("fixed", default, before, named)


def noted(default: Any = MISSING, *, before: Any = MISSING, named: bool = True) -> Any:
    """Declares an option that may change when a run is resumed; changes.jsonl records the change.

    The arguments are those of :func:`fixed`.
    """
    return _declare("noted", default, before, named)


def free(default: Any = MISSING) -> Any:
    """Declares an option that affects neither learning nor the name of the run's folder."""
    return _declare("free", default, MISSING, named=False)


def _declare(kind: str, default: Any, before: Any, named: bool) -> Any:
    value = {"default_factory": default} if isinstance(default, type) else {"default": default}
    if before is MISSING:
        before = default() if isinstance(default, type) else default
    return field(**value, metadata={"kind": kind, "before": before, "named": named})


@dataclass
class Task:
    """Task and observations (alm_torchrl.envs.make_env)."""

    name: str = fixed(named=False)  # name in folders and plots
    id: str = fixed()  # Gymnasium id, dm_control/domain-task, or package.module:attribute
    kwargs: dict[str, Any] = fixed(dict)  # further arguments of the environment
    pixels: Any = fixed(False)  # size of observed images: 84 or [height, width]; false: vectors
    frame_stack: int = fixed(3)  # number of stacked images
    proprioception: bool = fixed(False)  # observe the vector in addition to images
    action_repeat: int = fixed(1)  # simulator steps per environment step
    mask_velocities: bool = fixed(False)  # remove velocities from the vector
    distractors: int = fixed(0)  # dimensions of noise appended to the vector
    history: int = fixed(0)  # past vectors in the entry "history"
    history_actions: bool = fixed(False)  # include past actions in the history
    replay_capacity: int = fixed()  # replay capacity of the authors
    paper_steps: int = noted(named=False)  # steps of the authors' curve


@dataclass
class Agent:
    """Network sizes and noise schedule (alm_torchrl.agent.AgentConfig)."""

    latent_dim: int = fixed()  # dimensions of the latent
    hidden_dim: int = fixed()  # width of all networks but the dynamics
    dynamics_hidden_dim: int = fixed()  # width of the latent dynamics
    scale_to_range: bool = fixed()  # scale the mean action to the action range
    noise_clip: float | None = fixed()  # clip of the action noise in the losses
    noise_start: float = fixed()  # initial scale of the action noise
    noise_end: float = fixed()  # final scale of the action noise
    noise_steps: int = fixed()  # steps until the final scale
    normalize_mean: bool = fixed(False)  # normalize the mean to avoid saturation
    continuation: bool = fixed(False)  # learn and imagine terminations
    network_kwargs: dict[str, Any] = fixed(dict)  # by network: depth, activation_class, ...
    networks: dict[str, Any] = fixed(dict)  # own networks; called with action spec and sizes


#: Encoder of runs older than the option.
_MLP = {"_target_": "alm_torchrl.modules.MLPEncoder.from_spec"}


@dataclass
class Encoder:
    """Encoder; ``_target_`` is the import path of a class or function to call."""

    transforms: list[Any] = fixed(before=[])  # transforms of the environment
    build: dict[str, Any] = fixed(before=_MLP)  # called with observation spec and sizes


@dataclass
class Objective:
    """Losses (alm_torchrl.objectives.ALMLoss)."""

    horizon: int = fixed()  # imagined steps and window length
    gamma: float = fixed()  # discount
    lmbda: float = fixed()  # lambda of the imagined returns
    consistency_coeff: float = fixed()  # weight of the log-ratio in the actor's reward
    bootstrap_terminated: bool = fixed()  # bootstrap after terminal states
    short_windows: str = fixed()  # windows at the end of an episode: mask or drop
    reward_term: bool = fixed(before=True)  # rewards in the world-model loss
    value_term: bool = fixed(before=True)  # final value in the world-model loss
    consistency: str = fixed(before="reverse_kl")  # or forward_kl, squared_distance, classifier
    consistency_level: float | None = fixed(
        before=None
    )  # level held by a learned weight; null: fixed weight
    latent_target: str = fixed(before="moving_average")  # or stop_gradient, online
    actor_objective: str = fixed(before="lambda_returns")  # or bound, value (without the model)
    value_expansion: bool = fixed(False)  # value targets from imagined returns
    start_steps: int = fixed(0)  # maximum imagined steps before the actor's rollout
    auxiliary_losses: dict[str, Any] = fixed(dict)  # further losses by name, each a _target_


@dataclass
class LearningRates:
    """Learning rate of each parameter group."""

    world_model: float = noted()  # encoder, latent dynamics and auxiliary losses
    encoder: float | None = noted(None)  # encoder alone; null: world_model
    dynamics: float | None = noted(None)  # the other networks of world_model; null: world_model
    reward: float = noted()  # reward model and classifier
    value: float = noted()  # critics
    actor: float = noted()  # actor
    continuation: float = noted(before="${learning_rates.reward}")  # continuation model
    multiplier: float = noted(
        before="${learning_rates.actor}"
    )  # learned weight of the consistency term

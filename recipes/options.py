"""Options of recipes/mujoco.py for task, agent and objective; their defaults are the paper's.

Presets, tasks and encoders in conf/ contain the values that differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recipes.schema import fixed, noted


@dataclass
class Task:
    """Task and observations (alm_torchrl.envs.make_env)."""

    name: str = fixed("name in folders and plots", named=False)
    id: str = fixed("Gymnasium id, dm_control/domain-task, or package.module:attribute")
    kwargs: dict[str, Any] = fixed("further arguments of the environment", dict)
    pixels: Any = fixed("size of observed images, 84 or [height, width]; false: vectors", False)
    frame_stack: int = fixed("number of stacked images", 3, ge=1)
    proprioception: bool = fixed("observe the vector in addition to images", False)
    action_repeat: int = fixed("simulator steps per environment step", 1, ge=1)
    mask_velocities: bool = fixed("remove velocities from the vector", False)
    distractors: int = fixed("dimensions of noise appended to the vector", 0, ge=0)
    history: int = fixed('past vectors in the entry "history"', 0, ge=0)
    history_actions: bool = fixed("include past actions in the history", False)
    replay_capacity: int = fixed("replay capacity of the authors", ge=1)
    paper_steps: int = noted("steps of the authors' curve", named=False, ge=1)


@dataclass
class Agent:
    """Network sizes and noise schedule (alm_torchrl.agent.AgentConfig)."""

    latent_dim: int = fixed("dimensions of the latent", 50, ge=1)
    hidden_dim: int = fixed("width of all networks but the dynamics", 512, ge=1)
    dynamics_hidden_dim: int = fixed("width of the latent dynamics", 1024, ge=1)
    scale_to_range: bool = fixed(
        "scale the mean action to the action range; false: mean in [-1, 1], clamped "
        "(matters only for Humanoid, with actions in [-0.4, 0.4])",
        False,
    )
    noise_clip: float | None = fixed("clip of the action noise in the losses", 0.3, gt=0)
    noise_start: float = fixed("initial scale of the action noise", 1.0, ge=0)
    noise_end: float = fixed("final scale of the action noise", 0.1, ge=0)
    noise_steps: int = fixed("steps until the final scale", 100_000, ge=1)
    normalize_mean: bool = fixed("normalize the mean to avoid saturation", False)
    continuation: bool = fixed("learn and imagine terminations", False)
    network_kwargs: dict[str, Any] = fixed("by network: depth, activation_class, ...", dict)
    networks: dict[str, Any] = fixed(
        "own networks, each a _target_ called with action spec and sizes", dict
    )


@dataclass
class Encoder:
    """Encoder; ``_target_`` is the import path of a class or function to call."""

    transforms: list[Any] = fixed("transforms of the environment", list)
    build: dict[str, Any] = fixed("_target_ called with observation spec and sizes", dict)


@dataclass
class Objective:
    """Losses (alm_torchrl.objectives.ALMLoss)."""

    horizon: int = fixed("imagined steps and window length", 3, ge=1)
    gamma: float = fixed("discount", 0.99, ge=0, le=1)
    lmbda: float = fixed("lambda of the imagined returns", 0.95, ge=0, le=1)
    consistency_coeff: float = fixed("weight of the log-ratio in the actor's reward", 0.1, ge=0)
    bootstrap_terminated: bool = fixed("bootstrap after terminal states; authors: true", False)
    short_windows: str = fixed(
        "windows at the end of an episode; authors: drop", "mask", choices=("mask", "drop")
    )
    reward_term: bool = fixed("rewards in the world-model loss", True)
    value_term: bool = fixed("final value in the world-model loss", True)
    consistency: str = fixed(
        "measure of the consistency term",
        "reverse_kl",
        choices=("reverse_kl", "forward_kl", "squared_distance", "classifier"),
    )
    consistency_level: float | None = fixed(
        "level of the consistency term held by a learned weight; null: fixed weight", None, gt=0
    )
    latent_target: str = fixed(
        "encoder of the consistency term's target",
        "moving_average",
        choices=("moving_average", "stop_gradient", "online"),
    )
    teacher_forcing: bool = fixed(
        "predict each step from a recorded observation, not from the previous sample", False
    )
    actor_objective: str = fixed(
        "what the actor maximizes; value: without the model",
        "lambda_returns",
        choices=("lambda_returns", "bound", "value"),
    )
    auxiliary_losses: dict[str, Any] = fixed(
        "further losses by name, each a _target_ or the entry of the encoder's own loss", dict
    )


@dataclass
class LearningRates:
    """Learning rate of each parameter group."""

    world_model: float = noted("encoder, latent dynamics and auxiliary losses", 1e-4, ge=0)
    encoder: float | None = noted("encoder alone; null: world_model", None, ge=0)
    dynamics: float | None = noted(
        "the other networks of world_model; null: world_model", None, ge=0
    )
    reward: float = noted("reward model and classifier", 1e-4, ge=0)
    value: float = noted("critics", 1e-4, ge=0)
    actor: float = noted("actor", 1e-4, ge=0)
    continuation: float = noted("continuation model", 1e-4, ge=0)
    multiplier: float = noted("learned weight of the consistency term", 1e-4, ge=0)

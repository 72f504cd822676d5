"""The options of recipes/mujoco.py that say what is learnt. The values stand in conf/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class Task:
    """A task, and what is observed of it (alm_torchrl.envs.make_env)."""

    name: str = MISSING  # how folders and plots call it
    id: str = MISSING  # a Gymnasium id, dm_control/domain-task, or package.module:attribute
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of what makes it
    pixels: Any = False  # observe frames of this size, 84 or [height, width], not the vector
    frame_stack: int = 3  # frames observed at once
    proprioception: bool = False  # keep the vector beside the pixels
    action_repeat: int = 1  # simulator steps with each action; one environment step
    mask_velocities: bool = False  # leave the velocities out of the vector
    distractors: int = 0  # dimensions of Gaussian noise appended to the vector
    history: int = 0  # vectors in the entry "history", for encoders that read the past
    history_actions: bool = False  # with the action before each of them
    replay_capacity: int = MISSING  # transitions that the authors keep for this task
    paper_steps: int = MISSING  # length of the authors' curve, in steps after the warm-up


@dataclass
class Agent:
    """Sizes of the networks and the schedule of the noise (alm_torchrl.agent.AgentConfig)."""

    latent_dim: int = MISSING  # size of the latent
    hidden_dim: int = MISSING  # width of encoder, reward, classifier, values and actor
    dynamics_hidden_dim: int = MISSING  # width of the latent dynamics
    scale_to_range: bool = MISSING  # the actor's mean spans the action range
    noise_clip: float | None = MISSING  # largest action noise inside the losses
    noise_start: float = MISSING  # scale of the noise at the first step
    noise_end: float = MISSING  # scale of the noise after noise_steps
    noise_steps: int = MISSING  # steps to anneal over


@dataclass
class Encoder:
    """The representation; a _target_ is an import path, called with the options beside it."""

    transforms: list[Any] = MISSING  # what the environment adds to its observations for it
    build: dict[str, Any] = MISSING  # from observation_spec, latent_dim, hidden_dim to the encoder


@dataclass
class Objective:
    """The losses (alm_torchrl.objectives.ALMLoss)."""

    horizon: int = MISSING  # imagined steps, and the length of the windows
    gamma: float = MISSING  # discount
    lmbda: float = MISSING  # lambda of the imagined returns
    consistency_coeff: float = MISSING  # weight of the log-ratio in the actor's reward
    bootstrap_terminated: bool = MISSING  # keep the value term after a terminal state
    short_windows: str = MISSING  # windows cut short by an episode's end: mask or drop
    reward_term: bool = MISSING  # rewards in the world-model loss
    value_term: bool = MISSING  # the value at the window's end in the world-model loss
    consistency: str = MISSING  # reverse_kl, forward_kl, squared_distance or classifier
    consistency_target: float | None = MISSING  # level that a learnt weight holds it at
    latent_target: str = MISSING  # the encoder's moving_average, stop_gradient or online
    actor_objective: str = MISSING  # lambda_returns, bound, or value (without the model)


@dataclass
class LearningRates:
    """Adam's learning rate for each parameter group."""

    world_model: float = MISSING  # encoder and latent dynamics
    reward: float = MISSING  # reward model and classifier
    value: float = MISSING  # action values
    actor: float = MISSING  # actor
    multiplier: float = MISSING  # weight of the consistency term, where it is learnt

"""The options of recipes/mujoco.py that say what is learnt. The values stand in conf/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


def fixed(default: Any = MISSING, *, before: Any = MISSING, named: bool = True) -> Any:
    """Declares an option that a run cannot change when it goes on.

    Args:
        default: its value, where no file in conf/ gives one; a type is called for it.
        before: its value in runs that are older than the option, such as ``"${seed}"`` for that of
            another option; the default if there is one. Without, every config.yaml has the option.
        named: whether the name of a run's folder carries the option when it is overridden.
    """
    return _declare("fixed", default, before, named)


def noted(default: Any = MISSING, *, before: Any = MISSING, named: bool = True) -> Any:
    """Declares an option that may change when a run goes on: changes.jsonl then says at which step.

    The arguments are those of :func:`fixed`.
    """
    return _declare("noted", default, before, named)


def free(default: Any = MISSING) -> Any:
    """Declares an option that has no part in what is learnt, nor in the name of a run's folder."""
    return _declare("free", default, MISSING, named=False)


def _declare(kind: str, default: Any, before: Any, named: bool) -> Any:
    value = {"default_factory": default} if isinstance(default, type) else {"default": default}
    if before is MISSING:
        before = default() if isinstance(default, type) else default
    return field(**value, metadata={"kind": kind, "before": before, "named": named})


@dataclass
class Task:
    """A task, and what is observed of it (alm_torchrl.envs.make_env)."""

    name: str = fixed(named=False)  # how folders and plots call it
    id: str = fixed()  # a Gymnasium id, dm_control/domain-task, or package.module:attribute
    kwargs: dict[str, Any] = fixed(dict)  # further arguments of what makes it
    pixels: Any = fixed(False)  # observe frames of this size, 84 or [height, width], not the vector
    frame_stack: int = fixed(3)  # frames observed at once
    proprioception: bool = fixed(False)  # keep the vector beside the pixels
    action_repeat: int = fixed(1)  # simulator steps with each action; one environment step
    mask_velocities: bool = fixed(False)  # leave the velocities out of the vector
    distractors: int = fixed(0)  # dimensions of Gaussian noise appended to the vector
    history: int = fixed(0)  # vectors in the entry "history", for encoders that read the past
    history_actions: bool = fixed(False)  # with the action before each of them
    replay_capacity: int = fixed()  # transitions that the authors keep for this task
    paper_steps: int = noted(named=False)  # steps of the authors' curve, after the warm-up


@dataclass
class Agent:
    """Sizes of the networks and the schedule of the noise (alm_torchrl.agent.AgentConfig)."""

    latent_dim: int = fixed()  # size of the latent
    hidden_dim: int = fixed()  # width of encoder, reward, classifier, values and actor
    dynamics_hidden_dim: int = fixed()  # width of the latent dynamics
    scale_to_range: bool = fixed()  # the actor's mean spans the action range
    noise_clip: float | None = fixed()  # largest action noise inside the losses
    noise_start: float = fixed()  # scale of the noise at the first step
    noise_end: float = fixed()  # scale of the noise after noise_steps
    noise_steps: int = fixed()  # steps to anneal over
    normalize_mean: bool = fixed(before=False)  # keep the actor's mean from saturating
    continuation: bool = fixed(before=False)  # learn when episodes terminate, and imagine it


#: The encoder of runs that are older than the choice.
_MLP = {"_target_": "alm_torchrl.modules.MLPEncoder.from_spec"}


@dataclass
class Encoder:
    """The representation; a _target_ is an import path, called with the options beside it."""

    transforms: list[Any] = fixed(before=[])  # of the environment, for the encoder
    build: dict[str, Any] = fixed(before=_MLP)  # called with the specs and sizes as well


@dataclass
class Objective:
    """The losses (alm_torchrl.objectives.ALMLoss)."""

    horizon: int = fixed()  # imagined steps, and the length of the windows
    gamma: float = fixed()  # discount
    lmbda: float = fixed()  # lambda of the imagined returns
    consistency_coeff: float = fixed()  # weight of the log-ratio in the actor's reward
    bootstrap_terminated: bool = fixed()  # keep the value term after a terminal state
    short_windows: str = fixed()  # windows cut short by an episode's end: mask or drop
    reward_term: bool = fixed(before=True)  # rewards in the world-model loss
    value_term: bool = fixed(before=True)  # the value at the window's end in the world-model loss
    consistency: str = fixed(before="reverse_kl")  # or forward_kl, squared_distance, classifier
    consistency_level: float | None = fixed(before=None)  # level that a learnt weight holds it at
    latent_target: str = fixed(before="moving_average")  # or stop_gradient, online
    actor_objective: str = fixed(before="lambda_returns")  # or bound, value (without the model)
    value_expansion: bool = fixed(before=False)  # value targets from imagined returns
    start_steps: int = fixed(before=0)  # steps, at most, that the actor's starts are imagined on


@dataclass
class LearningRates:
    """Adam's learning rate for each parameter group."""

    world_model: float = noted()  # encoder and latent dynamics
    reward: float = noted()  # reward model and classifier
    value: float = noted()  # action values
    actor: float = noted()  # actor
    continuation: float = noted(before="${learning_rates.reward}")  # continuation model, if any
    multiplier: float = noted(before="${learning_rates.actor}")  # of a learnt weight

"""Every component of Aligned Latent Models, built from an environment's specs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from tensordict.utils import NestedKey, unravel_key
from torch import nn
from torchrl.data import Bounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl.files import load_tensors, one_line, save_tensors
from alm_torchrl.modules import (
    Actor,
    ContinuationModel,
    LatentDynamics,
    MLPEncoder,
    NoiseSchedule,
    QValueEnsemble,
    RewardModel,
    TransitionClassifier,
    describe,
    plain_numbers,
    rebuild,
)
from alm_torchrl.modules.encoders.specs import observation_shapes
from alm_torchrl.objectives import check_encoder
from alm_torchrl.objectives.components import match_compiled

__all__ = ["ALMAgent", "AgentConfig"]

_FORMAT = "alm_torchrl.ALMAgent"
_VERSION = 2


@dataclass(frozen=True)
class AgentConfig:
    """What an :class:`ALMAgent` is built from; the defaults are the paper's.

    Attributes:
        observation_dims: size of each vector observation by key, in the order of concatenation.
        action_low: lower end of the action range, one entry per dimension.
        action_high: upper end of the action range.
        latent_dim: size of the latent.
        hidden_dim: width of encoder, reward, classifier, values and actor.
        dynamics_hidden_dim: width of the latent dynamics.
        scale_to_range: whether the actor's mean spans the action range (see
            :class:`~alm_torchrl.modules.Actor`); the authors leave it in +-1.
        noise_clip: largest action noise inside the losses.
        noise_start: scale of the action noise at the first step.
        noise_end: scale of the action noise after ``noise_steps``.
        noise_steps: steps over which the noise is annealed.
        normalize_mean: whether the actor's output is kept from saturating; see
            :class:`~alm_torchrl.modules.Actor`.
        continuation: whether there is a :class:`~alm_torchrl.modules.ContinuationModel`, for tasks
            whose episodes terminate.
    """

    observation_dims: dict[NestedKey, int]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    latent_dim: int = 50
    hidden_dim: int = 512
    dynamics_hidden_dim: int = 1024
    scale_to_range: bool = True
    noise_clip: float | None = 0.3
    noise_start: float = 1.0
    noise_end: float = 0.1
    noise_steps: int = 100_000
    normalize_mean: bool = False
    continuation: bool = False

    def __post_init__(self) -> None:
        """Makes numbers of NumPy's Python's own, which a file can hold."""
        for field in fields(self):
            object.__setattr__(self, field.name, plain_numbers(getattr(self, field.name)))
        for name in ("action_low", "action_high"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


class ALMAgent(nn.Module):
    """The six networks of Aligned Latent Models and the policies made from them.

    Any component can be replaced. An agent with one of this package's encoders is saved and loaded
    like any other; components of your own are passed to :meth:`load` again.

    Args:
        config: sizes and action range; see :meth:`from_env` to read them off an environment.
        encoder: in place of :class:`~alm_torchrl.modules.MLPEncoder`.
        dynamics: in place of :class:`~alm_torchrl.modules.LatentDynamics` with the encoder's
            ``head``, so that their distributions have a KL divergence.
        reward_model: in place of :class:`~alm_torchrl.modules.RewardModel`.
        classifier: in place of :class:`~alm_torchrl.modules.TransitionClassifier`.
        qvalue_network: in place of :class:`~alm_torchrl.modules.QValueEnsemble`.
        actor: in place of :class:`~alm_torchrl.modules.Actor`.
        continuation_model: in place of :class:`~alm_torchrl.modules.ContinuationModel`.

    Examples:
        >>> config = AgentConfig({"observation": 3}, (-1.0,), (1.0,), latent_dim=4, hidden_dim=8)
        >>> agent = ALMAgent(config)
        >>> agent.policy()(observation=torch.randn(2, 3)).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        encoder: ProbabilisticTensorDictSequential | None = None,
        dynamics: ProbabilisticTensorDictSequential | None = None,
        reward_model: TensorDictModule | None = None,
        classifier: TensorDictModule | None = None,
        qvalue_network: TensorDictModule | None = None,
        actor: ProbabilisticTensorDictSequential | None = None,
        continuation_model: TensorDictModule | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        latent, action = config.latent_dim, len(config.action_low)
        hidden = config.hidden_dim
        self.encoder = encoder or _make_encoder(config)
        self.dynamics = dynamics or LatentDynamics(
            latent, action, config.dynamics_hidden_dim, head=getattr(self.encoder, "head", None)
        )
        self.reward_model = reward_model or RewardModel(latent, action, hidden)
        self.classifier = classifier or TransitionClassifier(latent, action, hidden)
        self.qvalue_network = qvalue_network or QValueEnsemble(latent, action, hidden)
        self.actor = actor or _make_actor(config)
        if continuation_model is not None:
            self.config = replace(config, continuation=True)
        elif config.continuation:
            continuation_model = ContinuationModel(latent, action, hidden)
        self.continuation_model = continuation_model

    @classmethod
    def from_env(cls, env: EnvBase, **options: Any) -> ALMAgent:
        """Builds an agent whose sizes fit an environment.

        Args:
            env: any TorchRL environment with a bounded continuous action. Its vector observations
                (of any numbers, also one-hot) are concatenated, and a warning names what is not
                read; with another ``encoder`` they can be anything.
            **options: fields of :class:`AgentConfig`, and components by name. The size of the
                latent is that of the encoder, if one is given, and the dynamics has its head.

        Returns:
            The agent, on the environment's device.

        Raises:
            TypeError: for an unknown option, or an action that is not bounded and continuous.
            ValueError: if no vector observation is found and no encoder is given, or if the encoder
                is not what :func:`~alm_torchrl.objectives.check_encoder` asks for.

        Examples:
            >>> from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv
            >>> env = ContinuousActionVecMockEnv()
            >>> agent = ALMAgent.from_env(env, latent_dim=8, hidden_dim=16)
            >>> env.rollout(3, agent.policy()).batch_size
            torch.Size([3])
        """
        names = {field.name for field in fields(AgentConfig)}
        unknown = options.keys() - names - set(COMPONENTS)
        if unknown:
            known = ", ".join(sorted(names | set(COMPONENTS)))
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}; choose from {known}")
        components = {name: options.pop(name) for name in COMPONENTS if name in options}
        low, high = _action_range(env)
        if "observation_dims" not in options:
            options["observation_dims"] = {} if "encoder" in components else _vector_keys(env)
        if "encoder" in components:
            spec, size = env.observation_spec_unbatched, options.get("latent_dim")
            options["latent_dim"] = check_encoder(components["encoder"], spec, latent_dim=size)
        agent = cls(AgentConfig(action_low=low, action_high=high, **options), **components)
        agent = agent.to(env.device or "cpu")
        if "encoder" in components or "dynamics" in components:
            check_encoder(
                agent.encoder,
                env.observation_spec_unbatched,
                agent.dynamics,
                action_spec=env.action_spec_unbatched,
                latent_dim=agent.config.latent_dim,
            )
        return agent

    @property
    def noise(self) -> NoiseSchedule:
        """The schedule of the action noise, shared by acting and the losses."""
        return self.actor.noise

    def networks(self) -> dict[str, TensorDictModuleBase]:
        """The components by the names of :class:`~alm_torchrl.objectives.ALMLoss`."""
        networks = {name: getattr(self, name) for name in COMPONENTS}
        return {name: network for name, network in networks.items() if network is not None}

    def policy(self) -> TensorDictModuleBase:
        """The policy from observation to action, for collectors, rollouts and evaluation.

        The action is the actor's mean, as in an evaluation. Under ``ExplorationType.RANDOM``, which
        collectors set, it carries the scheduled noise, unclipped. The policy encodes with a sample
        of the latent whatever the exploration type, as the authors do. What an encoder augments in
        training is seen as it is.

        Returns:
            A module that shares the agent's parameters and writes the action, and beside it what
            the encoder remembers, which is what it writes under ``"next"``.
        """
        encoder, actor = (
            network.acting() if hasattr(network, "acting") else network
            for network in (self.encoder, self.actor)
        )
        memory = [key for key in encoder.out_keys if unravel_key(key)[0] == "next"]
        sequence = TensorDictSequential(_Sampled(encoder), actor)
        return sequence.select_out_keys(self.actor.dist_sample_keys[-1], *memory)

    def update_statistics(self, data: TensorDictBase) -> None:
        """Moves the running statistics of the encoder's inputs on, if it keeps any.

        Call it on what a collector returns, once. The losses never move them.

        Args:
            data: new observations, of any batch size.
        """
        if hasattr(self.encoder, "update_statistics"):
            self.encoder.update_statistics(data)

    def save(self, path: str | Path) -> None:
        """Writes configuration and weights for acting (or for looking into the model).

        Args:
            path: the file; an existing one is replaced only once the new one is whole and can be
                read again.

        Raises:
            ValueError: if a component of your own keeps in its state what cannot be read again.
            OSError: if it cannot be written.
        """
        described = {name: describe(getattr(self, name)) for name in ("encoder", "dynamics")}
        plain = {name: getattr(net, "_orig_mod", net) for name, net in self.networks().items()}
        known = {name for name, part in plain.items() if type(part) in _FROM_CONFIG}
        known |= {name for name, description in described.items() if description is not None}
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "config": asdict(self.config),
            "custom": [name for name in self.networks() if name not in known],
            "described": {name: described[name] for name in described if name in known},
            "state_dict": self.state_dict(),
        }
        save_tensors(content, path)

    @classmethod
    def load(
        cls, path: str | Path, *, device: torch.device | str = "cpu", **components: nn.Module
    ) -> ALMAgent:
        """Reads what :meth:`save` wrote, without running any code stored in it.

        Args:
            path: the file.
            device: where the agent goes.
            **components: the components of your own that the agent was saved with.

        Returns:
            The agent.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not an agent, is damaged, comes from a newer version, or needs
                components that were not given or that do not fit.
        """
        content = _read_checkpoint(Path(path))
        missing = [name for name in content["custom"] if name not in components]
        if missing:
            needed = ", ".join(f"{name}=..." for name in missing)
            raise ValueError(f"{path} was saved with components of your own; pass {needed} to load")
        try:
            described = rebuild(content.get("described", {}))  # files of version 1 have none
            agent = cls(AgentConfig(**content["config"]), **{**described, **components})
        except Exception as error:  # whatever a file may hold
            raise ValueError(f"{path} does not describe an agent: {one_line(error)}") from error
        try:
            agent.load_state_dict(content["state_dict"])
        except Exception as error:
            what = one_line(error)
            raise ValueError(f"the weights in {path} do not fit the components: {what}") from error
        return agent.to(device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        match_compiled(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Sampled(TensorDictModuleBase):
    """Runs an encoder so that it always draws its latent."""

    def __init__(self, encoder: TensorDictModuleBase) -> None:
        super().__init__()
        self.encoder = encoder
        self.in_keys = encoder.in_keys
        self.out_keys = encoder.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        with set_exploration_type(ExplorationType.RANDOM):
            return self.encoder(tensordict)


COMPONENTS = (
    *("encoder", "dynamics", "reward_model", "classifier", "qvalue_network", "actor"),
    "continuation_model",
)
#: Components that a file need not describe, because their arguments stand in the configuration.
_FROM_CONFIG = (RewardModel, TransitionClassifier, QValueEnsemble, Actor, ContinuationModel)


def _make_encoder(config: AgentConfig) -> MLPEncoder:
    return MLPEncoder(
        sum(config.observation_dims.values()),
        config.latent_dim,
        config.hidden_dim,
        in_keys=list(config.observation_dims),
    )


def _make_actor(config: AgentConfig) -> Actor:
    return Actor(
        config.latent_dim,
        config.action_low,
        config.action_high,
        config.hidden_dim,
        noise=NoiseSchedule(config.noise_start, config.noise_end, config.noise_steps),
        noise_clip=config.noise_clip,
        scale_to_range=config.scale_to_range,
        normalize_mean=config.normalize_mean,
    )


def _action_range(env: EnvBase) -> tuple[tuple[float, ...], tuple[float, ...]]:
    spec = env.action_spec_unbatched
    if not isinstance(spec, Bounded) or spec.ndim != 1 or not spec.dtype.is_floating_point:
        raise TypeError(
            "ALM needs one bounded continuous action vector; the action of this environment is "
            f"{type(spec).__name__} of shape {tuple(spec.shape)}: make it "
            "torchrl.data.Bounded(low, high, (size,)) of floating-point numbers"
        )
    return tuple(spec.space.low.tolist()), tuple(spec.space.high.tolist())


def _vector_keys(env: EnvBase) -> dict[NestedKey, int]:
    spec = env.observation_spec_unbatched
    primed = (*env.reward_keys, *env.state_spec.keys(True, True))
    try:
        shapes = observation_shapes(spec, None, 1, ignore=primed, stacklevel=4)
    except ValueError:
        found = {str(key): tuple(leaf.shape) for key, leaf in spec.items(True, True)}
        raise ValueError(
            f"no vector observation among {found}; pass an `encoder` that reads what there is"
        ) from None
    return {key: shape[0] for key, shape in shapes.items()}


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        content = load_tensors(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or is not a file that ALMAgent.save wrote: {one_line(error)}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a file that ALMAgent.save wrote")
    kinds = {"version": int, "custom": list, "config": dict, "state_dict": dict}
    if wrong := [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]:
        raise ValueError(f"{path} is damaged: it has no {', no '.join(wrong)}")
    if content["version"] > _VERSION:
        raise ValueError(
            f"{path} has format version {content['version']}, this release reads up to {_VERSION}; "
            "upgrade alm-torchrl"
        )
    return content

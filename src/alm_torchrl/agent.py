"""The agent: all networks of Aligned Latent Models, built from the specs of an environment."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import WorldModel

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
)
from alm_torchrl.modules.encoders.base import observation_shapes
from alm_torchrl.modules.heads import DEFAULT_HEAD
from alm_torchrl.modules.rebuildable import describe, rebuild
from alm_torchrl.objectives import check_encoder
from alm_torchrl.objectives.parameters import match_compiled, summary
from alm_torchrl.pretrained import find_pretrained, read_folder, write_folder

__all__ = ["ALMAgent", "AgentConfig", "find_pretrained"]

_FORMAT = "alm_torchrl.ALMAgent"
_VERSION = 3

Latent = Literal["sample", "mean"]
#: The networks of an agent, by the argument names of ``ALMLoss``.
COMPONENTS = (
    "encoder",
    "dynamics",
    "reward_model",
    "classifier",
    "qvalue_network",
    "actor",
    "continuation_model",
)


@dataclass(frozen=True)
class AgentConfig:
    """Sizes and options of an :class:`ALMAgent`; the defaults are the paper's.

    Attributes:
        observation_dims: size of each vector observation by key, in the order of concatenation.
        action_low: lower bound of the action, one entry per dimension.
        action_high: upper bound of the action.
        action_key: entry of the action; an environment may have a nested one.
        latent_dim: size of the latent.
        hidden_dim: width of encoder, reward model, classifier, values and actor.
        dynamics_hidden_dim: width of the latent dynamics.
        scale_to_range: whether the actor's mean spans the action range; the authors keep it in +-1.
        noise_clip: largest action noise in the losses.
        noise_start: initial scale of the action noise.
        noise_end: scale of the action noise after ``noise_steps``.
        noise_steps: number of steps over which the noise is annealed.
        normalize_mean: whether the actor normalizes its output, which avoids saturation.
        continuation: whether to build a :class:`~alm_torchrl.modules.ContinuationModel`, for tasks
            whose episodes terminate.
        network_kwargs: further arguments of the default networks, by the names of
            :meth:`ALMAgent.networks`: ``{"actor": {"depth": 3, "activation_class": nn.SiLU}}``.
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
    network_kwargs: dict[str, dict[str, Any]] = field(default_factory=dict)
    action_key: NestedKey = "action"

    def __post_init__(self) -> None:
        """Checks network names, and converts values to plain Python, which a file can hold."""
        if unknown := self.network_kwargs.keys() - set(COMPONENTS):
            raise ValueError(
                f"network_kwargs has unknown networks: {', '.join(sorted(map(repr, unknown)))}; "
                f"choose from {', '.join(COMPONENTS)}"
            )
        for entry in fields(self):
            object.__setattr__(self, entry.name, describe(getattr(self, entry.name)))
        for name in ("action_low", "action_high"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))

    def arguments(self, network: str, **defaults: Any) -> dict[str, Any]:
        """The keyword arguments of a network: its ``network_kwargs`` over the given defaults."""
        own = rebuild(self.network_kwargs.get(network, {}))
        if network not in ("encoder", "continuation_model"):
            defaults["action_key"] = self.action_key
        return {"hidden_dim": self.hidden_dim, **defaults, **own}


class ALMAgent(nn.Module):
    """The networks of Aligned Latent Models and the policy built from them.

    You can replace any network. A saved file can rebuild networks of this package; pass your own
    networks to :meth:`load`.

    The default networks are :class:`~alm_torchrl.modules.MLPEncoder`,
    :class:`~alm_torchrl.modules.LatentDynamics` with the encoder's head,
    :class:`~alm_torchrl.modules.RewardModel`, :class:`~alm_torchrl.modules.TransitionClassifier`,
    :class:`~alm_torchrl.modules.QValueEnsemble` and :class:`~alm_torchrl.modules.Actor`.

    Args:
        config: sizes and action range; :meth:`from_env` takes them from an environment.

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
        if continuation_model is not None:
            config = replace(config, continuation=True)
        self.config = config
        latent, dims = config.latent_dim, config.observation_dims
        sizes = (latent, len(config.action_low))
        self.encoder = encoder or MLPEncoder(
            sum(dims.values()), latent, **config.arguments("encoder", in_keys=list(dims))
        )
        head = getattr(self.encoder, "head", DEFAULT_HEAD)
        width = config.dynamics_hidden_dim
        self.dynamics = dynamics or LatentDynamics(
            *sizes, **config.arguments("dynamics", hidden_dim=width, head=head)
        )
        self._default_dynamics = dynamics is None
        self.reward_model = reward_model or RewardModel(*sizes, **config.arguments("reward_model"))
        self.classifier = classifier or TransitionClassifier(
            *sizes, **config.arguments("classifier")
        )
        self.qvalue_network = qvalue_network or QValueEnsemble(
            *sizes, **config.arguments("qvalue_network")
        )
        self.actor = actor or Actor(
            latent,
            config.action_low,
            config.action_high,
            **config.arguments(
                "actor",
                noise=NoiseSchedule(config.noise_start, config.noise_end, config.noise_steps),
                noise_clip=config.noise_clip,
                scale_to_range=config.scale_to_range,
                normalize_mean=config.normalize_mean,
            ),
        )
        if config.continuation and continuation_model is None:
            continuation_model = ContinuationModel(latent, **config.arguments("continuation_model"))
        self.continuation_model = continuation_model

    @classmethod
    def from_env(cls, env: EnvBase, **options: Any) -> ALMAgent:
        """Builds an agent whose sizes fit an environment.

        Args:
            env: a TorchRL environment with one bounded continuous action, under any key. By default
                the agent reads its vector observations, concatenated, and warns of the others;
                pass an ``encoder`` to read them.
            **options: fields of :class:`AgentConfig`, and networks by name. An ``encoder`` also
                sets the latent size and the head of the dynamics; ``skip_checks`` is the ``skip``
                of its :func:`~alm_torchrl.objectives.check_encoder`.

        Raises:
            TypeError: for an unknown option, or an action that is not bounded and continuous.
            ValueError: if there is no vector observation and no encoder is given, or if the encoder
                fails :func:`~alm_torchrl.objectives.check_encoder`.

        Examples:
            >>> from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv
            >>> agent = ALMAgent.from_env(ContinuousActionVecMockEnv(), hidden_dim=16)
        """
        names = {field.name for field in fields(AgentConfig)}
        names.add("skip_checks")
        unknown = options.keys() - names - set(COMPONENTS)
        if unknown:
            known = ", ".join(sorted(names | set(COMPONENTS)))
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}; choose from {known}")
        components = {name: options.pop(name) for name in COMPONENTS if name in options}
        skip = options.pop("skip_checks", ())
        action_key, action_spec = _action(env)
        options.setdefault("action_key", action_key)
        low, high = (tuple(b.tolist()) for b in (action_spec.space.low, action_spec.space.high))
        spec = env.observation_spec_unbatched
        if "encoder" in components:
            options.setdefault("observation_dims", {})
            options["latent_dim"] = check_encoder(
                components["encoder"],
                spec,
                latent_dim=options.get("latent_dim"),
                skip=skip,
            )
        elif "observation_dims" not in options:
            state = (*env.reward_keys, *env.state_spec.keys(True, True))
            shapes = observation_shapes(spec, None, (1,), ignore=state)
            options["observation_dims"] = {key: size for key, (size,) in shapes.items()}
        agent = cls(AgentConfig(action_low=low, action_high=high, **options), **components)
        agent = agent.to(env.device or "cpu")
        if "encoder" in components or "dynamics" in components:
            check_encoder(
                agent.encoder,
                spec,
                agent.dynamics,
                action_spec=action_spec,
                latent_dim=agent.config.latent_dim,
                skip=skip,
            )
        return agent

    @property
    def noise(self) -> NoiseSchedule:
        """The schedule of the action noise, shared by policy and losses."""
        return self.actor.noise

    def __repr__(self) -> str:
        """Returns networks and configuration, but not the layers."""
        lines = [summary(name, network) for name, network in self.networks().items()]
        return "\n  ".join((f"{type(self).__name__}(", *lines, repr(self.config))) + "\n)"

    def networks(self) -> dict[str, TensorDictModuleBase]:
        """The networks by the argument names of :class:`~alm_torchrl.objectives.ALMLoss`."""
        networks = {name: getattr(self, name) for name in COMPONENTS}
        return {name: network for name, network in networks.items() if network is not None}

    def policy(self, latent: Latent = "sample") -> TensorDictModuleBase:
        """The policy from observation to action, for collectors, rollouts and evaluation.

        Under ``ExplorationType.RANDOM``, which collectors set, the action has the scheduled noise
        without a clip; otherwise it is the actor's mean. Augmentation is disabled. The policy
        shares the agent's parameters. It writes the action, and the encoder's memory if any.

        Args:
            latent: ``"sample"``, as the authors do, or ``"mean"`` (the mode of a discrete latent),
                so that the action depends only on the observation and the action noise.
        """
        if latent not in get_args(Latent):
            raise ValueError(f"latent must be 'sample' or 'mean', not {latent!r}")
        encoder = _ActingEncoder(self.encoder, sample=latent == "sample")
        actor = self.actor.acting() if hasattr(self.actor, "acting") else self.actor
        memory = [key for key in encoder.out_keys if unravel_key(key)[0] == "next"]
        sequence = TensorDictSequential(encoder, actor)
        return sequence.select_out_keys(self.actor.dist_sample_keys[-1], *memory)

    def world_model(self) -> WorldModel:
        """The world model for TorchRL's imagined environments and planners.

        Its ``encode`` writes the latent of an observation. From latent and action, its ``step``
        writes the next latent, and ``reward`` ``[..., 1]`` under ``"next"``. With a continuation
        model it also writes ``terminated`` and ``done`` there, true where a termination is more
        likely than not. It shares the agent's parameters, and it samples latents except under
        ``ExplorationType.DETERMINISTIC``.
        """
        reward, ending = self.reward_model, None
        named = TensorDictModule(nn.Identity(), reward.out_keys[-1:], [("next", "reward")])
        if self.continuation_model is not None:
            logit = self.continuation_model.out_keys[-1:]
            flags: list[NestedKey] = [("next", "terminated"), ("next", "done")]
            ends = TensorDictModule(_likely_terminated, logit, flags)
            ending = TensorDictSequential(self.continuation_model, ends)
        head = TensorDictSequential(reward, named)
        return WorldModel(self.encoder, self.dynamics, head, done_head=ending)

    def update_statistics(self, data: TensorDictBase) -> None:
        """Updates the running input statistics of the encoder, if any.

        Call it once for each batch of a collector; the losses do not change the statistics.
        """
        if hasattr(self.encoder, "update_statistics"):
            self.encoder.update_statistics(data)

    def save(self, path: str | Path) -> None:
        """Writes configuration, networks and weights to a file, without any training state.

        An existing file is replaced only after the new one has been written and read back.

        Raises:
            ValueError: if the file cannot be read back, because of the state of your own networks.
            OSError: if the file cannot be written.
        """
        save_tensors({**self._describe(), "state_dict": self.state_dict()}, path)

    @classmethod
    def load(
        cls, path: str | Path, *, device: torch.device | str = "cpu", **components: nn.Module
    ) -> ALMAgent:
        """Loads a file of :meth:`save` or a folder of :meth:`save_pretrained`.

        Loading never runs code from the file. Pass networks that are not of this package by name.

        Raises:
            FileNotFoundError: if there is no such file or folder.
            ImportError: if a folder is read without the extra ``hub``.
            ValueError: if it is damaged, is not an agent, has another format version, or if your
                own networks are missing or do not fit.
        """
        content = _read(Path(path))
        described = {**content["networks"], **components}
        missing = ", ".join(f"{name}=..." for name, value in described.items() if value is None)
        if missing:
            raise ValueError(f"{path} has networks of your own; pass {missing} to load")
        try:
            agent = cls(AgentConfig(**content["config"]), **rebuild(described))
        except Exception as error:  # the file can hold anything
            raise ValueError(f"{path} does not describe an agent: {one_line(error)}") from error
        try:
            agent.load_state_dict(content["state_dict"])
        except Exception as error:
            reason = one_line(error)
            raise ValueError(f"the weights in {path} do not fit the networks: {reason}") from error
        return agent.to(device)

    def save_pretrained(self, folder: str | Path, *, card: str = "", **metadata: Any) -> None:
        """Writes a folder to publish: weights as safetensors, ``config.json`` and a model card.

        Args:
            folder: created if it does not exist; existing files are replaced.
            card: text of the model card, ``README.md``.
            **metadata: further entries of ``config.json``; ``recipes/enjoy.py`` reads
                ``environment``, the arguments of :func:`~alm_torchrl.envs.make_env`.

        Raises:
            ImportError: if the extra ``hub`` is not installed.
            ValueError: if your own networks have state that is not a tensor.
        """
        config = {**metadata, **self._describe()}
        write_folder(Path(folder), config, self.state_dict(), card)

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, *, revision: str | None = None, **options: Any
    ) -> ALMAgent:
        """Loads the folder that :func:`find_pretrained` finds, with the options of :meth:`load`."""
        return cls.load(find_pretrained(path_or_hub_id, revision), **options)

    def _describe(self) -> dict[str, Any]:
        """Returns the content of a file except for the weights."""
        networks = {name: _describe_or_none(net) for name, net in self.networks().items()}
        if self._default_dynamics and networks["dynamics"] is None:
            del networks["dynamics"]  # rebuilt for the head of the given encoder
        config = asdict(self.config)
        return {"format": _FORMAT, "version": _VERSION, "config": config, "networks": networks}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        match_compiled(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _ActingEncoder(TensorDictModuleBase):
    """Encodes without augmentation in every exploration type."""

    def __init__(self, encoder: TensorDictModuleBase, sample: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.sample = sample
        self.in_keys = encoder.in_keys
        self.out_keys = encoder.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        with set_exploration_type(ExplorationType.DETERMINISTIC):  # which disables augmentation
            if not self.sample:
                return self.encoder(tensordict)
            latent = self.encoder.get_dist(tensordict).rsample()
        return tensordict.set(self.encoder.dist_sample_keys[-1], latent)


def _likely_terminated(continuation_logit: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the flags ``terminated`` and ``done``, which are equal."""
    terminated = continuation_logit < 0
    return terminated, terminated.clone()


def _action(env: EnvBase) -> tuple[NestedKey, Bounded]:
    """Returns key and spec of the action."""
    specs, keys = env.full_action_spec_unbatched, env.action_keys
    spec = specs[keys[0]] if len(keys) == 1 else specs
    if not isinstance(spec, Bounded) or spec.ndim != 1 or not spec.dtype.is_floating_point:
        raise TypeError(
            f"ALM needs one bounded continuous action vector, got {type(spec).__name__} of shape "
            f"{tuple(spec.shape)}; make it torchrl.data.Bounded(low, high, (size,)) of floats"
        )
    return keys[0], spec


def _describe_or_none(network: nn.Module) -> Any:
    """Describes a network of this package; returns ``None`` for others."""
    try:
        return describe(network)
    except TypeError:
        return None


def _read(path: Path) -> dict[str, Any]:
    """Reads the file or folder of an agent and checks the types of its entries."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    read, writer = (read_folder, "save_pretrained") if path.is_dir() else (load_tensors, "save")
    try:
        content = read(path)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or was not written by ALMAgent.{writer}: {one_line(error)}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} was not written by ALMAgent.{writer}")
    version = content.get("version")
    if isinstance(version, int) and version != _VERSION:
        raise ValueError(
            f"{path} has format version {version}, this release reads {_VERSION}; "
            "load it with the release of alm-torchrl that saved it"
        )
    types = {"version": int, "config": dict, "networks": dict, "state_dict": dict}
    if wrong := [name for name, kind in types.items() if not isinstance(content.get(name), kind)]:
        raise ValueError(f"{path} is damaged: it has no {', no '.join(wrong)}")
    return content

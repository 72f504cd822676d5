"""What an encoder must be, and a check that says what one lacks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torch import distributions as D
from torchrl.data import Bounded, Composite, TensorSpec
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl.objectives.functional import kl_divergence

__all__ = ["EncoderProtocol", "check_encoder"]

#: Batch dimensions that an encoder is tried on: one environment, transitions, windows.
_BATCHES = ((), (4,), (4, 3))
#: A bound of an observation that is not meant as a value.
_FAR = 1e6
#: What a network of a user's own raises when it does not fit.
_FAILURES = (
    RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError,
    NotImplementedError, AssertionError,
)  # fmt: skip


@runtime_checkable
class EncoderProtocol(Protocol):
    r"""What ``ALMLoss`` and ``ALMAgent`` ask of an encoder, :math:`e(z \mid s)`.

    Every ``ProbabilisticTensorDictSequential`` has these members, and so has every
    ``LatentModule``. Beyond them, the distribution needs

    * batch shape ``[...]``, as the input has, and event shape ``[D]``;
    * ``rsample()`` and ``deterministic_sample``, with a gradient to every trained parameter;
    * ``entropy()``;
    * a KL divergence: diagonal Normals and ``OneHotGroups`` have theirs, any other pair one that
      is registered with ``torch.distributions.register_kl``. ``KL(dynamics || encoder)`` is what
      is minimized.

    Parameters and statistics are ``nn.Parameter`` or buffers; evaluating the encoder changes
    neither them nor the input; and it is deterministic under ``ExplorationType.DETERMINISTIC``. An
    entry written under ``"next"`` is memory: it is read again one step later at the same key
    without ``"next"``. Optional methods:
    ``update_statistics(tensordict)`` moves running statistics on, and ``make_tensordict_primer()``
    makes the transform that hands memory on.
    """

    in_keys: Sequence[NestedKey]
    """The observations it reads, at the root and under ``"next"``."""
    out_keys: Sequence[NestedKey]
    """What it writes, the latent last."""

    @property
    def dist_sample_keys(self) -> Sequence[NestedKey]:
        """Where the latent is written."""
        ...

    @property
    def dist_params_keys(self) -> Sequence[NestedKey]:
        """Where the parameters of its distribution are written."""
        ...

    def get_dist(self, tensordict: TensorDictBase) -> D.Distribution:
        """The distribution over the latent."""
        ...

    def get_dist_params(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The parameters of that distribution."""
        ...

    def build_dist_from_params(self, tensordict: TensorDictBase) -> D.Distribution:
        """The distribution that has these parameters."""
        ...


def check_encoder(
    encoder: TensorDictModuleBase,
    observation_spec: Composite,
    dynamics: TensorDictModuleBase | None = None,
    *,
    action_spec: TensorSpec | None = None,
    latent_dim: int | None = None,
) -> int:
    """Checks an encoder against :class:`EncoderProtocol`; names all that is missing at once.

    It works on a copy and on random observations; neither the encoder nor the global random state
    changes.

    Args:
        encoder: the encoder.
        observation_spec: of the environment, such as ``env.observation_spec``; batch dimensions
            are left aside.
        dynamics: the latent dynamics that it is to be trained with.
        action_spec: of the environment, for dynamics that do not say ``action_dim``.
        latent_dim: the size that the other components were built for.

    Returns:
        The size ``D`` of the latent.

    Raises:
        ValueError: with one line for each thing that is wrong, and what to write instead.

    Examples:
        >>> from torchrl.data import Composite, Unbounded
        >>> from alm_torchrl.modules import LatentDynamics, MLPEncoder
        >>> spec = Composite(observation=Unbounded(3))
        >>> check_encoder(MLPEncoder(3, 4, 8), spec, LatentDynamics(4, action_dim=2))
        4
        >>> check_encoder(MLPEncoder(3, 4, 8, in_keys=["pixels"]), spec)
        Traceback (most recent call last):
        ValueError: MLPEncoder does not satisfy the encoder contract:
        - it reads 'pixels', which the observation spec lacks: it has observation; ...
    """
    findings: list[str] = []
    with _undisturbed(encoder):
        check = _Check(encoder, observation_spec, findings)
        size = check.run()
        if size is not None:
            check.against(size, dynamics, action_spec, latent_dim)
    if findings or size is None:
        lines = "\n- ".join(findings)
        raise ValueError(
            f"{type(encoder).__name__} does not satisfy the encoder contract:\n- {lines}"
        )
    return size


class _Check:
    """Adds to ``findings`` what is wrong with an encoder."""

    def __init__(self, encoder: Any, spec: Composite, findings: list[str]) -> None:
        self.encoder = encoder
        self.spec = spec[(0,) * spec.ndim] if spec.ndim else spec
        self.findings = findings

    def run(self) -> int | None:
        """All checks of the encoder alone; the latent's size if it can be evaluated."""
        if not self._is_probabilistic() or not self._keys_exist():
            return None
        try:
            self.encoder = copy.deepcopy(self.encoder)
        except _FAILURES as error:
            self._add(f"it cannot be copied ({_line(error)}): keep no tensor with a history")
            return None
        size = self._shapes()
        if size is not None:
            self._samples(size)
            self._gradient()
            self._deterministic()
            self._leaves_things_alone()
            self._state_dict()
        return size

    def against(
        self,
        size: int,
        dynamics: Any,
        action_spec: TensorSpec | None,
        latent_dim: int | None,
    ) -> None:
        """Checks the encoder against what it is to be trained with."""
        if latent_dim is not None and latent_dim != size:
            self._add(
                f"its latent has size {size}, but the other components are built for latent_dim="
                f"{latent_dim}: build it with {latent_dim}, or pass latent_dim={size}"
            )
            return
        if dynamics is not None:
            self._dynamics(size, dynamics, action_spec)
            return
        with torch.no_grad():
            own = self.encoder.get_dist(self._observations(4, 3))
        self._divergence(own, own)

    def _add(self, finding: str) -> None:
        self.findings.append(finding)

    def _is_probabilistic(self) -> bool:
        if isinstance(self.encoder, ProbabilisticTensorDictSequential):
            return True
        self._add(
            f"it ends in no distribution ({type(self.encoder).__name__}): write "
            "LatentModule(network, in_keys=[...]) around a network with 2 * latent_dim "
            "outputs, or LatentModule(network, in_keys=[...], head=...) for another distribution"
        )
        return False

    def _keys_exist(self) -> bool:
        found = {unravel_key(key) for key in self.spec.keys(True, True)}
        missing = [unravel_key(k) for k in self.encoder.in_keys if unravel_key(k) not in found]
        memory = {k[1:] for k in map(_tuple, self.encoder.out_keys) if k[0] == "next"}
        for key in missing:
            if _tuple(key) in memory:
                self._add(
                    f"it keeps its memory at {key!r}, which the environment does not hand on: "
                    "env.append_transform(encoder.make_tensordict_primer())"
                )
            else:
                names = ", ".join(sorted(map(str, found)))
                self._add(
                    f"it reads {key!r}, which the observation spec lacks: it has {names}; write "
                    "in_keys=[...] with these"
                )
        for key in memory - {_tuple(k) for k in self.encoder.in_keys}:
            self._add(
                f"it writes {('next', *key)!r}, and never reads {key!r}: add that to its in_keys, "
                'or write it to a key that is not under "next"'
            )
        return not missing

    def _observations(self, *batch: int) -> TensorDictBase:
        first = next(iter([*self.encoder.parameters(), *self.encoder.buffers()]), None)
        spec = Composite({key: self.spec[key] for key in self.encoder.in_keys})
        device = self.spec.device if first is None else first.device
        drawn = spec.rand(batch)
        for key, leaf in spec.items(True, True):
            if leaf.dtype.is_floating_point:
                drawn[key] = _moderate(drawn[key], leaf)
        return drawn.to(device)

    def _shapes(self) -> int | None:
        """The latent's size, if the distribution has the right shapes."""
        for batch in _BATCHES:
            where = f"observations of batch size {list(batch)}"
            try:
                with torch.no_grad():
                    dist = self.encoder.get_dist(self._observations(*batch))
            except _FAILURES as error:
                self._add(
                    f"it fails on {where} ({type(error).__name__}: {_line(error)}): its network "
                    "must take any leading dimensions"
                )
                return None
            if len(dist.event_shape) != 1:
                self._add(
                    f"its distribution has event shape {tuple(dist.event_shape)}, wanted (D,): "
                    "wrap it in torch.distributions.Independent(..., 1), or flatten its event"
                )
                return None
            if dist.batch_shape != batch:
                self._add(
                    f"its distribution has batch shape {tuple(dist.batch_shape)} on {where}: "
                    "keep the leading dimensions of the observations"
                )
                return None
        return dist.event_shape[0]

    def _samples(self, size: int) -> None:
        dist = self.encoder.get_dist(self._observations(4, 3))
        name = type(dist).__name__
        draws: dict[str, Callable[[], Tensor]] = {
            "rsample()": dist.rsample,
            "deterministic_sample": lambda: dist.deterministic_sample,
        }
        wanted = (4, 3, size)
        for what, draw in draws.items():
            try:
                shape = draw().shape
            except _FAILURES:
                self._add(
                    f"its distribution, {name}, has no {what}: take DiagonalNormal or OneHotGroups "
                    f"of alm_torchrl.distributions, or give {name} one that gradients pass through"
                )
            else:
                if shape != wanted:
                    self._add(f"{what} of {name} has shape {tuple(shape)}, wanted {wanted}")
        try:
            dist.entropy()
        except _FAILURES:
            self._add(f"its distribution, {name}, has no entropy(), which is logged: add one")

    def _divergence(self, prior: D.Distribution, posterior: D.Distribution) -> None:
        names = f"{type(prior).__name__}, {type(posterior).__name__}"
        try:
            divergence = kl_divergence(prior, posterior)
        except NotImplementedError:
            self._add(
                f"there is no KL divergence of its distributions, ({names}): give the dynamics the "
                "encoder's head, LatentDynamics(..., head=encoder.head), or write "
                f"@torch.distributions.register_kl({names})"
            )
        else:
            if divergence.shape != posterior.batch_shape or not divergence.isfinite().all():
                self._add(
                    f"the KL divergence of ({names}) is not finite, or not of the batch's shape "
                    f"{tuple(posterior.batch_shape)}: bound the parameters, as GaussianHead does"
                )

    @torch.enable_grad()
    def _gradient(self) -> None:
        trained = {n: p for n, p in self.encoder.named_parameters() if p.requires_grad}
        try:
            latent = self.encoder.get_dist(self._observations(4, 3)).rsample()
        except _FAILURES:
            return  # said already
        if not trained:
            return
        if not latent.requires_grad:
            self._add(
                "its latent carries no gradient: take the sample from rsample(), and leave out "
                "detach() and torch.no_grad() (a network that is meant to stay as it is: "
                "network.requires_grad_(False))"
            )
            return
        values: Sequence[Tensor | None] = torch.autograd.grad(
            latent.square().sum(), [*trained.values()], allow_unused=True
        )
        for name, value in zip(trained, values, strict=True):
            if value is None:
                self._add(
                    f"no gradient reaches {name}: use it in forward, or "
                    "set requires_grad_(False) on it"
                )
            elif not value.isfinite().all():
                self._add(f"the gradient of {name} is not finite")

    def _encode(self, observations: TensorDictBase) -> Tensor:
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            return self.encoder(observations.copy()).get(self.encoder.dist_sample_keys[-1])

    def _deterministic(self) -> None:
        observations = self._observations(4, 3)
        try:
            same = torch.equal(self._encode(observations), self._encode(observations))
        except _FAILURES:
            return  # said already
        if not same:
            self._add(
                "it gives two results under ExplorationType.DETERMINISTIC: leave dropout out, and "
                "wrap what augments in Augmented(network, [...])"
            )

    def _leaves_things_alone(self) -> None:
        observations = self._observations(4, 3)
        before = observations.clone()
        buffers = {name: value.clone() for name, value in self.encoder.named_buffers()}
        with torch.no_grad():
            self.encoder.get_dist_params(observations)
        for key in before.keys(True, True):
            if not torch.equal(before[key], observations[key]):
                self._add(f"it changes the observation {key!r}: write the result to another key")
        for name, value in self.encoder.named_buffers():
            if not torch.equal(buffers[name], value):
                self._add(
                    f"evaluating it changes the buffer {name}: move statistics on in a method "
                    "update_statistics (see RunningNorm), or call eval() on the layer and keep it "
                    "so in train()"
                )

    def _state_dict(self) -> None:
        self.encoder.eval()  # noise that was found already would pass for a difference
        for name, module in self.encoder.named_modules():
            for attribute in vars(module):
                if isinstance(getattr(module, attribute), Tensor):
                    where = f"{name}.{attribute}" if name else attribute
                    self._add(
                        f"the tensor {where} is neither parameter nor buffer, so that no file and "
                        "no device gets it: self.register_buffer(...)"
                    )
        observations = self._observations(4)
        try:
            before = self._encode(observations)
            state = {key: _clone(value) for key, value in self.encoder.state_dict().items()}
            with torch.no_grad():
                for tensor in (*self.encoder.parameters(), *self.encoder.buffers()):
                    tensor.zero_()
            self.encoder.load_state_dict(state)
            same = torch.equal(before, self._encode(observations))
        except _FAILURES as error:
            self._add(f"its state_dict cannot be loaded back ({_line(error)})")
            return
        if not same:
            self._add(
                "loading its state_dict back does not restore it: keep weights as nn.Parameter and "
                "statistics by register_buffer(..., persistent=True)"
            )

    def _dynamics(self, size: int, dynamics: Any, action_spec: TensorSpec | None) -> None:
        if not isinstance(dynamics, ProbabilisticTensorDictSequential):
            self._add(
                f"the dynamics, {type(dynamics).__name__}, ends in no distribution: take "
                "LatentDynamics(latent_dim, action_dim, head=encoder.head)"
            )
            return
        latent = unravel_key(self.encoder.dist_sample_keys[-1])
        keys = [unravel_key(key) for key in dynamics.in_keys]
        if latent not in keys or len(keys) != 2:
            self._add(
                f"it writes {latent!r}, and the dynamics reads {keys}: give both one latent_key"
            )
            return
        built = getattr(dynamics, "latent_dim", size)
        if built != size:
            self._add(
                f"its latent has size {size}, but the dynamics is built for {built}: build both "
                "with the same latent_dim"
            )
            return
        self._prior(size, dynamics, next(key for key in keys if key != latent), action_spec)

    def _prior(
        self, size: int, dynamics: Any, action_key: NestedKey, action_spec: TensorSpec | None
    ) -> None:
        action_dim = _action_size(size, dynamics, action_spec)
        if action_dim is None:
            self._add("the size of the action is unknown: pass action_spec=env.action_spec")
            return
        try:
            with torch.no_grad():
                posterior = self.encoder.get_dist(self._observations(4, 3))
                latent = posterior.rsample()
                entries = {
                    self.encoder.dist_sample_keys[-1]: latent,
                    action_key: latent.new_zeros(4, 3, action_dim),
                }
                prior = dynamics.get_dist(TensorDict(entries, batch_size=[4, 3]))
        except _FAILURES as error:
            self._add(
                f"the dynamics cannot read its latent, {(4, 3, size)}, with an action of size "
                f"{action_dim} ({_line(error)}): build both with the same latent_dim"
            )
            return
        own, other = (tuple(d.batch_shape + d.event_shape) for d in (posterior, prior))
        if own != other:
            self._add(
                f"its distribution has shape {own}, that of the dynamics {other}: build both with "
                "the same latent_dim"
            )
            return
        self._divergence(prior, posterior)


def _action_size(size: int, dynamics: Any, action_spec: TensorSpec | None) -> int | None:
    if action_spec is not None:
        return action_spec.shape[-1]
    if hasattr(dynamics, "action_dim"):
        return dynamics.action_dim
    linear = next((m for m in dynamics.modules() if isinstance(m, nn.Linear)), None)
    return None if linear is None or linear.in_features <= size else linear.in_features - size


def _moderate(drawn: Tensor, spec: TensorSpec) -> Tensor:
    """Standard normal numbers in place of what was drawn between bounds that are out of reach.

    Infinity and 1e300 are no values that a task observes, and no sound network has finite gradients
    there.
    """
    if not isinstance(spec, Bounded):
        return drawn
    low, high = (bound.to(drawn) for bound in (spec.space.low, spec.space.high))
    near = (low.abs() < _FAR) & (high.abs() < _FAR)
    return torch.where(near, drawn, torch.randn_like(drawn).clamp(low, high))


@contextmanager
def _undisturbed(encoder: Any) -> Iterator[None]:
    """Leaves the global random state as it was, on the CPU and where the encoder is."""
    tensors = [*encoder.parameters(), *encoder.buffers()] if hasattr(encoder, "buffers") else []
    devices = {t.device.index for t in tensors if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        yield


def _tuple(key: NestedKey) -> tuple[str, ...]:
    key = unravel_key(key)
    return (key,) if isinstance(key, str) else key


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]

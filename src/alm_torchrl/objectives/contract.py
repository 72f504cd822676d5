"""The encoder contract, and a check that names every violation."""

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
    r"""The interface of an encoder for ``ALMLoss`` and ``ALMAgent``, :math:`e(z \mid s)`.

    Every ``ProbabilisticTensorDictSequential`` and ``LatentModule`` has these members. The
    distribution also needs

    * batch shape ``[...]``, as the input has, and event shape ``[D]``;
    * ``rsample()`` and ``deterministic_sample``, with a gradient to every trained parameter;
    * ``entropy()``;
    * a KL divergence: diagonal Normals and ``OneHotGroups`` have theirs, any other pair one that
      is registered with ``torch.distributions.register_kl``. ``KL(dynamics || encoder)`` is
      minimized.

    Parameters and statistics are ``nn.Parameter`` or buffers; evaluating the encoder changes
    neither them nor the input; and it is deterministic under ``ExplorationType.DETERMINISTIC``. An
    entry written under ``"next"`` is memory: it is read again one step later at the same key
    without ``"next"``. Optional methods:
    ``update_statistics(tensordict)`` updates running statistics, and ``make_tensordict_primer()``
    makes the transform that passes memory to the next step.
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
    """Checks an encoder against :class:`EncoderProtocol`; names every violation in one error.

    It works on a copy and on random observations; neither the encoder nor the global random state
    changes.

    Args:
        encoder: the encoder.
        observation_spec: of the environment, such as ``env.observation_spec``; batch dimensions
            are ignored.
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
    spec = observation_spec[(0,) * observation_spec.ndim]
    size = 0
    with _undisturbed(encoder):
        findings = [*_interface(encoder, spec)]
        if not findings:
            encoder = copy.deepcopy(encoder)
            findings = [*_shapes(encoder, spec)]
        if not findings:
            with torch.no_grad():
                size = encoder.get_dist(_observations(encoder, spec, 4)).event_shape[0]
            for check in (_samples, _gradient, _deterministic, _side_effects, _state_dict):
                findings += check(encoder, spec)
            if latent_dim not in (None, size):
                findings.append(
                    f"its latent has size {size}, but the other components are built for "
                    f"latent_dim={latent_dim}: build it with {latent_dim}, or pass "
                    f"latent_dim={size}"
                )
            elif dynamics is None:
                own = encoder.get_dist(_observations(encoder, spec, 4, 3))
                findings += _divergence(own, own)
            else:
                findings += _dynamics(encoder, spec, size, dynamics, action_spec)
    if findings:
        lines = "\n- ".join(findings)
        raise ValueError(
            f"{type(encoder).__name__} does not satisfy the encoder contract:\n- {lines}"
        )
    return size


def _interface(encoder: Any, spec: Composite) -> Iterator[str]:
    """Kind of module, keys, and whether a copy can be tried."""
    if not isinstance(encoder, ProbabilisticTensorDictSequential):
        yield (
            f"it ends in no distribution ({type(encoder).__name__}): write "
            "LatentModule(network, in_keys=[...]) around a network with 2 * latent_dim "
            "outputs, or LatentModule(network, in_keys=[...], head=...) for another distribution"
        )
        return
    found = {unravel_key(key) for key in spec.keys(True, True)}
    missing = [unravel_key(k) for k in encoder.in_keys if unravel_key(k) not in found]
    memory = {k[1:] for k in map(_tuple, encoder.out_keys) if k[0] == "next"}
    for key in missing:
        if _tuple(key) in memory:
            yield (
                f"it keeps its memory at {key!r}, which the environment does not hand on: "
                "env.append_transform(encoder.make_tensordict_primer())"
            )
        else:
            names = ", ".join(sorted(map(str, found)))
            yield (
                f"it reads {key!r}, which the observation spec lacks: it has {names}; write "
                "in_keys=[...] with these"
            )
    for key in memory - {_tuple(k) for k in encoder.in_keys}:
        yield (
            f"it writes {('next', *key)!r}, and never reads {key!r}: add that to its in_keys, "
            'or write it to a key that is not under "next"'
        )
    try:
        copy.deepcopy(encoder)
    except _FAILURES as error:
        yield f"it cannot be copied ({_line(error)}): keep no tensor with a history"


def _observations(encoder: Any, spec: Composite, *batch: int) -> TensorDictBase:
    first = next(iter([*encoder.parameters(), *encoder.buffers()]), None)
    device = spec.device if first is None else first.device
    spec = Composite({key: spec[key] for key in encoder.in_keys})
    drawn = spec.rand(batch)
    for key, leaf in spec.items(True, True):
        if leaf.dtype.is_floating_point:
            drawn[key] = _moderate(drawn[key], leaf)
    return drawn.to(device)


def _shapes(encoder: Any, spec: Composite) -> Iterator[str]:
    """Batch and event shapes of the distribution."""
    for batch in _BATCHES:
        where = f"observations of batch size {list(batch)}"
        try:
            with torch.no_grad():
                dist = encoder.get_dist(_observations(encoder, spec, *batch))
        except _FAILURES as error:
            yield (
                f"it fails on {where} ({type(error).__name__}: {_line(error)}): its network "
                "must take any leading dimensions"
            )
            return
        if len(dist.event_shape) != 1:
            yield (
                f"its distribution has event shape {tuple(dist.event_shape)}, wanted (D,): "
                "wrap it in torch.distributions.Independent(..., 1), or flatten its event"
            )
            return
        if dist.batch_shape != batch:
            yield (
                f"its distribution has batch shape {tuple(dist.batch_shape)} on {where}: "
                "keep the leading dimensions of the observations"
            )
            return


def _samples(encoder: Any, spec: Composite) -> Iterator[str]:
    dist = encoder.get_dist(_observations(encoder, spec, 4, 3))
    name = type(dist).__name__
    draws: dict[str, Callable[[], Tensor]] = {
        "rsample()": dist.rsample,
        "deterministic_sample": lambda: dist.deterministic_sample,
    }
    wanted = dist.batch_shape + dist.event_shape
    for what, draw in draws.items():
        try:
            shape = draw().shape
        except _FAILURES:
            yield (
                f"its distribution, {name}, has no {what}: take DiagonalNormal or OneHotGroups "
                f"of alm_torchrl.distributions, or give {name} one that gradients pass through"
            )
        else:
            if shape != wanted:
                yield (f"{what} of {name} has shape {tuple(shape)}, wanted {tuple(wanted)}")
    try:
        dist.entropy()
    except _FAILURES:
        yield (f"its distribution, {name}, has no entropy(), which is logged: add one")


def _divergence(prior: D.Distribution, posterior: D.Distribution) -> Iterator[str]:
    names = f"{type(prior).__name__}, {type(posterior).__name__}"
    try:
        divergence = kl_divergence(prior, posterior)
    except NotImplementedError:
        yield (
            f"there is no KL divergence of its distributions, ({names}): give the dynamics the "
            "encoder's head, LatentDynamics(..., head=encoder.head), or write "
            f"@torch.distributions.register_kl({names})"
        )
    else:
        if divergence.shape != posterior.batch_shape or not divergence.isfinite().all():
            yield (
                f"the KL divergence of ({names}) is not finite, or not of the batch's shape "
                f"{tuple(posterior.batch_shape)}: bound the parameters, as GaussianHead does"
            )


def _gradient(encoder: Any, spec: Composite) -> Iterator[str]:
    trained = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    try:
        with torch.enable_grad():
            latent = encoder.get_dist(_observations(encoder, spec, 4, 3)).rsample()
    except _FAILURES:
        return  # said already
    if not trained:
        return
    if not latent.requires_grad:
        yield (
            "its latent carries no gradient: take the sample from rsample(), and leave out "
            "detach() and torch.no_grad() (a network that is meant to stay as it is: "
            "network.requires_grad_(False))"
        )
        return
    with torch.enable_grad():
        total = latent.square().sum()
    values: Sequence[Tensor | None] = torch.autograd.grad(
        total, [*trained.values()], allow_unused=True
    )
    for name, value in zip(trained, values, strict=True):
        if value is None:
            yield (
                f"no gradient reaches {name}: use it in forward, or set requires_grad_(False) on it"
            )
        elif not value.isfinite().all():
            yield (f"the gradient of {name} is not finite")


def _encode(encoder: Any, observations: TensorDictBase) -> Tensor:
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return encoder(observations.copy()).get(encoder.dist_sample_keys[-1])


def _deterministic(encoder: Any, spec: Composite) -> Iterator[str]:
    observations = _observations(encoder, spec, 4, 3)
    try:
        same = torch.equal(_encode(encoder, observations), _encode(encoder, observations))
    except _FAILURES:
        return  # said already
    if not same:
        yield (
            "it gives two results under ExplorationType.DETERMINISTIC: leave dropout out, and "
            "wrap what augments in Augmented(network, [...])"
        )


def _side_effects(encoder: Any, spec: Composite) -> Iterator[str]:
    observations = _observations(encoder, spec, 4, 3)
    before = observations.clone()
    buffers = {name: value.clone() for name, value in encoder.named_buffers()}
    with torch.no_grad():
        encoder.get_dist_params(observations)
    for key in before.keys(True, True):
        if not torch.equal(before[key], observations[key]):
            yield (f"it changes the observation {key!r}: write the result to another key")
    for name, value in encoder.named_buffers():
        if not torch.equal(buffers[name], value):
            yield (
                f"evaluating it changes the buffer {name}: move statistics on in a method "
                "update_statistics (see RunningNorm), or call eval() on the layer and keep it "
                "so in train()"
            )


def _state_dict(encoder: Any, spec: Composite) -> Iterator[str]:
    encoder.eval()  # noise that was found already would pass for a difference
    for name, module in encoder.named_modules():
        for attribute in vars(module):
            if isinstance(getattr(module, attribute), Tensor):
                where = f"{name}.{attribute}" if name else attribute
                yield (
                    f"the tensor {where} is neither parameter nor buffer, so that no file and "
                    "no device gets it: self.register_buffer(...)"
                )
    observations = _observations(encoder, spec, 4)
    try:
        before = _encode(encoder, observations)
        state = {key: _clone(value) for key, value in encoder.state_dict().items()}
        with torch.no_grad():
            for tensor in (*encoder.parameters(), *encoder.buffers()):
                tensor.zero_()
        encoder.load_state_dict(state)
        same = torch.equal(before, _encode(encoder, observations))
    except _FAILURES as error:
        yield (f"its state_dict cannot be loaded back ({_line(error)})")
        return
    if not same:
        yield (
            "loading its state_dict back does not restore it: keep weights as nn.Parameter and "
            "statistics by register_buffer(..., persistent=True)"
        )


def _dynamics(
    encoder: Any, spec: Composite, size: int, dynamics: Any, action_spec: TensorSpec | None
) -> Iterator[str]:
    if not isinstance(dynamics, ProbabilisticTensorDictSequential):
        yield (
            f"the dynamics, {type(dynamics).__name__}, ends in no distribution: take "
            "LatentDynamics(latent_dim, action_dim, head=encoder.head)"
        )
        return
    latent = unravel_key(encoder.dist_sample_keys[-1])
    keys = [unravel_key(key) for key in dynamics.in_keys]
    if latent not in keys or len(keys) != 2:
        yield (f"it writes {latent!r}, and the dynamics reads {keys}: give both one latent_key")
        return
    built = getattr(dynamics, "latent_dim", size)
    if built != size:
        yield (
            f"its latent has size {size}, but the dynamics is built for {built}: build both "
            "with the same latent_dim"
        )
        return
    yield from _prior(
        encoder, spec, size, dynamics, next(key for key in keys if key != latent), action_spec
    )


def _prior(
    encoder: Any,
    spec: Composite,
    size: int,
    dynamics: Any,
    action_key: NestedKey,
    action_spec: TensorSpec | None,
) -> Iterator[str]:
    action_dim = _action_size(size, dynamics, action_spec)
    if action_dim is None:
        yield ("the size of the action is unknown: pass action_spec=env.action_spec")
        return
    try:
        with torch.no_grad():
            posterior = encoder.get_dist(_observations(encoder, spec, 4, 3))
            latent = posterior.rsample()
            entries = {
                encoder.dist_sample_keys[-1]: latent,
                action_key: latent.new_zeros(4, 3, action_dim),
            }
            prior = dynamics.get_dist(TensorDict(entries, batch_size=[4, 3]))
    except _FAILURES as error:
        yield (
            f"the dynamics cannot read its latent, {(4, 3, size)}, with an action of size "
            f"{action_dim} ({_line(error)}): build both with the same latent_dim"
        )
        return
    own, other = (tuple(d.batch_shape + d.event_shape) for d in (posterior, prior))
    if own != other:
        yield (
            f"its distribution has shape {own}, that of the dynamics {other}: build both with "
            "the same latent_dim"
        )
        return
    yield from _divergence(prior, posterior)


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

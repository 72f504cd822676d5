"""A check of encoders that reports all problems."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import Tensor
from torch import distributions as D
from torch.nn.modules.batchnorm import _BatchNorm
from torchrl.data import Bounded, Composite, TensorSpec
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl.data.transitions import tuple_key
from alm_torchrl.files import one_line
from alm_torchrl.objectives.functional import kl_divergence

__all__ = ["check_encoder"]

#: Batch sizes to try: transitions, one environment, windows.
_BATCHES = ((4,), (), (4, 3))
#: Larger bounds of an observation are not realistic values.
_FAR = 1e6
#: Exceptions that a wrong network may raise.
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


def check_encoder(
    encoder: TensorDictModuleBase,
    observation_spec: Composite,
    dynamics: TensorDictModuleBase | None = None,
    *,
    action_spec: TensorSpec | None = None,
    latent_dim: int | None = None,
) -> int:
    """Checks whether a module can be the encoder, and reports all problems in one error.

    An encoder is a ``ProbabilisticTensorDictSequential``, such as a ``LatentModule``, that reads
    observations and writes a latent. Its distribution has

    * the batch shape of the observations and event shape ``[D]``;
    * ``rsample()`` and ``deterministic_sample``, with a gradient to every trained parameter, and
      ``entropy()``;
    * a KL divergence from the dynamics: built in for two diagonal Normals or two ``OneHotGroups``,
      registered with ``torch.distributions.register_kl`` for other pairs.

    All its tensors are parameters or buffers. A forward pass changes neither them nor the
    observations, and is deterministic under ``ExplorationType.DETERMINISTIC``. An entry written
    under ``"next"`` is memory: the next step reads it without ``"next"``, if the environment has
    the transform that ``make_tensordict_primer()`` returns. A method
    ``update_statistics(tensordict)`` updates running statistics.

    The check runs a copy of the encoder on random observations and restores the random state.

    Args:
        encoder: the encoder.
        observation_spec: ``env.observation_spec``; its batch dimensions are ignored.
        dynamics: the latent dynamics to train with the encoder.
        action_spec: spec of the action, for dynamics without an attribute ``action_dim``.
        latent_dim: the latent size of the other networks.

    Returns:
        The size ``D`` of the latent.

    Raises:
        ValueError: the problems, one line each, with remedies.

    Examples:
        >>> from torchrl.data import Composite, Unbounded
        >>> from alm_torchrl.modules import LatentDynamics, MLPEncoder
        >>> spec = Composite(observation=Unbounded(3))
        >>> check_encoder(MLPEncoder(3, 4, 8), spec, LatentDynamics(4, action_dim=2))
        4
        >>> check_encoder(MLPEncoder(3, 4, 8, in_keys=["pixels"]), spec)
        Traceback (most recent call last):
        ValueError: MLPEncoder does not satisfy the encoder contract:
        - it reads 'pixels', which is not in the observation spec: use in_keys from observation
    """
    spec = observation_spec[(0,) * observation_spec.ndim]
    findings, size = [*_interface(encoder, spec)], 0
    if not findings:
        tensors = (*encoder.parameters(), *encoder.buffers())
        devices = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            trial = copy.deepcopy(encoder)
            findings = [*_shapes(trial, spec)] or [*_samples(trial, spec)]
            if not findings:
                dist = trial.get_dist(_observations(trial, spec, 4, 3))
                size = dist.event_shape[0]
                findings += _gradient(trial, dist.rsample())
                findings += _evaluation(trial, spec)
                findings += _state_dict(trial, spec)
                built = getattr(dynamics, "latent_dim", size) if latent_dim is None else latent_dim
                if built != size:
                    findings.append(
                        f"its latent has size {size}, but the other networks have latent_dim="
                        f"{built}: build it with {built}, or pass latent_dim={size}"
                    )
                else:
                    findings += _dynamics(trial, dist, dynamics, action_spec)
    if findings:
        name, lines = type(encoder).__name__, "\n- ".join(findings)
        raise ValueError(f"{name} does not satisfy the encoder contract:\n- {lines}")
    return size


def _interface(encoder: Any, spec: Composite) -> Iterator[str]:
    """Checks the type of the module, its keys, and that it can be copied."""
    if not isinstance(encoder, ProbabilisticTensorDictSequential):
        yield (
            f"it does not end in a distribution ({type(encoder).__name__}): wrap a network with "
            "2 * latent_dim outputs in LatentModule(network, in_keys=[...])"
        )
        return
    found = sorted(str(unravel_key(key)) for key in spec.keys(True, True))
    read = [unravel_key(key) for key in encoder.in_keys]
    memory = [unravel_key(k[1:]) for k in map(tuple_key, encoder.out_keys) if k[0] == "next"]
    for key in read:
        if str(key) in found:
            continue
        if key in memory:
            yield (
                f"the environment does not pass its memory at {key!r} to the next step: call "
                "env.append_transform(encoder.make_tensordict_primer())"
            )
        else:
            yield (
                f"it reads {key!r}, which is not in the observation spec: use in_keys from "
                f"{', '.join(found)}"
            )
    for key in memory:
        if key not in read:
            yield f"it writes {('next', key)!r} but does not read {key!r}: add that to its in_keys"
    try:
        copy.deepcopy(encoder)
    except _FAILURES as error:
        yield f"it cannot be copied ({one_line(error)}): detach the tensors that it stores"


def _observations(encoder: Any, spec: Composite, *batch: int) -> TensorDictBase:
    """Draws random observations for the encoder, on its device."""
    first = next(iter([*encoder.parameters(), *encoder.buffers()]), None)
    drawn = TensorDict(batch_size=batch, device=spec.device if first is None else first.device)
    for key in encoder.in_keys:
        leaf = spec[key]
        drawn[key] = value = leaf.rand(batch)
        if isinstance(leaf, Bounded) and leaf.dtype.is_floating_point:
            # Networks have no finite gradients at a bound such as 1e300.
            low, high = leaf.space.low, leaf.space.high
            near = (low.abs() < _FAR) & (high.abs() < _FAR)
            drawn[key] = torch.where(near, value, torch.randn_like(value).clamp(low, high))
    return drawn


def _shapes(encoder: Any, spec: Composite) -> Iterator[str]:
    """Checks the batch and event shapes of the distribution."""
    for batch in _BATCHES:
        where = f"observations of batch size {list(batch)}"
        try:
            with torch.no_grad():
                dist = encoder.get_dist(_observations(encoder, spec, *batch))
        except _FAILURES as error:
            yield f"it fails on {where} ({one_line(error)}): {_remedy(encoder, spec, batch, error)}"
            return
        if len(dist.event_shape) != 1:
            yield (
                f"its distribution has event shape {tuple(dist.event_shape)}, expected (D,): "
                "wrap it in torch.distributions.Independent(..., 1), or flatten its event"
            )
            return
        if dist.batch_shape != batch:
            yield (
                f"its distribution has batch shape {tuple(dist.batch_shape)} on {where}: "
                "keep the leading dimensions of the observations"
            )
            return


def _remedy(encoder: Any, spec: Composite, batch: tuple[int, ...], error: Exception) -> str:
    """Returns how to make a network accept the observations."""
    if any(isinstance(layer, _BatchNorm) and layer.training for layer in encoder.modules()):
        return (
            "use nn.LayerNorm or RunningNorm instead of BatchNorm; if it is pretrained, call its "
            "eval() in __init__ and in train()"
        )
    if batch != _BATCHES[0]:
        return (
            "accept any leading dimensions (flatten them before convolutions, restore them after)"
        )
    if "type" in str(error):
        return "convert the observations to the dtype of the weights in forward()"
    shapes = ", ".join(f"{key!r} {list(spec[key].shape)}" for key in encoder.in_keys)
    return f"build it for the shapes in the observation spec, {shapes}"


def _samples(encoder: Any, spec: Composite) -> Iterator[str]:
    """Checks samples and entropy of the distribution."""
    dist = encoder.get_dist(_observations(encoder, spec, 4, 3))
    kind, shape = type(dist).__name__, tuple(dist.batch_shape + dist.event_shape)
    for name in ("rsample", "deterministic_sample", "entropy"):
        try:
            value = getattr(dist, name)
            value = value() if callable(value) else value
        except _FAILURES:
            yield (
                f"its distribution, {kind}, has no {name}: use DiagonalNormal or OneHotGroups from "
                f"alm_torchrl.distributions, or define it in {kind}"
            )
            continue
        if name != "entropy" and value.shape != shape:
            yield f"{name} of {kind} has shape {tuple(value.shape)}, expected {shape}"


def _gradient(encoder: Any, latent: Tensor) -> Iterator[str]:
    """Checks that a finite gradient reaches every trained parameter."""
    trained = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    if not trained:
        return
    if not latent.requires_grad:
        yield (
            "its latent has no gradient: remove detach() and torch.no_grad(), and define rsample() "
            "with a gradient (for a frozen network: network.requires_grad_(False))"
        )
        return
    gradients: Sequence[Tensor | None] = torch.autograd.grad(
        latent.square().sum(), [*trained.values()], allow_unused=True
    )
    for name, gradient in zip(trained, gradients, strict=True):
        if gradient is None:
            yield f"{name} has no gradient: use it in forward(), or call requires_grad_(False)"
        elif not gradient.isfinite().all():
            yield f"the gradient of {name} is not finite: bound the values in forward()"


def _encode(encoder: Any, observations: TensorDictBase) -> Tensor:
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return encoder(observations.copy()).get(encoder.dist_sample_keys[-1])


def _evaluation(encoder: Any, spec: Composite) -> Iterator[str]:
    """Checks that a forward pass is deterministic and changes neither inputs nor buffers."""
    observations = _observations(encoder, spec, 4, 3)
    if not torch.equal(_encode(encoder, observations), _encode(encoder, observations)):
        yield (
            "two forward passes under ExplorationType.DETERMINISTIC differ: remove dropout, and "
            "put augmentations into Augmented(network, [...])"
        )
    before = observations.clone()
    buffers = {name: value.clone() for name, value in encoder.named_buffers()}
    with torch.no_grad():
        encoder.get_dist_params(observations)
    for key in before.keys(True, True):
        if not torch.equal(before[key], observations[key]):
            yield f"it changes the observation {key!r} in place: copy it first"
    for name, value in encoder.named_buffers():
        if not torch.equal(buffers[name], value):
            yield (
                f"its forward pass changes the buffer {name}: use nn.LayerNorm instead of "
                "BatchNorm and weight_norm instead of spectral_norm, or update the buffer in "
                "update_statistics(), as RunningNorm does"
            )


def _state_dict(encoder: Any, spec: Composite) -> Iterator[str]:
    """Checks that the state dict contains and restores all tensors."""
    encoder.eval()  # noise, which _evaluation reports, would look like a difference here
    for name, module in encoder.named_modules():
        for attribute in vars(module):
            if isinstance(getattr(module, attribute), Tensor):
                where = f"{name}.{attribute}" if name else attribute
                yield (
                    f"the tensor {where} is neither a parameter nor a buffer: register it with "
                    "self.register_buffer(), or use torch.nn.utils.parametrizations for a weight"
                )
    observations = _observations(encoder, spec, 4)
    try:
        before = _encode(encoder, observations)
        state = copy.deepcopy(encoder.state_dict())
        with torch.no_grad():
            for tensor in (*encoder.parameters(), *encoder.buffers()):
                tensor.zero_()
        encoder.load_state_dict(state)
        same = torch.equal(before, _encode(encoder, observations))
    except _FAILURES as error:
        yield f"its state_dict cannot be loaded ({one_line(error)}): keep all names in it"
        return
    if not same:
        yield (
            "its state_dict does not restore it: store weights as nn.Parameter and statistics "
            "with register_buffer(..., persistent=True)"
        )


def _dynamics(
    encoder: Any, posterior: D.Distribution, dynamics: Any, action_spec: TensorSpec | None
) -> Iterator[str]:
    """Checks that keys, sizes and distributions of encoder and dynamics match."""
    if dynamics is None:
        yield from _divergence(posterior, posterior)
        return
    if not isinstance(dynamics, ProbabilisticTensorDictSequential):
        yield (
            f"the dynamics, {type(dynamics).__name__}, does not end in a distribution: use "
            "LatentDynamics(latent_dim, action_dim, head=encoder.head)"
        )
        return
    latent = unravel_key(encoder.dist_sample_keys[-1])
    keys = [unravel_key(key) for key in dynamics.in_keys]
    if latent not in keys or len(keys) != 2:
        yield f"it writes {latent!r}, but the dynamics reads {keys}: give both the same latent_key"
        return
    shape = tuple(posterior.batch_shape + posterior.event_shape)
    size = getattr(dynamics, "action_dim", None) if action_spec is None else action_spec.shape[-1]
    if size is None:
        yield "the size of the action is unknown: pass action_spec=env.action_spec"
        return
    z = posterior.rsample()
    entries = {key: z if key == latent else z.new_zeros(*shape[:-1], size) for key in keys}
    try:
        prior = dynamics.get_dist(TensorDict(entries, batch_size=shape[:-1]))
    except _FAILURES as error:
        same = "dtype" if "type" in str(error) else "latent_dim"
        yield (
            f"the dynamics cannot read its latent, {shape}, with an action of size {size} "
            f"({one_line(error)}): build both with the same {same}"
        )
        return
    other = tuple(prior.batch_shape + prior.event_shape)
    if shape == other:
        yield from _divergence(prior, posterior)
    else:
        yield f"its latents have shape {shape}, but the dynamics has {other}: use one latent_dim"


def _divergence(prior: D.Distribution, posterior: D.Distribution) -> Iterator[str]:
    """Checks that the KL divergence is defined and finite."""
    names = f"{type(prior).__name__}, {type(posterior).__name__}"
    try:
        divergence = kl_divergence(prior, posterior)
    except NotImplementedError:
        yield (
            f"the KL divergence of ({names}) is not defined: build the dynamics with "
            f"head=encoder.head, or register one with @torch.distributions.register_kl({names})"
        )
        return
    if divergence.shape != posterior.batch_shape:
        yield (
            f"the KL divergence of ({names}) has shape {tuple(divergence.shape)}, expected "
            f"{tuple(posterior.batch_shape)}: sum it over the event"
        )
    if not divergence.isfinite().all():
        yield (
            f"the KL divergence of ({names}) is not finite: bound the parameters, as "
            "GaussianHead does"
        )

"""A check of encoders that reports all problems."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torch import distributions as D
from torchrl.data import Composite, TensorSpec

from alm_torchrl.data.transitions import tuple_key
from alm_torchrl.files import one_line
from alm_torchrl.objectives.encoder_state import (
    FAILURES,
    check_batch_norm,
    check_buffers,
    check_determinism,
    check_inputs,
    check_state_dict,
    check_statistics,
    random_observations,
)
from alm_torchrl.objectives.functional import kl_divergence

__all__ = ["check_encoder"]

#: Batch sizes to try: transitions, one environment, windows.
_BATCHES = ((4,), (), (4, 3))
#: Names of the checks that ``skip`` accepts.
_CHECKS = (
    "shapes", "samples", "gradient", "buffers", "determinism", "inputs", "statistics", "state_dict",
    "latent_dim", "dynamics", "divergence",
)  # fmt: skip


def check_encoder(
    encoder: TensorDictModuleBase,
    observation_spec: Composite,
    dynamics: TensorDictModuleBase | None = None,
    *,
    action_spec: TensorSpec | None = None,
    latent_dim: int | None = None,
    skip: str | Sequence[str] = (),
) -> int:
    """Checks whether a module can be the encoder, and reports all problems in one error.

    An encoder is a ``ProbabilisticTensorDictSequential``, such as a ``LatentModule``, that reads
    observations and writes a latent. The checks, by the names that ``skip`` accepts:

    =============== ==============================================================================
    ``shapes``      the distribution has the batch shape of the observations (one observation, a
                    batch, windows) and event shape ``[D]``
    ``samples``     it has ``rsample()``, ``deterministic_sample`` and ``entropy()``
    ``gradient``    a finite gradient reaches every trained parameter from the sample, or from a
                    further entry that the encoder writes, such as a loss of its own
    ``buffers``     a forward pass in training mode changes no buffer; BatchNorm does
    ``determinism`` two passes under ``ExplorationType.DETERMINISTIC`` are equal
    ``inputs``      a forward pass does not change the observations
    ``statistics``  ``encoder.update_statistics(tensordict)`` reaches each layer that has a method
                    of this name, such as :class:`~alm_torchrl.modules.RunningNorm`
    ``state_dict``  it holds all tensors, which are parameters or buffers
    ``latent_dim``  ``D`` is the latent size of the other networks
    ``dynamics``    the dynamics reads the latent, and has its dtype, size and an action
    ``divergence``  the KL divergence from the dynamics is finite: built in for two diagonal Normals
                    or two ``OneHotGroups``, registered with ``torch.distributions.register_kl`` for
                    other pairs
    =============== ==============================================================================

    The other checks cannot be skipped: the module ends in a distribution, can be copied, and reads
    entries of the spec. An entry written under ``"next"`` is memory: the next step reads it without
    ``"next"``, if the environment has the transform that ``make_tensordict_primer()`` returns.

    The check runs a copy of the encoder on random observations and restores the random state.

    Args:
        encoder: the encoder.
        observation_spec: ``env.observation_spec``; its batch dimensions are ignored.
        dynamics: the latent dynamics to train with the encoder.
        action_spec: spec of the action, for dynamics without an attribute ``action_dim``.
        latent_dim: the latent size of the other networks.
        skip: names of checks to leave out.

    Returns:
        The size ``D`` of the latent.

    Raises:
        ValueError: the problems, one line each, with the name of the check and a remedy; or an
            unknown name in ``skip``.

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
        >>> check_encoder(MLPEncoder(3, 4, 8), spec, latent_dim=5, skip=["latent_dim"])
        4
    """
    report = _Report(skip)
    spec = observation_spec[(0,) * observation_spec.ndim]
    report.findings += _interface(encoder, spec)
    size = 0
    if not report.findings:
        tensors = (*encoder.parameters(), *encoder.buffers())
        devices = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            # Lightning trains in training mode, in which dropout and BatchNorm act.
            trial = copy.deepcopy(encoder).train()
            if (
                report.add("buffers", check_batch_norm(trial))
                and report.add("shapes", _shapes(trial, spec))
                and report.add("samples", _samples(trial, spec))
            ):
                size = _details(report, trial, spec, dynamics, action_spec, latent_dim)
    if report.findings:
        name, lines = type(encoder).__name__, "\n- ".join(report.findings)
        raise ValueError(f"{name} does not satisfy the encoder contract:\n- {lines}")
    return size


class _Report:
    """The problems of an encoder, without those of skipped checks."""

    def __init__(self, skip: str | Sequence[str]) -> None:
        self.skip = (skip,) if isinstance(skip, str) else tuple(skip)
        self.findings: list[str] = []
        for name in self.skip:
            if name not in _CHECKS:
                close = difflib.get_close_matches(str(name), _CHECKS, n=1)
                hint = (
                    f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(_CHECKS)}"
                )
                raise ValueError(f"skip names an unknown check {name!r}; {hint}")

    def add(self, check: str, problems: Iterable[str]) -> bool:
        """Runs a check unless it is skipped; returns whether it found no problem."""
        found = [] if check in self.skip else [f"{check}: {problem}" for problem in problems]
        self.findings += found
        return not found


def _details(
    report: _Report,
    trial: Any,
    spec: Composite,
    dynamics: Any,
    action_spec: TensorSpec | None,
    latent_dim: int | None,
) -> int:
    """Runs the checks of an encoder whose shapes are right; returns the size of its latent."""
    parameters = trial.get_dist_params(random_observations(trial, spec, 4, 3))
    dist = trial.build_dist_from_params(parameters)
    size = dist.event_shape[0]
    report.add("gradient", _gradient(trial, dist.rsample(), parameters))
    if report.add("buffers", check_buffers(trial, spec)):
        report.add("determinism", check_determinism(trial, spec))
    report.add("inputs", check_inputs(trial, spec))
    report.add("statistics", check_statistics(trial, spec))
    report.add("state_dict", check_state_dict(trial, spec))
    built = getattr(dynamics, "latent_dim", size) if latent_dim is None else latent_dim
    sizes = (
        f"its latent has size {size}, but the other networks have latent_dim={built}: build it "
        f"with {built}, or pass latent_dim={size}"
    )
    if report.add("latent_dim", [] if built == size else [sizes]):
        prior = dist if dynamics is None else _prior(trial, dist, dynamics, action_spec)
        if isinstance(prior, str):
            report.add("dynamics", [prior])
        else:
            report.add("divergence", _divergence(prior, dist))
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
    except FAILURES as error:
        yield (
            f"it cannot be copied ({one_line(error)}): detach the tensors that it stores, and use "
            "torch.nn.utils.parametrizations.weight_norm instead of torch.nn.utils.weight_norm"
        )


def _shapes(encoder: Any, spec: Composite) -> Iterator[str]:
    """Checks the batch and event shapes of the distribution."""
    for batch in _BATCHES:
        where = f"observations of batch size {list(batch)}"
        try:
            with torch.no_grad():
                dist = encoder.get_dist(random_observations(encoder, spec, *batch))
        except FAILURES as error:
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
    if "the network output" in str(error):  # of a head
        return "change the last layer of the network"
    if "batch dimension mismatch" in str(error):
        return (
            "keep the leading dimensions of the observations in all outputs, also in a loss "
            "(one number for each observation, not their mean)"
        )
    if batch != _BATCHES[0]:
        return (
            "accept any leading dimensions (flatten them before convolutions, restore them after)"
        )
    weights = {p.dtype for p in encoder.parameters()}
    for key in encoder.in_keys:
        if weights and spec[key].dtype not in weights:
            if not spec[key].dtype.is_floating_point:
                return f"convert {key!r} to float32 in forward()"
            if spec[key].dtype == torch.float64:
                return "append torchrl.envs.DoubleToFloat() to the environment"
            return f"convert the weights to the dtype of {key!r}: encoder.to({spec[key].dtype})"
    shapes = ", ".join(f"{key!r} {list(spec[key].shape)}" for key in encoder.in_keys)
    return f"build it for the shapes in the observation spec, {shapes}"


def _samples(encoder: Any, spec: Composite) -> Iterator[str]:
    """Checks samples and entropy of the distribution."""
    dist = encoder.get_dist(random_observations(encoder, spec, 4, 3))
    kind, shape = type(dist).__name__, tuple(dist.batch_shape + dist.event_shape)
    for name in ("rsample", "deterministic_sample", "entropy"):
        try:
            value = getattr(dist, name)
            value = value() if callable(value) else value
        except FAILURES:
            yield (
                f"its distribution, {kind}, has no {name}: use DiagonalNormal or OneHotGroups from "
                f"alm_torchrl.distributions, or define it in {kind}"
            )
            continue
        if name != "entropy" and value.shape != shape:
            yield f"{name} of {kind} has shape {tuple(value.shape)}, expected {shape}"


def _gradient(encoder: Any, latent: Tensor, outputs: TensorDictBase) -> Iterator[str]:
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
    value = latent.square().sum()
    for key in _further_keys(encoder):
        if outputs[key].requires_grad:
            value = value + outputs[key].square().sum()
    gradients: Sequence[Tensor | None] = torch.autograd.grad(
        value, [*trained.values()], allow_unused=True
    )
    for name, gradient in zip(trained, gradients, strict=True):
        if gradient is None:
            yield (
                f"{name} has no gradient: use it in forward(), write the loss that trains it to an "
                "entry of its own, or call requires_grad_(False)"
            )
        elif not gradient.isfinite().all():
            yield f"the gradient of {name} is not finite: bound the values in forward()"


def _further_keys(encoder: Any) -> list[NestedKey]:
    """Returns the entries, such as losses, that neither the encoder nor the next step reads."""
    read = {unravel_key(key) for module in encoder.module for key in module.in_keys}
    read |= {unravel_key(key) for key in encoder.dist_sample_keys}
    keys = [unravel_key(key) for key in encoder.out_keys]
    return [key for key in keys if key not in read and tuple_key(key)[0] != "next"]


def _prior(
    encoder: Any, posterior: D.Distribution, dynamics: Any, action_spec: TensorSpec | None
) -> D.Distribution | str:
    """Returns the distribution of the dynamics after a latent, or why it cannot read the latent."""
    if not isinstance(dynamics, ProbabilisticTensorDictSequential):
        return (
            f"the dynamics, {type(dynamics).__name__}, does not end in a distribution: use "
            "LatentDynamics(latent_dim, action_dim, head=encoder.head)"
        )
    latent = unravel_key(encoder.dist_sample_keys[-1])
    keys = [unravel_key(key) for key in dynamics.in_keys]
    if latent not in keys or len(keys) != 2:
        return f"it writes {latent!r}, but the dynamics reads {keys}: give both the same latent_key"
    shape = tuple(posterior.batch_shape + posterior.event_shape)
    size = getattr(dynamics, "action_dim", None) if action_spec is None else action_spec.shape[-1]
    if size is None:
        return "the size of the action is unknown: pass action_spec=env.action_spec"
    z = posterior.rsample()
    weights = next((p.dtype for p in dynamics.parameters()), z.dtype)
    if z.dtype != weights:
        return (
            f"its latent has dtype {z.dtype}, but the dynamics has {weights}: convert the output "
            f"of the network to {weights} in forward()"
        )
    entries = {key: z if key == latent else z.new_zeros(*shape[:-1], size) for key in keys}
    try:
        prior = dynamics.get_dist(TensorDict(entries, batch_size=shape[:-1]))
    except FAILURES as error:
        return (
            f"the dynamics cannot read its latent, {shape}, with an action of size {size} "
            f"({one_line(error)}): build both with the same latent_dim"
        )
    other = tuple(prior.batch_shape + prior.event_shape)
    if shape != other:
        return f"its latents have shape {shape}, but the dynamics has {other}: use one latent_dim"
    return prior


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

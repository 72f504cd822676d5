"""The checks of an encoder's buffers, statistics and state, and that it changes no input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torchrl.data import Bounded, Composite
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl.files import one_line

#: Larger bounds of an observation are not realistic values.
_FAR = 1e6
#: Exceptions that a wrong network may raise.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


def random_observations(encoder: Any, spec: Composite, *batch: int) -> TensorDictBase:
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


def _encode(encoder: Any, observations: TensorDictBase) -> Tensor:
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return encoder(observations.copy()).get(encoder.dist_sample_keys[-1])


def check_batch_norm(encoder: Any) -> Iterator[str]:
    """Checks that no layer normalizes by the statistics of a batch."""
    for name, layer in encoder.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            yield (
                f"{name} is a BatchNorm in training mode, whose output depends on the other "
                "observations of the batch: use nn.LayerNorm (nn.GroupNorm(1, channels) after a "
                "convolution), for inputs NormalizedInputs, or for a pretrained network "
                "FrozenEncoder"
            )


def check_buffers(encoder: Any, spec: Composite) -> Iterator[str]:
    """Checks that a forward pass changes no buffer, also after an update of the weights."""
    observations = random_observations(encoder, spec, 4, 3)
    with torch.no_grad():
        for weight in (p for p in encoder.parameters() if p.requires_grad):
            weight.add_(torch.randn_like(weight), alpha=0.1)  # buffers may have converged before
        changed = _changed_buffers(encoder, partial(encoder.get_dist_params, observations))
    if changed:
        yield (
            f"its forward pass changes {', '.join(changed)}: keep the layer in evaluation mode "
            "(override train()), and change the buffers in update_statistics(), which is called "
            "on each collected batch; the page on encoders shows it for spectral_norm"
        )


def _changed_buffers(module: Any, work: Callable[[], object]) -> list[str]:
    """Returns the names of the buffers that a call changes."""
    before = {name: value.clone() for name, value in module.named_buffers()}
    work()
    return [name for name, value in module.named_buffers() if not torch.equal(before[name], value)]


def check_determinism(encoder: Any, spec: Composite) -> Iterator[str]:
    """Checks that two deterministic passes are equal."""
    observations = random_observations(encoder, spec, 4, 3)
    if not torch.equal(_encode(encoder, observations), _encode(encoder, observations)):
        yield (
            "two forward passes under ExplorationType.DETERMINISTIC differ: remove dropout, and "
            "put augmentations into Augmented(network, [...])"
        )


def check_inputs(encoder: Any, spec: Composite) -> Iterator[str]:
    """Checks that a forward pass does not change the observations."""
    observations = random_observations(encoder, spec, 4, 3)
    before = observations.clone()
    with torch.no_grad():
        encoder.get_dist_params(observations)
    for key in before.keys(True, True):
        if not torch.equal(before[key], observations[key]):
            yield f"it changes the observation {key!r} in place: copy it first"


def check_statistics(encoder: Any, spec: Composite) -> Iterator[str]:
    """Checks that update_statistics() of the encoder reaches the layers with such a method."""
    layers = {n: m for n, m in encoder.named_modules() if n and hasattr(m, "update_statistics")}
    update = getattr(encoder, "update_statistics", None)
    if not layers:
        return
    reached: set[str] = set()  # statistics that have converged may not change
    for name, layer in layers.items():
        layer.update_statistics = partial(_record, reached, name, layer.update_statistics)
    changed = []
    try:
        if update is not None:
            work = partial(update, random_observations(encoder, spec, 4, 3))
            changed = _changed_buffers(encoder, work)
    except FAILURES as error:
        yield (
            f"update_statistics() fails on observations of batch size [4, 3] ({one_line(error)}): "
            "accept any leading dimensions"
        )
        return
    for name, layer in layers.items():
        if [*layer.buffers()] and not any(n.startswith(name) for n in (*reached, *changed)):
            yield (
                f"encoder.update_statistics() does not reach {name}, a {type(layer).__name__}: put "
                "the network into NormalizedInputs(network, [...]), or define "
                "update_statistics(*inputs) in it"
            )


def _record(reached: set[str], name: str, method: Callable[..., None], *inputs: Tensor) -> None:
    """Calls a method, and remembers that it was called."""
    reached.add(name)
    method(*inputs)


def check_state_dict(encoder: Any, spec: Composite) -> Iterator[str]:
    """Checks that the state dict contains and restores all tensors."""
    encoder.eval()  # noise, which check_determinism reports, would look like a difference here
    for name, module in encoder.named_modules():
        for attribute in vars(module):
            if isinstance(getattr(module, attribute), Tensor):
                where = f"{name}.{attribute}" if name else attribute
                yield (
                    f"the tensor {where} is neither a parameter nor a buffer: register it with "
                    "self.register_buffer(), or use torch.nn.utils.parametrizations for a weight"
                )
    observations = random_observations(encoder, spec, 4)
    try:
        before = _encode(encoder, observations)
        state = copy.deepcopy(encoder.state_dict())
        with torch.no_grad():
            for tensor in (*encoder.parameters(), *encoder.buffers()):
                tensor.zero_()
        encoder.load_state_dict(state)
        same = torch.equal(before, _encode(encoder, observations))
    except FAILURES as error:
        yield f"its state_dict cannot be loaded ({one_line(error)}): keep all names in it"
        return
    if not same:
        yield (
            "its state_dict does not restore it: store weights as nn.Parameter and statistics "
            "with register_buffer(..., persistent=True)"
        )

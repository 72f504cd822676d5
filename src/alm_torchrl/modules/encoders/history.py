"""Encoders with memory, for partially observable environments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self, Unpack

from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.modules import GRU, GRUCell

from alm_torchrl.data.transitions import next_key
from alm_torchrl.distributions import full_precision
from alm_torchrl.modules.encoders.base import Encoder
from alm_torchrl.modules.heads import DEFAULT_HEAD, LatentHead
from alm_torchrl.modules.networks import MLPKwargs, as_weights, concatenate, mlp


class WindowEncoder(Encoder):
    """A GRU over the last ``L`` observations, followed by an MLP.

    The environment writes the window ``[..., L, O]`` as an observation (``history=8`` in
    :func:`alm_torchrl.envs.make_env`). Gradients flow through the whole window, and no stored state
    becomes stale.

    Args:
        observation_dim: total size of the observations of one step.
        hidden_dim: width of the GRU and of the MLP.
        in_keys: windows to read, each ``[..., L, O_i]``; several are concatenated.
        **mlp_kwargs: further arguments of :func:`mlp`; ``depth`` is 1 by default.

    Examples:
        >>> import torch
        >>> WindowEncoder(3, latent_dim=8)(history=torch.randn(2, 10, 3))[-1].shape
        torch.Size([2, 8])
    """

    _ranks: ClassVar[tuple[int, ...]] = (2,)
    # The newest entry of the windows of make_env is the observation.
    _ignored: ClassVar[tuple[NestedKey, ...]] = ("observation",)

    def __init__(
        self,
        observation_dim: int,
        latent_dim: int = 50,
        hidden_dim: int = 512,
        *,
        in_keys: Sequence[NestedKey] = ("history",),
        head: LatentHead = DEFAULT_HEAD,
        latent_key: NestedKey = "latent",
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        # GRU and GRUCell are TorchRL's Python versions: torch's fused kernel supports neither
        # torch.vmap over seeds nor swapping the parameters for those of the target.
        gru = GRU(observation_dim, hidden_dim)
        network = _WindowGRU(gru, _readout(hidden_dim, head.network_size(latent_dim), mlp_kwargs))
        super().__init__(network, latent_dim, in_keys, head, latent_key=latent_key)


class RecurrentEncoder(Encoder):
    """A GRU that steps with the environment; each transition stores its state.

    The encoder reads the state ``[..., 1, H]`` at ``state_key`` and writes the next one under
    ``"next"``. It is like :class:`torchrl.modules.GRUModule` without the entry ``is_init``, which
    compiled graphs and ``torch.vmap`` do not support. The environment needs a
    :func:`state_primer`.

    Limits, compared with :class:`WindowEncoder`: gradients are truncated after one step; stored
    states become stale as the encoder learns, and are zero during random collection.

    Args:
        observation_dim: total size of the observations.
        hidden_dim: width ``H`` of the state and of the MLP after it.
        in_keys: observations to read, each ``[..., O_i]``; several are concatenated.
        state_key: entry of the state.
        **mlp_kwargs: further arguments of :func:`mlp`; ``depth`` is 1 by default.

    Examples:
        >>> import torch
        >>> encoder = RecurrentEncoder(3, hidden_dim=16)
        >>> state = torch.zeros(2, 1, 16)
        >>> encoder(observation=torch.randn(2, 3), recurrent_state=state)[-1].shape
        torch.Size([2, 50])
    """

    def __init__(
        self,
        observation_dim: int,
        latent_dim: int = 50,
        hidden_dim: int = 512,
        *,
        in_keys: Sequence[NestedKey] = ("observation",),
        state_key: NestedKey = "recurrent_state",
        head: LatentHead = DEFAULT_HEAD,
        latent_key: NestedKey = "latent",
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        cell = GRUCell(observation_dim, hidden_dim)
        super().__init__(
            _StatefulGRU(cell, _readout(hidden_dim, head.network_size(latent_dim), mlp_kwargs)),
            latent_dim,
            [*in_keys, state_key],
            head,
            latent_key=latent_key,
            extra_keys=[next_key(state_key)],
        )
        self.hidden_dim = hidden_dim
        self.state_key = unravel_key(state_key)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The :func:`state_primer`; TorchRL's ``get_primers_from_module`` finds it."""
        return state_primer(self.hidden_dim, self.state_key)

    @classmethod
    def from_spec(
        cls, spec: Composite, *, state_key: NestedKey = "recurrent_state", **options: Any
    ) -> Self:
        """Builds an encoder for the vectors of an environment that has a :func:`state_primer`.

        See :meth:`Encoder.from_spec` for the arguments; the primer sets ``hidden_dim``.
        """
        state_key = unravel_key(state_key)
        if state_key not in spec.keys(True, True):
            raise ValueError(
                f"the environment has no entry {state_key!r} for the state; append "
                f"alm_torchrl.modules.state_primer({options.get('hidden_dim', 256)}) to it"
            )
        options["hidden_dim"] = spec[state_key].shape[-1]
        observations = spec.clone()
        del observations[state_key]
        return super().from_spec(observations, state_key=state_key, **options)


def state_primer(hidden_dim: int, state_key: NestedKey = "recurrent_state") -> TensorDictPrimer:
    """The transform that passes the state of a :class:`RecurrentEncoder` to the next step.

    The state is float32 ``[..., 1, hidden_dim]``, and zero at the start of every episode.

    Examples:
        >>> state_primer(16).primers["recurrent_state"].shape
        torch.Size([1, 16])
    """
    return TensorDictPrimer({state_key: Unbounded((1, hidden_dim))}, expand_specs=True)


def _readout(hidden_dim: int, out_features: int, mlp_kwargs: MLPKwargs) -> nn.Module:
    kwargs: MLPKwargs = {"depth": 1, **mlp_kwargs}
    return mlp(hidden_dim, out_features, hidden_dim, **kwargs)


class _WindowGRU(nn.Module):
    """Maps windows ``[..., L, O_i]`` to an output ``[..., out_features]``."""

    def __init__(self, gru: GRU, readout: nn.Module) -> None:
        super().__init__()
        self.gru = gru
        self.readout = readout

    def forward(self, *windows: Tensor) -> Tensor:
        window = as_weights(concatenate(*windows), self)
        batch = window.shape[:-2]
        outputs, _ = self.gru(window.reshape(-1, *window.shape[-2:]))
        return self.readout(outputs[:, -1]).reshape(*batch, -1)


class _StatefulGRU(nn.Module):
    """Maps observations ``[..., O_i]`` and a state ``[..., 1, H]`` to an output and a state."""

    def __init__(self, cell: GRUCell, readout: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.readout = readout

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *observations, state = inputs
        observation = as_weights(concatenate(*observations), self)
        batch = observation.shape[:-1]
        state = self.cell(
            observation.reshape(-1, observation.shape[-1]), state.reshape(-1, state.shape[-1])
        )
        state = full_precision(state).reshape(*batch, -1)
        return self.readout(state), state.unsqueeze(-2)

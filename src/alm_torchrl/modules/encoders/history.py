"""Encoders with a memory, for environments that show a part of their state at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.modules import GRU, GRUCell

from alm_torchrl.distributions import full_precision
from alm_torchrl.modules.described import described
from alm_torchrl.modules.encoders.specs import joined, observation_shapes
from alm_torchrl.modules.heads import GaussianHead, LatentHead
from alm_torchrl.modules.latent import LatentModule, next_key
from alm_torchrl.modules.networks import orthogonal_init

__all__ = ["RecurrentEncoder", "WindowEncoder", "state_primer"]


@described
class WindowEncoder(LatentModule):
    """A GRU over the last ``L`` observations, which the environment keeps as one entry.

    The window ``[..., L, O]`` is part of the observation
    (:func:`alm_torchrl.envs.make_env` adds it: ``history=8``), so that the replay holds all that an
    encoding needs: no state is stored that an older encoder wrote, and every gradient passes the
    whole window. Past an episode's start the first observation is repeated.

    Args:
        observation_dim: size ``O`` of an observation, or the sum of several.
        latent_dim: size ``D`` of the latent.
        hidden_dim: width of the GRU and of the layer behind it.
        in_keys: the windows to read, each ``[..., L, O_i]``; several are concatenated.
        head: the latent's distribution; :class:`GaussianHead` by default.
        latent_key: where the latent is written, with the distribution's parameters beside it.

    Examples:
        >>> import torch
        >>> encoder = WindowEncoder(3, latent_dim=8, hidden_dim=16)
        >>> encoder(history=torch.randn(2, 10, 3))[-1].shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        observation_dim: int,
        latent_dim: int = 50,
        hidden_dim: int = 512,
        *,
        in_keys: Sequence[NestedKey] = ("history",),
        head: LatentHead | None = None,
        latent_key: NestedKey = "latent",
    ) -> None:
        head = GaussianHead() if head is None else head
        network = _WindowGRU(observation_dim, head.network_size(latent_dim), hidden_dim)
        super().__init__(network, in_keys, head=head, latent_key=latent_key)
        self.latent_dim = latent_dim

    @classmethod
    def from_spec(
        cls,
        spec: Composite,
        *,
        latent_dim: int = 50,
        hidden_dim: int = 512,
        in_keys: Sequence[NestedKey] | None = None,
        **options: Any,
    ) -> WindowEncoder:
        """Makes an encoder of an environment's windows.

        Args:
            spec: ``env.observation_spec_unbatched``.
            latent_dim: size of the latent.
            hidden_dim: width of the GRU and of the layer behind it.
            in_keys: the windows to read; all entries ``[L, O]`` by default.
            **options: further arguments of the class.

        Returns:
            The encoder.

        Raises:
            ValueError: if there is no such observation.
        """
        # The newest entry of make_env's windows is the observation
        shapes = observation_shapes(spec, in_keys, 2, ignore=["observation"])
        size = sum(shape[1] for shape in shapes.values())
        return cls(size, latent_dim, hidden_dim, in_keys=list(shapes), **options)


@described
class RecurrentEncoder(LatentModule):
    """A GRU that is stepped with the environment, and whose state is stored with each transition.

    Entries, shapes and priming are those of :class:`torchrl.modules.GRUModule` in its single-step
    mode: the state ``[..., 1, H]`` is read at ``state_key`` and the next one is written under
    ``"next"``; a :class:`~torchrl.envs.TensorDictPrimer` in the environment (:func:`state_primer`,
    or :meth:`make_tensordict_primer`) starts every episode with zeros and hands the state on. So no
    ``is_init`` is needed, on whose values ``GRUModule`` branches, which neither one compiled graph
    nor ``torch.vmap`` allows.

    What to know before choosing it over :class:`WindowEncoder`:

    * The gradient is truncated after one step. The losses start from the stored state as from a
      constant: the GRU learns to read it, and what to keep of it for the present latent, but
      nothing is credited for what an earlier step wrote.
    * Stored states were written by the encoder of that time, and grow stale as it learns.
    * While a collector acts at random (``init_random_frames``), no policy is asked, and the state
      stays zero: those transitions are encoded from a single observation.

    Args:
        observation_dim: total size of the observations at ``in_keys``.
        latent_dim: size ``D`` of the latent.
        hidden_dim: width ``H`` of the GRU's state.
        in_keys: the observations to read, each ``[..., O_i]``; several are concatenated.
        state_key: where the state is read; written under ``"next"``.
        head: the latent's distribution; :class:`GaussianHead` by default.
        latent_key: where the latent is written, with the distribution's parameters beside it.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> encoder = RecurrentEncoder(3, latent_dim=8, hidden_dim=16)
        >>> state = {"observation": torch.randn(2, 3), "recurrent_state": torch.zeros(2, 1, 16)}
        >>> td = encoder(TensorDict(state, batch_size=[2]))
        >>> td["latent"].shape, td["next", "recurrent_state"].shape
        (torch.Size([2, 8]), torch.Size([2, 1, 16]))
    """

    def __init__(
        self,
        observation_dim: int,
        latent_dim: int = 50,
        hidden_dim: int = 512,
        *,
        in_keys: Sequence[NestedKey] = ("observation",),
        state_key: NestedKey = "recurrent_state",
        head: LatentHead | None = None,
        latent_key: NestedKey = "latent",
    ) -> None:
        head = GaussianHead() if head is None else head
        network = _StatefulGRU(observation_dim, head.network_size(latent_dim), hidden_dim)
        super().__init__(
            network,
            [*in_keys, state_key],
            head=head,
            latent_key=latent_key,
            memory_keys=[next_key(state_key)],
        )
        self.latent_dim = latent_dim
        self.hidden_dim = hidden_dim
        self.state_key = unravel_key(state_key)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform that the environment needs, as ``GRUModule`` has it.

        ``torchrl.modules.utils.get_primers_from_module`` finds it.
        """
        return state_primer(self.hidden_dim, self.state_key)

    @classmethod
    def from_spec(
        cls,
        spec: Composite,
        *,
        latent_dim: int = 50,
        hidden_dim: int | None = None,
        in_keys: Sequence[NestedKey] | None = None,
        state_key: NestedKey = "recurrent_state",
        **options: Any,
    ) -> RecurrentEncoder:
        """Makes an encoder of an environment's vectors, with the size of the state primed in it.

        Args:
            spec: ``env.observation_spec_unbatched``, with a :func:`state_primer` in the
                environment.
            latent_dim: size of the latent.
            hidden_dim: without use here: the primed state says how wide the GRU is.
            in_keys: the observations to read; all vectors by default.
            state_key: the entry of the state.
            **options: further arguments of the class.

        Returns:
            The encoder.

        Raises:
            ValueError: if there is no such observation, or no state.
        """
        shapes = observation_shapes(spec, in_keys, 1, ignore=[state_key])
        if unravel_key(state_key) not in spec.keys(True, True):
            raise ValueError(
                f"the environment hands no {state_key!r} on: append "
                f"alm_torchrl.modules.state_primer({hidden_dim or 256}) to it first"
            )
        size = sum(shape[0] for shape in shapes.values())
        width = spec[state_key].shape[-1]
        return cls(size, latent_dim, width, in_keys=list(shapes), state_key=state_key, **options)


def state_primer(hidden_dim: int, state_key: NestedKey = "recurrent_state") -> TensorDictPrimer:
    """The transform by which an environment hands the state of a :class:`RecurrentEncoder` on.

    Args:
        hidden_dim: width ``H`` of the state.
        state_key: its entry, float32 ``[..., 1, H]``.

    Returns:
        The transform; it starts every episode with zeros.

    Examples:
        >>> import torch
        >>> from torchrl.envs import TransformedEnv
        >>> from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv
        >>> env = TransformedEnv(ContinuousActionVecMockEnv(), state_primer(16))
        >>> env.reset()["recurrent_state"].shape
        torch.Size([1, 16])
    """
    return TensorDictPrimer({state_key: Unbounded((1, hidden_dim))}, expand_specs=True)


class _Readout(nn.Sequential):
    """From the GRU's state to what the head reads."""

    def __init__(self, hidden_dim: int, out_features: int) -> None:
        super().__init__(
            nn.Linear(hidden_dim, hidden_dim), nn.ELU(), nn.Linear(hidden_dim, out_features)
        )
        orthogonal_init(self)


class _WindowGRU(nn.Module):
    """Windows ``[..., L, O_i]`` to ``[..., out_features]``.

    TorchRL's GRU in Python rather than torch's: ``torch.vmap`` over seeds, and parameters that are
    exchanged for a target's, both of which the fused kernel does not follow.
    """

    def __init__(self, observation_dim: int, out_features: int, hidden_dim: int) -> None:
        super().__init__()
        self.gru = GRU(observation_dim, hidden_dim)
        self.readout = _Readout(hidden_dim, out_features)

    def forward(self, *windows: Tensor) -> Tensor:
        window = joined(*windows)
        batch = window.shape[:-2]
        outputs, _ = self.gru(window.reshape(-1, *window.shape[-2:]))
        return self.readout(outputs[:, -1]).reshape(*batch, -1)


class _StatefulGRU(nn.Module):
    """Observations ``[..., O_i]`` and a state ``[..., 1, H]`` to an output and the next state."""

    def __init__(self, observation_dim: int, out_features: int, hidden_dim: int) -> None:
        super().__init__()
        self.cell = GRUCell(observation_dim, hidden_dim)
        self.readout = _Readout(hidden_dim, out_features)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *observations, state = inputs
        observation = joined(*observations)
        batch = observation.shape[:-1]
        state = self.cell(
            observation.reshape(-1, observation.shape[-1]), state.reshape(-1, state.shape[-1])
        )
        state = full_precision(state).reshape(*batch, -1)
        return self.readout(state), state.unsqueeze(-2)

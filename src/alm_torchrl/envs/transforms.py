"""Transforms of observations: rendered frames, noise and history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded
from torchrl.envs import TransformedEnv
from torchrl.envs.transforms import Compose, Transform


def transforms_of(env: TransformedEnv) -> list[Transform]:
    """Returns the transforms of an environment."""
    return list(env.transform) if isinstance(env.transform, Compose) else [env.transform]


class SeededEnv(TransformedEnv):
    """A :class:`~torchrl.envs.TransformedEnv` that also seeds its :class:`Distractors`."""

    def set_seed(self, seed: int | None = None, static_seed: bool = False) -> int | None:
        """Seeds the environment and the noise."""
        for transform in transforms_of(self):
            if isinstance(transform, Distractors):
                transform.set_seed(seed)
        return super().set_seed(seed, static_seed=static_seed)


class _AtResetToo(Transform):
    """A transform that handles resets like steps."""

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._call(tensordict_reset)


class CopyData(_AtResetToo):
    """Copies the data to and from an environment, which may reuse its tensors."""

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict.clone()

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.clone()


class RenderFrames(_AtResetToo):
    """Adds a rendered frame to every observation.

    Args:
        render: returns a frame, uint8 ``[H, W, 3]``.
        size: height and width to which frames are resized, by area averaging.
        channels_first: write ``[3, H, W]`` instead of ``[H, W, 3]``.

    Examples:
        >>> import numpy as np
        >>> from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv
        >>> frames = RenderFrames(lambda: np.zeros((48, 64, 3), np.uint8), size=(12, 16))
        >>> TransformedEnv(ContinuousActionVecMockEnv(), frames).rollout(2)["pixels"].shape
        torch.Size([2, 3, 12, 16])
    """

    def __init__(
        self,
        render: Callable[[], Any],
        size: tuple[int, int] | None = None,
        *,
        channels_first: bool = True,
    ) -> None:
        super().__init__(in_keys=[], out_keys=["pixels"])
        self.render = render
        self.size = size
        self.channels_first = channels_first
        self.shape = self.frame().shape

    def frame(self) -> Tensor:
        """Renders a frame."""
        image = self.render()
        if not isinstance(image, np.ndarray) or image.ndim != 3 or image.dtype != np.uint8:
            raise TypeError(
                f"expected a frame, uint8 [height, width, 3], not {getattr(image, 'shape', image)}"
                "; create a gymnasium.Env with render_mode='rgb_array'"
            )
        frame = torch.from_numpy(image.copy()).permute(2, 0, 1)
        if self.size is not None and frame.shape[1:] != self.size:
            resized = torch.nn.functional.interpolate(frame[None].float(), self.size, mode="area")
            frame = resized[0].round().to(torch.uint8)
        return (frame if self.channels_first else frame.permute(1, 2, 0)).contiguous()

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        frame = self.frame()
        if next_tensordict.device is not None:
            frame = frame.to(next_tensordict.device)
        return next_tensordict.set("pixels", frame)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Adds the spec of the frames."""
        observation_spec["pixels"] = Bounded(
            0, 255, self.shape, dtype=torch.uint8, device=observation_spec.device
        )
        return observation_spec


class Distractors(_AtResetToo):
    """Appends ``size`` standard Gaussian numbers to ``"observation"``, sampled at every step.

    The noise has its own random generator, so the environment does not change.

    Examples:
        >>> from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv
        >>> env = TransformedEnv(ContinuousActionVecMockEnv(), Distractors(64, seed=0))
        >>> env.rollout(3)["observation"].shape
        torch.Size([3, 71])
    """

    def __init__(self, size: int, seed: int | None = None) -> None:
        super().__init__(in_keys=["observation"], out_keys=["observation"])
        self.size = size
        self.set_seed(seed)

    def set_seed(self, seed: int | None) -> None:
        """Seeds the generator; ``None`` uses the entropy of the system."""
        # With the seed alone, the noise would repeat the random numbers of the environment.
        self.np_random = np.random.default_rng(None if seed is None else [seed, self.size])

    def _apply_transform(self, obs: Tensor) -> Tensor:
        obs = _floating(obs)
        noise = torch.from_numpy(self.np_random.standard_normal((*obs.shape[:-1], self.size)))
        return torch.cat([obs, noise.to(obs)], -1)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Adds the noise dimensions."""
        spec = observation_spec["observation"]
        observation_spec["observation"] = _unbounded(spec, spec.shape[-1] + self.size)
        return observation_spec


class History(Transform):
    """Writes the observation, and optionally the action before it, as a row to ``"history"``.

    The row is ``[1, O]``, or ``[1, O + A]`` with ``actions``; at a reset the action is zero.
    :class:`~torchrl.envs.CatFrames` stacks the rows.

    Examples:
        >>> from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv
        >>> env = TransformedEnv(ContinuousActionVecMockEnv(), History())
        >>> env.rollout(3)["history"].shape
        torch.Size([3, 1, 7])
    """

    def __init__(self, actions: bool = False) -> None:
        super().__init__(in_keys=["observation"], out_keys=["history"])
        self.actions = actions

    def _write(self, tensordict: TensorDictBase, action: Tensor | None) -> TensorDictBase:
        row = _floating(tensordict["observation"])
        if action is not None:
            row = torch.cat([row, action.to(row)], -1)
        return tensordict.set("history", row.unsqueeze(-2))

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return self._write(next_tensordict, tensordict["action"] if self.actions else None)

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        zero = self.parent.full_action_spec["action"].zero() if self.actions else None
        return self._write(tensordict_reset, zero)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Adds the row."""
        spec = observation_spec["observation"]
        size = spec.shape[-1]
        if self.actions:
            size += self.parent.full_action_spec["action"].shape[-1]
        observation_spec["history"] = _unbounded(spec, size).unsqueeze(-2)
        return observation_spec


def _unbounded(spec: TensorSpec, size: int) -> Unbounded:
    """Returns a floating-point spec with another last dimension."""
    shape = (*spec.shape[:-1], size)
    return Unbounded(shape, dtype=_floating(spec.zero()).dtype, device=spec.device)


def _floating(observation: Tensor) -> Tensor:
    """Converts integers and flags to float32."""
    return observation if observation.is_floating_point() else observation.float()

"""Encoders of images, alone or with vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, Unpack

from tensordict.utils import NestedKey
from torch import Tensor, nn

from alm_torchrl.modules.augmentation import Augmented, RandomShift
from alm_torchrl.modules.encoders.base import Encoder
from alm_torchrl.modules.encoders.normalization import NormalizedInputs, RunningNorm, centered_bytes
from alm_torchrl.modules.heads import DEFAULT_HEAD, LatentHead
from alm_torchrl.modules.networks import MLPKwargs, as_weights, mlp, orthogonal_init


class ConvNet(nn.Module):
    """The convolutions of DrQ-v2 (Yarats et al., 2022, arXiv 2107.09645).

    Four 3x3 convolutions with ReLU and strides 2, 1, 1, 1, then a linear layer. LayerNorm and Tanh
    of DrQ-v2 are omitted: they make the features of all images of a task nearly equal, and ALM's
    consistency term then collapses them.

    Args:
        shape: ``(C, H, W)`` of an image; frames are stacked along the channels.
        feature_dim: size of the output.
        channels: channels of every convolution.

    Examples:
        >>> import torch
        >>> ConvNet((9, 32, 32))(torch.randint(256, (2, 5, 9, 32, 32), dtype=torch.uint8)).shape
        torch.Size([2, 5, 50])
    """

    def __init__(self, shape: Sequence[int], feature_dim: int = 50, channels: int = 32) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 15:
            raise ValueError(
                "an image has shape (channels, height, width) and sides of at least 15 pixels, got "
                f"{tuple(shape)}; move channels first with torchrl.envs.PermuteTransform"
            )
        layers: list[nn.Module] = []
        size = shape[0]
        for stride in (2, 1, 1, 1):
            layers += [nn.Conv2d(size, channels, 3, stride), nn.ReLU()]
            size = channels
        self.convolutions = nn.Sequential(*layers)
        height, width = ((side - 3) // 2 + 1 - 6 for side in shape[1:])
        self.trunk = nn.Linear(channels * height * width, feature_dim)
        orthogonal_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[..., C, H, W]`` to features ``[..., feature_dim]``.

        Bytes are mapped to [-0.5, 0.5]; floating-point images are used unchanged.
        """
        flat = centered_bytes(images.reshape(-1, *images.shape[-3:]))
        features = self.trunk(self.convolutions(flat).flatten(1))
        return features.reshape(*images.shape[:-3], -1)


class MultiInputEncoder(Encoder):
    """Images and vectors: convolutions for each image, then an MLP on all features.

    A :class:`RandomShift` augments images in the losses, but never in the policy.

    Args:
        shapes: shape of each observation by key: ``(C, H, W)`` for an image of bytes, or of
            floating-point numbers around 0; ``(O,)`` for a vector.
        feature_dim: number of features of each image.
        channels: channels of the convolutions.
        pad: largest random shift in pixels; 0 disables it.
        normalize: whether a :class:`RunningNorm` normalizes the observations; call
            :meth:`ALMAgent.update_statistics` on new data. Without it, images with the same
            background have similar latents, and the consistency term collapses them.
        **mlp_kwargs: further arguments of :func:`mlp`.

    Examples:
        >>> import torch
        >>> encoder = MultiInputEncoder({"pixels": (3, 32, 32), "joints": (5,)}, latent_dim=8)
        >>> pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
        >>> encoder(pixels=pixels, joints=torch.randn(2, 5))[-1].shape
        torch.Size([2, 8])
    """

    _ranks: ClassVar[tuple[int, ...]] = (1, 3)

    def __init__(
        self,
        shapes: Mapping[NestedKey, Sequence[int]],
        latent_dim: int = 50,
        hidden_dim: int = 512,
        *,
        feature_dim: int = 50,
        channels: int = 32,
        pad: int = 4,
        normalize: bool = True,
        head: LatentHead = DEFAULT_HEAD,
        latent_key: NestedKey = "latent",
        **mlp_kwargs: Unpack[MLPKwargs],
    ) -> None:
        wrong = {key: tuple(shape) for key, shape in shapes.items() if len(shape) not in (1, 3)}
        if wrong or not shapes:
            raise ValueError(f"shapes must be images (C, H, W) or vectors (O,) by key, got {wrong}")
        branches: list[nn.Module] = []
        features = 0
        for shape in shapes.values():
            image = len(shape) == 3
            branch = ConvNet(shape, feature_dim, channels) if image else nn.Identity()
            branches.append(Augmented(branch, [RandomShift(pad)]) if image and pad else branch)
            features += feature_dim if image else shape[0]
        joint = mlp(features, head.network_size(latent_dim), hidden_dim, **mlp_kwargs)
        network: nn.Module = _Branches(branches, joint)
        if normalize:  # before the shift, because the mean of a pixel depends on its position
            network = NormalizedInputs(network, [RunningNorm(*shape) for shape in shapes.values()])
        super().__init__(network, latent_dim, list(shapes), head, latent_key=latent_key)

    @classmethod
    def _from_shapes(cls, shapes: dict[NestedKey, tuple[int, ...]], **options: Any) -> Self:
        return cls(shapes, **options)


class PixelEncoder(MultiInputEncoder):
    """Images of one shape: the convolutions of DrQ-v2, then an MLP.

    Args:
        shape: ``(C, H, W)`` of an image, with frames stacked along ``C``.
        in_keys: images to read.
        **options: further arguments of :class:`MultiInputEncoder`.

    Examples:
        >>> import torch
        >>> pixels = torch.randint(256, (2, 9, 84, 84), dtype=torch.uint8)
        >>> PixelEncoder((9, 84, 84), latent_dim=8)(pixels=pixels)[-1].shape
        torch.Size([2, 8])
    """

    _ranks: ClassVar[tuple[int, ...]] = (3,)

    def __init__(
        self,
        shape: Sequence[int],
        latent_dim: int = 50,
        hidden_dim: int = 512,
        *,
        in_keys: Sequence[NestedKey] = ("pixels",),
        **options: Any,
    ) -> None:
        super().__init__(dict.fromkeys(in_keys, shape), latent_dim, hidden_dim, **options)

    @classmethod
    def _from_shapes(cls, shapes: dict[NestedKey, tuple[int, ...]], **options: Any) -> Self:
        if len(set(shapes.values())) > 1:
            raise ValueError(f"images have different shapes: {shapes}; use MultiInputEncoder")
        shape = next(iter(shapes.values()))
        return cls(shape, in_keys=list(shapes), **options)


class _Branches(nn.Module):
    """A branch for each input, and a joint network on their outputs."""

    def __init__(self, branches: Sequence[nn.Module], joint: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.joint = joint

    def forward(self, *inputs: Tensor) -> Tensor:
        cast = (as_weights(x, self) for x in inputs)
        return self.joint(*(net(x) for net, x in zip(self.branches, cast, strict=True)))

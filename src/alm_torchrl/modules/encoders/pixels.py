"""Encoders of images, alone or beside vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Composite

from alm_torchrl.modules.augmentation import Augmented, RandomShift
from alm_torchrl.modules.described import described
from alm_torchrl.modules.encoders.normalization import (
    NormalizedInputs,
    RunningNorm,
    centered_bytes,
)
from alm_torchrl.modules.encoders.specs import joined, observation_shapes
from alm_torchrl.modules.heads import GaussianHead, LatentHead
from alm_torchrl.modules.latent import LatentModule
from alm_torchrl.modules.networks import mlp, orthogonal_init

__all__ = ["ConvNet", "MultiInputEncoder", "PixelEncoder"]


class ConvNet(nn.Module):
    """The convolutions of DrQ-v2 (Yarats et al., 2022, arXiv 2107.09645).

    Four 3x3 convolutions with ReLU, of stride 2, 1, 1, 1, then a linear layer to few features.
    DrQ-v2 has LayerNorm and Tanh behind that layer; here they would make the features of all images
    of a task nearly the same, which ALM's consistency then makes entirely so.

    Args:
        shape: ``(C, H, W)`` of an image; frames are stacked along the channels.
        feature_dim: size of the output (DrQ-v2: 50).
        channels: channels of every convolution (DrQ-v2: 32).

    Raises:
        ValueError: if the image is not three-dimensional, or too small for four convolutions.

    Examples:
        >>> import torch
        >>> network = ConvNet((9, 32, 32))
        >>> network(torch.randint(256, (2, 5, 9, 32, 32), dtype=torch.uint8)).shape
        torch.Size([2, 5, 50])
    """

    def __init__(self, shape: Sequence[int], feature_dim: int = 50, channels: int = 32) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 15:
            raise ValueError(
                f"an image is (channels, height, width) with sides of 15 pixels at least, got "
                f"{tuple(shape)}; images with the channels last become this by "
                "torchrl.envs.PermuteTransform"
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
        """Features ``[..., feature_dim]`` of images ``[..., C, H, W]``.

        Bytes are brought to [-0.5, 0.5], floating-point images are taken as they are.
        """
        flat = centered_bytes(images.reshape(-1, *images.shape[-3:]))
        features = self.trunk(self.convolutions(flat).flatten(1))
        return features.reshape(*images.shape[:-3], -1)


@described
class MultiInputEncoder(LatentModule):
    """Images and vectors together: convolutions for each image, then an MLP on everything.

    Images are augmented by a :class:`RandomShift` inside the losses, and never when acting.

    Args:
        shapes: shape of each observation by key: ``(C, H, W)`` for an image of bytes, or of
            floating-point numbers around 0; ``(O,)`` for a vector.
        latent_dim: size ``D`` of the latent.
        hidden_dim: width of the two hidden layers behind the features.
        feature_dim: features of each image.
        channels: channels of the convolutions.
        pad: largest random shift in pixels; 0 for none.
        normalize: whether the observations pass a :class:`RunningNorm` first. It takes the mean
            image away, so that what moves is what is encoded; call
            :meth:`ALMAgent.update_statistics` on new data. Without it, images of one background
            have latents so alike that the consistency term makes them the same.
        head: the latent's distribution; :class:`GaussianHead` by default.
        latent_key: where the latent is written, with the distribution's parameters beside it.

    Raises:
        ValueError: for a shape that is neither an image nor a vector.

    Examples:
        >>> import torch
        >>> shapes = {"pixels": (3, 32, 32), "joints": (5,)}
        >>> encoder = MultiInputEncoder(shapes, latent_dim=8, hidden_dim=16)
        >>> pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
        >>> encoder(pixels=pixels, joints=torch.randn(2, 5))[-1].shape
        torch.Size([2, 8])
    """

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
        head: LatentHead | None = None,
        latent_key: NestedKey = "latent",
    ) -> None:
        wrong = {key: tuple(shape) for key, shape in shapes.items() if len(shape) not in (1, 3)}
        if wrong or not shapes:
            raise ValueError(f"wanted images (C, H, W) and vectors (O,) by key, got {wrong}")
        head = GaussianHead() if head is None else head
        images = [len(shape) == 3 for shape in shapes.values()]
        network: nn.Module = _SideBySideInputs(
            [
                ConvNet(shape, feature_dim, channels) if image else nn.Identity()
                for shape, image in zip(shapes.values(), images, strict=True)
            ],
            mlp(
                sum(
                    feature_dim if image else shape[0]
                    for shape, image in zip(shapes.values(), images, strict=True)
                ),
                head.network_size(latent_dim),
                hidden_dim,
            ),
        )
        if pad and any(images):
            network = Augmented(network, [RandomShift(pad) if image else None for image in images])
        if normalize:  # before a shift, which would move the background against its mean
            network = NormalizedInputs(network, [RunningNorm(*shape) for shape in shapes.values()])
        super().__init__(network, list(shapes), head=head, latent_key=latent_key)
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
    ) -> MultiInputEncoder:
        """Makes an encoder of an environment's images and vectors.

        Args:
            spec: ``env.observation_spec_unbatched``.
            latent_dim: size of the latent.
            hidden_dim: width of the two hidden layers.
            in_keys: the observations to read; all images and vectors by default.
            **options: further arguments of the class.

        Returns:
            The encoder.

        Raises:
            ValueError: if there is no such observation.
        """
        shapes = observation_shapes(spec, in_keys, 1, 3)
        return cls(shapes, latent_dim, hidden_dim, **options)


@described
class PixelEncoder(MultiInputEncoder):
    """Images: the convolutions of DrQ-v2, then an MLP.

    A :class:`MultiInputEncoder` of one image.

    Args:
        shape: ``(C, H, W)`` of the image, with frames stacked along ``C``.
        latent_dim: size ``D`` of the latent.
        hidden_dim: width of the two hidden layers behind the features.
        in_keys: the image to read.
        **options: further arguments of :class:`MultiInputEncoder`.

    Examples:
        >>> import torch
        >>> encoder = PixelEncoder((9, 84, 84), latent_dim=8, hidden_dim=16)
        >>> encoder(pixels=torch.randint(256, (2, 9, 84, 84), dtype=torch.uint8))[-1].shape
        torch.Size([2, 8])
    """

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
    def from_spec(
        cls,
        spec: Composite,
        *,
        latent_dim: int = 50,
        hidden_dim: int = 512,
        in_keys: Sequence[NestedKey] | None = None,
        **options: Any,
    ) -> PixelEncoder:
        """Makes an encoder of an environment's images, which have one shape.

        Args:
            spec: ``env.observation_spec_unbatched``.
            latent_dim: size of the latent.
            hidden_dim: width of the two hidden layers.
            in_keys: the images to read; all of them by default.
            **options: further arguments of the class.

        Returns:
            The encoder.

        Raises:
            ValueError: if there is no image, or images differ in shape.
        """
        shapes = observation_shapes(spec, in_keys, 3)
        if len(set(shapes.values())) > 1:
            raise ValueError(f"images of several shapes, {shapes}, want a MultiInputEncoder")
        shape = next(iter(shapes.values()))
        return cls(shape, latent_dim, hidden_dim, in_keys=list(shapes), **options)


class _SideBySideInputs(nn.Module):
    """A branch for each input, and a network on what they return."""

    def __init__(self, branches: Sequence[nn.Module], joint: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.joint = joint

    def forward(self, *inputs: Tensor) -> Tensor:
        parts = [branch(x) for branch, x in zip(self.branches, inputs, strict=True)]
        return self.joint(joined(*parts))

"""Condition images derived from images: reduced, gray, masked, blurred or noised images, edges and label masks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from diffusion_cli.conditions.operators import BlockMean, Luma, Mask, middle_half
from diffusion_cli.errors import UsageError, counted

Shape = tuple[int, ...]
"""Shape of an image, [C, *sizes]."""
REACH = 4.0
"""Radius of the blur kernel in standard deviations."""
SMALLEST_SIDE = 0.5
"""Shortest side of a random box, as a share of the longest."""


class Degradation(ABC):
    """Base class of ways to derive a condition image from an image."""

    random = False
    """Whether it depends on seeds."""
    needs_masks: ClassVar[bool] = False
    """Whether the last channel of the image must be a segmentation mask."""

    def check(self, shape: Shape) -> None:  # noqa: B027
        """Raise UsageError if images of this shape cannot be degraded; by default, all can be."""

    def channels(self, shape: Shape) -> int:
        """Return the number of channels of the condition image of an image of this shape."""
        return shape[0]

    def sizes(self, shape: Shape) -> Shape:
        """Return the sizes of a degraded image."""
        return shape[1:]

    @abstractmethod
    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return degraded images.

        Args:
            images: float32 [B, C, *sizes] in [-1, 1].
            seeds: seed of the random choices for each image.
        """

    def enlarged(self, degraded: Tensor) -> Tensor:
        """Return degraded images at the size of the images."""
        return degraded

    def noise(self, condition: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return white noise of degraded images, at the size of the images.

        Args:
            condition: degraded images at the size of the images, [B, C, *sizes].
            seeds: seed of the noise of each image.
        """
        return white_noise(condition, seeds)


class ReducedSize(Degradation):
    """Means of blocks of `factor` pixels per axis; the condition image repeats each mean over its block."""

    def __init__(self, factor: int) -> None:
        self.operator, self.factor = BlockMean(factor), factor

    def check(self, shape: Shape) -> None:
        if any(size % self.factor for size in shape[1:]):
            sizes = " x ".join(map(str, reversed(shape[1:])))
            raise UsageError(
                "condition.factor", self.factor, f"does not divide {sizes} pixels", "use a divisor"
            )

    def sizes(self, shape: Shape) -> Shape:
        return tuple(size // self.factor for size in shape[1:])

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return self.operator(images)

    def enlarged(self, degraded: Tensor) -> Tensor:
        return self.operator.pseudo_inverse(degraded)

    def noise(self, condition: Tensor, seeds: Sequence[int]) -> Tensor:
        # One value for each block: the network could average noise that differs between its pixels.
        return self.enlarged(white_noise(self.operator(condition), seeds))


class Gray(Degradation):
    """The gray image of a colour image, by the luma of ITU-R BT.601."""

    def check(self, shape: Shape) -> None:
        if shape[0] != 3:
            problem = f"needs colour images, and these have {counted(shape[0], 'channel')}"
            raise UsageError("condition.of", "gray", problem, "use a dataset with dataset.channels=3")

    def channels(self, shape: Shape) -> int:
        return 1

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return Luma()(images)


class HiddenPart(Degradation):
    """The image with 0 in its hidden part, and a channel with 1 where it is known and -1 where it is hidden.

    Args:
        kind: hidden part: `box`, a box at a random place; `pixels`, independent random pixels; `centre`, the middle
            half of each axis.
        ratio: largest share of the image that a box hides, or probability that a pixel is hidden, in (0, 1). The sides
            of a box are random, from half to all of the sides of such a box.
    """

    def __init__(self, kind: Literal["box", "pixels", "centre"], ratio: float) -> None:
        self.kind, self.ratio = kind, ratio
        self.random = kind != "centre"

    def channels(self, shape: Shape) -> int:
        return shape[0] + 1

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        sizes = images.shape[2:]
        hidden = {"box": self._box, "pixels": self._pixels, "centre": self._centre}[self.kind]
        known = ~torch.stack([hidden(sizes, generator) for generator in generators(seeds)])[:, None]
        known = known.to(images.device)
        return torch.cat([Mask(known)(images), 2 * known.to(images.dtype) - 1], 1)

    def noise(self, condition: Tensor, seeds: Sequence[int]) -> Tensor:
        mark = condition.new_zeros(condition[:, :1].shape)
        return torch.cat([white_noise(condition[:, :-1], seeds), mark], 1)

    def _box(self, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
        largest = self.ratio ** (1 / len(sizes))
        box = []
        for size, (extent, place) in zip(
            sizes, torch.rand(len(sizes), 2, generator=generator).tolist(), strict=True
        ):
            side = max(1, int(largest * size * (SMALLEST_SIDE + (1 - SMALLEST_SIDE) * extent)))
            start = int(place * (size - side + 1))
            box.append(slice(start, start + side))
        return _inside(sizes, box)

    def _pixels(self, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.rand(*sizes, generator=generator) < self.ratio

    def _centre(self, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
        return _inside(sizes, middle_half(sizes))


class Edges(Degradation):
    """The strength of edges: 2 min(|G|, 1) - 1 with the gradient G of the gray image, by the Sobel operator.

    G is the change of gray per pixel, so a step from black (-1) to white (1) has |G| = 1 at both of its pixels.
    """

    def channels(self, shape: Shape) -> int:
        return 1

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        gray = Luma()(images) if images.shape[1] == 3 else images.mean(1, keepdim=True)
        axes = range(2, gray.dim())
        strength = torch.stack([self._derivative(gray, axis) for axis in axes]).square().sum(0).sqrt()
        return 2 * strength.clamp(max=1) - 1

    def _derivative(self, gray: Tensor, along: int) -> Tensor:
        for axis in range(2, gray.dim()):
            gray = filtered(gray, axis, [-0.5, 0, 0.5] if axis == along else [0.25, 0.5, 0.25])
        return gray


class Labels(Degradation):
    """The last channel of the image, which is the mask of `dataset.masks`."""

    needs_masks = True

    def channels(self, shape: Shape) -> int:
        return 1

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return images[:, -1:]


class GaussianBlur(Degradation):
    """The image after a Gaussian filter; pixels beyond the border equal those at the border.

    Args:
        sigma: standard deviation of the filter in pixels.
    """

    def __init__(self, sigma: float) -> None:
        radius = max(1, round(REACH * sigma))
        weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
        self.kernel = (weights / weights.sum()).tolist()

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        for axis in range(2, images.dim()):
            images = filtered(images, axis, self.kernel)
        return images


class GaussianNoise(Degradation):
    """The image with white noise, clipped to [-1, 1] as an image file is.

    Args:
        sigma: standard deviation of the noise; black and white differ by 2.
    """

    random = True

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return (images + self.sigma * white_noise(images, seeds)).clamp(-1, 1)


def filtered(images: Tensor, axis: int, kernel: Sequence[float]) -> Tensor:
    """Return images [B, C, *sizes] correlated with a kernel of odd length along an axis, with replicated borders."""
    rows = images.movedim(axis, -1)
    flat = rows.reshape(-1, 1, rows.shape[-1])
    radius = len(kernel) // 2
    weights = flat.new_tensor(kernel)[None, None]
    result = conv1d(pad(flat, (radius, radius), mode="replicate"), weights)
    return result.reshape(rows.shape).movedim(-1, axis)


def white_noise(images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return noise in the shape of images [B, ...], each image from its own seed, the same on all devices."""
    return _drawn(lambda generator: torch.randn(images.shape[1:], generator=generator), seeds).to(images)


def uniform(seeds: Sequence[int]) -> Tensor:
    """Return a number in [0, 1) from each seed, float32 [B]."""
    return _drawn(lambda generator: torch.rand((), generator=generator), seeds)


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return a random generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _drawn(draw: Callable[[torch.Generator], Tensor], seeds: Sequence[int]) -> Tensor:
    return torch.stack([draw(generator) for generator in generators(seeds)])


def _inside(sizes: Sequence[int], box: Sequence[slice]) -> Tensor:
    """Return which pixels are inside a box, bool [*sizes]."""
    inside = torch.zeros(*sizes, dtype=torch.bool)
    inside[tuple(box)] = True
    return inside

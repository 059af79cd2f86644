"""State space of a denoiser: pixels, or latents of an autoencoder (Rombach et al. 2022)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise, clip_x0
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.networks import ImageAutoencoder
from diffusion_cli.networks.autoencoder import drawn

PIXELS = 2**18  # per forward pass of the autoencoder: four images of 256x256


NoiseFn = Callable[[tuple[int, ...]], Tensor]
"""Returns standard normal noise of a shape, that of a batch of states."""


class Space(ABC):
    """Base class of state spaces, with states x [B, *shape] for images [B, C, *sizes] in [-1, 1]."""

    shape: tuple[int, ...]
    """Shape of a state."""
    bounded: bool
    """Whether noise-free states lie in [-1, 1]."""

    def clipped(self, denoise: Denoise, schedule: Schedule, *, keep_eps: bool = False) -> Denoise:
        """Wrap a denoiser by `clip_x0` if states are bounded."""
        return clip_x0(denoise, schedule, keep_eps=keep_eps) if self.bounded else denoise

    @abstractmethod
    def shape_of(self, image: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the state of an image with shape `image`; UsageError if it has none."""

    @abstractmethod
    def states(self, given: Tensor, draw: NoiseFn) -> Tensor:
        """Return the states of items of a dataset, which may be random."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Return the states of images."""

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """Return the images of states, not clipped to [-1, 1]."""


class Pixels(Space):
    """Pixel space: states are images."""

    bounded = True

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def shape_of(self, image: tuple[int, ...]) -> tuple[int, ...]:
        return image

    def states(self, given: Tensor, draw: NoiseFn) -> Tensor:
        return given

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x: Tensor) -> Tensor:
        return x


class Latents(Space):
    """Latents of an autoencoder, normalized to mean 0 and standard deviation 1 per channel.

    `x = (z - mean) / std`, where z is sampled from the encoder's distribution in training, and its mean in `encode`.
    The autoencoder runs in float32, a few images at a time.

    Args:
        autoencoder: trained autoencoder.
        image: shape of the images.
        mean: mean of z per channel.
        std: standard deviation of z per channel.
    """

    bounded = False

    def __init__(
        self,
        autoencoder: ImageAutoencoder,
        image: tuple[int, ...],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.shape = autoencoder.latent_shape(image)
        self.mean, self.std = list(mean), list(std)

    def shape_of(self, image: tuple[int, ...]) -> tuple[int, ...]:
        return self.autoencoder.latent_shape(image)

    @property
    def device(self) -> torch.device:
        """Device of the autoencoder."""
        return next(self.autoencoder.parameters()).device

    def moments(self, images: Tensor) -> Tensor:
        """Return mean and log variance [B, 2L, *sizes] of the latents z of images."""
        with torch.autocast(images.device.type, enabled=False):
            parts = images.float().split(max(1, PIXELS // prod(images.shape[2:])))
            return torch.cat([self.autoencoder.moments(part) for part in parts])

    def states(self, given: Tensor, draw: NoiseFn) -> Tensor:
        """Return random states [B, L, *sizes] for moments [B, 2L, *sizes] of `moments`."""
        mean, std = self._scale(given)
        return (drawn(given, draw((len(given), *self.shape))) - mean) / std

    def encode(self, images: Tensor) -> Tensor:
        return self.states(self.moments(images), lambda shape: images.new_zeros(()))

    def decode(self, x: Tensor) -> Tensor:
        mean, std = self._scale(x)
        count = max(1, PIXELS // (prod(x.shape[2:]) * self.autoencoder.factor ** (x.ndim - 2)))
        with torch.autocast(x.device.type, enabled=False):
            parts = (x.float() * std + mean).split(count)
            return torch.cat([self.autoencoder.decode(part) for part in parts])

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation per channel, broadcastable to states."""
        ones = [1] * (like.ndim - 2)
        mean, std = (
            torch.tensor(values, device=like.device).view(-1, *ones) for values in (self.mean, self.std)
        )
        return mean, std


class Scale(NamedTuple):
    """Statistics per channel of z ~ N(mean, variance) over images and positions."""

    mean: list[float]
    std: list[float]
    """Square root of `Var z = E[variance] + Var[mean]`."""
    explained: list[float]
    """`Var[mean] / Var z` in [0, 1]: the fraction of the variance that depends on the image."""


def measured_scale(parts: Iterable[Tensor], channels: int) -> Scale:
    """Return the statistics of L channels from moments [B, 2L, *sizes]; [B, 4L, *sizes] counts as two images each."""
    count, sums, squares, drawn_squares = 0, *torch.zeros(3, channels).double()
    for part in parts:
        mean, log_variance = part.cpu().double().unflatten(1, (-1, 2, channels)).movedim(2, 0)
        others = [dim for dim in range(mean.ndim) if dim != 2]
        sums += mean.sum(others)
        squares += mean.square().sum(others)
        drawn_squares += log_variance.exp().sum(others)
        count += mean.numel() // channels
    mean = sums / count
    of_images = squares / count - mean.square()
    variance = of_images + drawn_squares / count
    return Scale(mean.tolist(), variance.sqrt().tolist(), (of_images / variance).tolist())

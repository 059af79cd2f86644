"""From seeds to images: image n of a model and its settings is a function of seed n alone."""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from diffusion_cli.checkpoint import Model
from diffusion_cli.denoiser import Denoise, clip_x0
from diffusion_cli.precision import autocast
from diffusion_cli.samplers import Sampler, integrate


class SeededNoise:
    """Standard normal noise from one generator a seed, so that no image depends on its neighbours."""

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> None:
        # The seed itself, not a hash of it: the generator keeps 32 bits, and no two images may share them.
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = tuple(shape), device

    def draw(self) -> Tensor:
        """The next noise of each image, float32 [B, *shape]."""
        noise = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(noise).to(self.device, non_blocking=True)


def sample(
    denoise: Denoise,
    sampler: Sampler,
    times: Tensor,
    seeds: Sequence[int],
    shape: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Images of the given seeds, float32 [B, C, H, W], around [-1, 1]."""
    noise = SeededNoise(seeds, shape, device)
    x = noise.draw()
    (x,) = deque(integrate(sampler, denoise, x, times, noise.draw), maxlen=1)
    return x


def to_bytes(images: Tensor) -> Tensor:
    """Quantise [-1, 1] to uint8 as a saved PNG has it: the nearest of the 256 values, ties to even."""
    return images.float().add(1).mul(127.5).clamp(0, 255).round().to(torch.uint8)


def labels_of(seeds: Sequence[int], num_classes: int | None, device: torch.device) -> Tensor | None:
    """The classes in turn for a class-conditional model, int64 [B]: seed n gets class n mod K."""
    return None if num_classes is None else torch.tensor(seeds, device=device) % num_classes


@torch.inference_mode()
def generate(
    model: Model,
    sampler: Sampler,
    steps: int,
    seeds: Sequence[int],
    batch_size: int,
    *,
    clip: bool,
    precision: str,
) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
    """Yield (seeds, images as uint8 [B, C, H, W], labels or None), `batch_size` images at a time."""
    device = next(model.denoiser.parameters()).device
    times = sampler.grid(steps)
    for first in range(0, len(seeds), batch_size):
        batch = list(seeds[first : first + batch_size])
        labels = labels_of(batch, model.num_classes, device)
        denoise: Denoise = partial(model.denoiser, y=labels)
        if clip:
            denoise = clip_x0(denoise, model.denoiser.schedule)
        with autocast(device, precision):
            images = sample(denoise, sampler, times, batch, model.shape, device)
        yield batch, to_bytes(images), labels

"""From seeds to images: image n of a model and its settings is a function of seed n alone."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise, Denoiser, per_image
from diffusion_cli.diffusion.guidance import Guidance
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.runs.load import LoadedDenoiser
from diffusion_cli.samplers import Sampler, integrate
from diffusion_cli.system.compat import compile_error, is_compiled
from diffusion_cli.system.precision import autocast
from diffusion_cli.system.untrusted import reason


@cache
def _drawing() -> ThreadPoolExecutor:
    """The thread that draws noise ahead."""
    return ThreadPoolExecutor(1)


class SeededNoise:
    """Standard normal noise from one generator a seed, so that no image depends on its neighbours.

    For a GPU, which leaves the CPU idle, a thread draws the next noise ahead, from the second time on that any is asked
    for: a sampler that draws nothing but the start has none.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> None:
        # The seed itself, not a hash of it: the generator keeps 32 bits, and no two images may share them.
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = tuple(shape), device
        self._called = False
        self._ahead: Future[Tensor] | None = None

    def noise(self) -> Tensor:
        """The next noise of each image, float32 [B, *shape]."""
        noise = self._next() if self._ahead is None else self._ahead.result()
        if self._called and self.device.type == "cuda":
            self._ahead = _drawing().submit(self._next)
        self._called = True
        return noise.to(self.device, non_blocking=True)

    def _next(self) -> Tensor:
        noise = torch.empty(len(self.generators), *self.shape, pin_memory=self.device.type == "cuda")
        for image, generator in zip(noise, self.generators, strict=True):
            image.normal_(generator=generator)
        return noise


def states(
    denoise: Denoise,
    sampler: Sampler,
    times: Tensor,
    seeds: Sequence[int],
    shape: Sequence[int],
    device: torch.device,
) -> Iterator[Tensor]:
    """Yield the noise that the images of the seeds begin as, and what each step makes of it, float32 [B, C, H, W]."""
    noise = SeededNoise(seeds, shape, device)
    x = sampler.schedule.prior_std(times[0]) * noise.noise()
    yield x
    yield from integrate(sampler, denoise, x, times, noise.noise)


def sample(
    denoise: Denoise,
    sampler: Sampler,
    times: Tensor,
    seeds: Sequence[int],
    shape: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Images of the given seeds, float32 [B, C, H, W], around [-1, 1]."""
    (x,) = deque(states(denoise, sampler, times, seeds, shape, device), maxlen=1)
    return x


def scale_for_display(x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """States at times t divided by `sqrt(alpha^2 + sigma^2)`, to be shown as images are.

    Where the noise outgrows the data, as in VE and EDM, nothing would be seen but black and white; processes that keep
    the variance are shown as they are.
    """
    alpha, sigma = schedule(t)
    return x_t / per_image(torch.sqrt(alpha**2 + sigma**2), x_t)


def check_finite(images: Tensor) -> None:
    """Raise UsageError if images have values that are not finite."""
    if not images.isfinite().all():
        raise UsageError(
            "images",
            NO_VALUE,
            "sampling left numbers that are not finite",
            "try a smaller guidance.scale or restoration.scale, clip_x0=true, precision=fp32, or more steps",
        )


def labels_of(numbers: Sequence[int], labels: Sequence[int] | None, device: torch.device) -> Tensor | None:
    """The labels in turn, int64 [B]: image n gets number n mod K of these K; None for None."""
    if labels is None:
        return None
    return torch.tensor([labels[number % len(labels)] for number in numbers], device=device)


class NFECounter:
    """Counts the network calls that each image of a batch takes: those of the denoiser and of what guides it."""

    def __init__(self, denoiser: Denoiser, guidance: Guidance) -> None:
        self.networks = [denoiser, *guidance.guides()]
        self.before = self._evaluations()

    def _evaluations(self) -> int:
        return sum(network.evaluations for network in self.networks)

    def each(self, batch_size: int) -> int:
        """The calls since the start, an image of the batch."""
        return (self._evaluations() - self.before) // batch_size


@dataclass(frozen=True, kw_only=True)
class SamplingPipeline:
    """Everything except its seed that an image depends on: the denoiser, its guidance and the sampler."""

    model: LoadedDenoiser
    sampler: Sampler
    steps: int
    guidance: Guidance
    labels: Sequence[int] | None
    """Classes to make in turn; None for no label."""
    clip: bool
    """Whether to keep predicted images in [-1, 1]."""
    precision: str
    """Number format of the network: fp32, bf16 or fp16."""

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.model.denoiser.parameters()).device

    @property
    def times(self) -> Tensor:
        """Decreasing times of the sampler, from the noise to the image."""
        return self.sampler.grid(self.steps)

    def denoise(self, y: Tensor | None) -> Denoise:
        """Return the guided denoiser of images of the classes y, int64 [B]."""
        return guided(self.model, self.guidance, y, self.clip)


class Generated(NamedTuple):
    """A batch of images."""

    seeds: list[int]
    images: Tensor
    """As stored, [B, *shape]."""
    labels: Tensor | None
    """The classes that they were made as, int64 [B], or None."""
    calls: int
    """Network calls that each of them took (NFE)."""


@contextmanager
def compiled(model: LoadedDenoiser, whole: bool = True) -> Iterator[None]:
    """Call the network as it was compiled, if it was, on a `whole` batch; else as it was written."""
    if not is_compiled(model.denoiser.network):
        yield
        return
    with torch.compiler.set_stance("default" if whole else "force_eager"):
        try:
            yield
        except compile_error() as error:
            raise UsageError(
                "compile", True, f"torch cannot compile the network here ({reason(error)})", "leave it out"
            ) from error


def uncompiled(model: LoadedDenoiser) -> AbstractContextManager[None]:
    """Call the network as it was written."""
    return compiled(model, whole=False)


@torch.inference_mode()
def generate(pipeline: SamplingPipeline, seeds: Sequence[int], batch_size: int) -> Iterator[Generated]:
    """Yield the images of the seeds in order, `batch_size` at a time.

    A network is compiled for whole batches; a smaller last batch runs uncompiled. Raises UsageError if that fails.
    """
    model, device, times = pipeline.model, pipeline.device, pipeline.times
    for batch in _batches(seeds, pipeline.sampler, batch_size):
        y = labels_of(batch, pipeline.labels, device)
        denoise = pipeline.denoise(y)
        calls = NFECounter(model.denoiser, pipeline.guidance)
        with autocast(device, pipeline.precision), compiled(model, len(batch) == batch_size):
            x = sample(denoise, pipeline.sampler, times, batch, model.space.shape, device)
        images = model.space.decode(x)
        check_finite(images)
        yield Generated(batch, model.info.form.quantize(images), y, calls.each(len(batch)))


@torch.inference_mode()
def trajectories(pipeline: SamplingPipeline, seeds: Sequence[int], batch_size: int, *, frames: int) -> Tensor:
    """Return the states from noise to the images that `generate` makes of the seeds, uint8 [N, F, C, H, W].

    F is `frames`, or the number of states if that is smaller. They are evenly spaced, from the noise to the image, and
    scaled by `scale_for_display`.
    """
    model, sampler, device, times = pipeline.model, pipeline.sampler, pipeline.device, pipeline.times
    places = frame_places(len(times), frames)
    batches: list[Tensor] = []
    for batch in _batches(seeds, sampler, batch_size):
        denoise = pipeline.denoise(labels_of(batch, pipeline.labels, device))
        with autocast(device, pipeline.precision), compiled(model, len(batch) == batch_size):
            trajectory = enumerate(states(denoise, sampler, times, batch, model.space.shape, device))
            shown = [
                _picture(model, scale_for_display(x, times[place], sampler.schedule))
                for place, x in trajectory
                if place in places
            ]
        batches.append(torch.stack(shown, 1))
    return torch.cat(batches)


def _picture(model: LoadedDenoiser, x: Tensor) -> Tensor:
    """Return states, scaled for display, as pictures on the CPU."""
    return model.info.form.to_rgb(model.info.form.quantize(model.space.decode(x))).cpu()


def _batches(seeds: Sequence[int], sampler: Sampler, batch_size: int) -> Iterator[list[int]]:
    size = 1 if sampler.per_image else batch_size
    for first in range(0, len(seeds), size):
        yield list(seeds[first : first + size])


def guided(model: LoadedDenoiser, guidance: Guidance, y: Tensor | None, clip: bool) -> Denoise:
    """The denoiser of images of the classes y, int64 [B], guided and, with `clip`, kept in [-1, 1]; latents are not."""
    denoise = guidance(model.denoiser, y)
    return model.space.clipped(denoise, model.denoiser.schedule) if clip else denoise


def frame_places(count: int, most: int) -> list[int]:
    """At most so many of the places 0..count - 1, evenly, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, most)).round().long().tolist()

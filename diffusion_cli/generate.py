"""Generation of images from seeds; image n depends only on the model, its settings and seed n."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.conditions.condition import LABEL, is_missing
from diffusion_cli.conditions.rows import ConditionRows, in_turn
from diffusion_cli.config.values import Clip
from diffusion_cli.diffusion.denoiser import Denoise, Denoiser, per_image
from diffusion_cli.diffusion.guidance import Guidance
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.runs.load import LoadedDenoiser
from diffusion_cli.samplers import Advance, Sampler, integrate, reporting, unreported
from diffusion_cli.system.compat import compile_error, is_compiled
from diffusion_cli.system.precision import autocast
from diffusion_cli.system.untrusted import reason


@cache
def _drawing() -> ThreadPoolExecutor:
    """Return the thread that draws noise ahead."""
    return ThreadPoolExecutor(1)


class SeededNoise:
    """Standard normal noise with one random generator per seed, so that images do not depend on each other.

    For GPUs, a thread draws noise ahead, starting with the second request, because deterministic samplers make only
    one.

    Args:
        seeds: seed of each image.
        shape: shape of the noise of an image.
        device: device of the noise; it is drawn on the CPU.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> None:
        # The seed itself, not a hash: generators use 32 bits, and no two images may share them.
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = tuple(shape), device
        self._called = False
        self._ahead: Future[Tensor] | None = None

    def noise(self) -> Tensor:
        """Return the next noise of each image, float32 [B, *shape]."""
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
    """Yield the initial noise of the images, and the state after each step, float32 [B, *shape]."""
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
    """Return the final states of the seeds, float32 [B, *shape], in about [-1, 1] for pixels."""
    (x,) = deque(states(denoise, sampler, times, seeds, shape, device), maxlen=1)
    return x


def scale_for_display(x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Divide states at times t by sqrt(alpha^2 + sigma^2), to display them as images.

    Without this, VE and EDM states would be saturated; those of variance-preserving processes do not change.
    """
    alpha, sigma = schedule(t)
    return x_t / per_image(torch.sqrt(alpha**2 + sigma**2), x_t)


def check_finite(images: Tensor) -> None:
    """Raise UsageError if images have values that are not finite."""
    if not images.isfinite().all():
        raise UsageError(
            "images",
            NO_VALUE,
            "sampling produced values that are not finite",
            "try a smaller guidance.scale or restoration.scale, clip_x0=true, precision=fp32, or more steps",
        )


def rows_in_turn(
    numbers: Sequence[int], conditions: ConditionRows | None, device: torch.device
) -> Condition | None:
    """Return conditions in turn: image n gets row n mod K; None if `conditions` is None."""
    if conditions is None:
        return None
    return conditions.rows(in_turn(numbers, len(conditions))).to(device)


def class_condition(labels: Sequence[int] | None) -> Condition | None:
    """Return the condition of class labels; None without labels."""
    return None if labels is None else Condition.of(torch.tensor(labels, dtype=torch.int64))


class NFECounter:
    """Counts the network calls per image (NFE), of the denoiser and of guidance."""

    def __init__(self, denoiser: Denoiser, guidance: Guidance) -> None:
        self.networks = [denoiser, *guidance.guides()]
        self.before = self._evaluations()

    def _evaluations(self) -> int:
        return sum(network.evaluations for network in self.networks)

    def each(self, batch_size: int) -> int:
        """Return the calls per image since the start."""
        return (self._evaluations() - self.before) // batch_size


@dataclass(frozen=True, kw_only=True)
class SamplingPipeline:
    """Settings of sampling, everything but the seed that an image depends on."""

    model: LoadedDenoiser
    sampler: Sampler
    steps: int
    guidance: Guidance
    condition: ConditionRows | None
    """Conditions of consecutive images, repeated; None: unconditional."""
    clip: Clip
    """Whether to clip predicted images to [-1, 1]; "keep_eps": without the matching change of eps."""
    precision: str
    """Precision of the network: fp32, bf16 or fp16."""

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.model.denoiser.parameters()).device

    @property
    def times(self) -> Tensor:
        """Decreasing times of the sampler."""
        return self.sampler.grid(self.steps)

    @property
    def classes(self) -> Tensor | None:
        """Classes of consecutive images, int64 [K], repeated, -1 for a missing one; None without any.

        Values named "label" that are no classes of the model, such as a number, are left out.
        """
        conditions = self.model.info.conditions
        if self.condition is None or (conditions is not None and conditions.num_classes is None):
            return None
        found = self.condition.get(LABEL)
        return None if found is None or is_missing(found).all() else found.cpu()

    @property
    def labels(self) -> list[int] | None:
        """Classes of consecutive images, repeated; None unless each has one."""
        found = self.classes
        return None if found is None or is_missing(found).any() else found.tolist()

    def denoise(self, y: Condition | None) -> Denoise:
        """Return the guided denoiser for images with condition y."""
        return guided(self.model, self.guidance, y, self.clip)


class Generated(NamedTuple):
    """A batch of generated images."""

    seeds: list[int]
    images: Tensor
    """Stored samples [B, *shape]."""
    condition: Condition | None
    """Condition of the images, or None."""
    calls: int
    """Network calls per image (NFE)."""


@contextmanager
def compiled(model: LoadedDenoiser, whole: bool = True) -> Iterator[None]:
    """Context in which a compiled network runs compiled for a `whole` batch, and uncompiled otherwise."""
    if not is_compiled(model.denoiser.network):
        yield
        return
    with torch.compiler.set_stance("default" if whole else "force_eager"), naming_compile(True):
        yield


@contextmanager
def naming_compile(value: bool | str) -> Iterator[None]:
    """Turn an error of `torch.compile`, such as a missing C++ compiler, into a UsageError of `compile=value`."""
    try:
        yield
    except compile_error() as error:
        problem = f"torch cannot compile the network here ({reason(error)})"
        raise UsageError("compile", value, problem, "set compile=false") from error


def uncompiled(model: LoadedDenoiser) -> AbstractContextManager[None]:
    """Context in which a compiled network runs uncompiled."""
    return compiled(model, whole=False)


@torch.inference_mode()
def generate(
    pipeline: SamplingPipeline, seeds: Sequence[int], batch_size: int, advance: Advance = unreported
) -> Iterator[Generated]:
    """Yield the images of the seeds in order, in batches.

    Compiled networks run uncompiled for a smaller last batch.

    Args:
        pipeline: the model and its settings.
        seeds: seed of each image.
        batch_size: images per batch.
        advance: takes each share of the work that is done, at every network call.

    Raises:
        UsageError: compilation fails, or images have values that are not finite.
    """
    model, device, times = pipeline.model, pipeline.device, pipeline.times
    for batch in _batches(seeds, pipeline.sampler, batch_size):
        y = rows_in_turn(batch, pipeline.condition, device)
        denoise = reporting(pipeline.denoise(y), times, _of_batch(advance, len(batch), len(seeds)))
        calls = NFECounter(model.denoiser, pipeline.guidance)
        with autocast(device, pipeline.precision), compiled(model, len(batch) == batch_size):
            x = sample(denoise, pipeline.sampler, times, batch, model.space.shape, device)
        images = model.space.decode(x)
        check_finite(images)
        yield Generated(batch, model.info.form.quantize(images), y, calls.each(len(batch)))


@torch.inference_mode()
def warm_up(pipeline: SamplingPipeline, count: int, batch_size: int) -> None:
    """Call the network once on a batch of at most `count` images, because the first call is slower."""
    model, device, times = pipeline.model, pipeline.device, pipeline.times
    batch = next(_batches(range(count), pipeline.sampler, batch_size))
    denoise = pipeline.denoise(rows_in_turn(batch, pipeline.condition, device))
    with autocast(device, pipeline.precision), compiled(model, len(batch) == batch_size):
        denoise(torch.zeros(len(batch), *model.space.shape, device=device), times[0])
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def trajectories(
    pipeline: SamplingPipeline,
    seeds: Sequence[int],
    batch_size: int,
    *,
    frames: int,
    advance: Advance = unreported,
) -> Tensor:
    """Return previews of the states on the way from noise to the images of `generate`, uint8 [N, F, C, H, W].

    F is `frames`, or the number of states if smaller. States are evenly spaced, and scaled by `scale_for_display`.
    `advance` takes each share of the work that is done.
    """
    model, sampler, device, times = pipeline.model, pipeline.sampler, pipeline.device, pipeline.times
    places = frame_places(len(times), frames)
    batches: list[Tensor] = []
    for batch in _batches(seeds, sampler, batch_size):
        denoise = pipeline.denoise(rows_in_turn(batch, pipeline.condition, device))
        denoise = reporting(denoise, times, _of_batch(advance, len(batch), len(seeds)))
        with autocast(device, pipeline.precision), compiled(model, len(batch) == batch_size):
            trajectory = enumerate(states(denoise, sampler, times, batch, model.space.shape, device))
            shown = [
                _picture(model, scale_for_display(x, times[place], sampler.schedule))
                for place, x in trajectory
                if place in places
            ]
        batches.append(torch.stack(shown, 1))
    return torch.cat(batches)


def _of_batch(advance: Advance, size: int, count: int) -> Advance:
    """Return a function that takes shares of the work on a batch of `size` of `count` images."""
    return lambda share: advance(share * size / count)


def _picture(model: LoadedDenoiser, x: Tensor) -> Tensor:
    """Return previews of states, on the CPU."""
    return model.info.form.to_rgb(model.info.form.quantize(model.space.decode(x))).cpu()


def _batches(seeds: Sequence[int], sampler: Sampler, batch_size: int) -> Iterator[list[int]]:
    size = 1 if sampler.per_image else batch_size
    for first in range(0, len(seeds), size):
        yield list(seeds[first : first + size])


def guided(model: LoadedDenoiser, guidance: Guidance, y: Condition | None, clip: Clip) -> Denoise:
    """Return the guided denoiser for images with condition y; `clip` as in `SamplingPipeline`."""
    denoise = guidance(model.denoiser, y)
    if not clip:
        return denoise
    return model.space.clipped(denoise, model.denoiser.schedule, keep_eps=clip == "keep_eps")


def frame_places(count: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced indices of 0..count - 1, including the first and the last."""
    return torch.linspace(0, count - 1, min(count, most)).round().long().tolist()

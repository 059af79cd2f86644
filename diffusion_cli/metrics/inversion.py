"""Reconstruction error of DDIM inversion."""

import math
from collections import deque
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt

from diffusion_cli.data import to_model_range
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.diffusion.schedules import Spacing
from diffusion_cli.errors import UsageError
from diffusion_cli.generate import guided
from diffusion_cli.metrics.base import EvaluatedModel, MetricValue, ModelMetric
from diffusion_cli.samplers import DDIM, integrate, invert, reporting, start_grid_at
from diffusion_cli.system.precision import autocast
from diffusion_cli.system.progress import ProgressBar


class Inversion(ModelMetric):
    """Root mean square error, in pixel values 0..255, of real images after DDIM inversion and sampling.

    Also reports the mean square of the noise in units of sigma. For latent models the error includes that of the
    autoencoder.

    Args:
        steps: DDIM steps in each direction.
        strength: time t of the noise, in (0, 1].
        spacing: spacing of the time steps.
        split: split of the dataset.
        num_images: number of images; None: all.

    Source: Song et al. 2021a, Sec. 5.4.
    """

    NAME = "inversion_rmse"

    def __init__(
        self,
        *,
        steps: Annotated[int, Field(ge=2)] = 50,
        strength: Annotated[float, Field(ge=0.001, le=1)] = 0.9,
        spacing: Spacing = "leading",
        split: Literal["val", "train"] = "val",
        num_images: PositiveInt | None = None,
    ) -> None:
        self.steps, self.strength, self.num_images = steps, strength, num_images
        self.spacing: Spacing = spacing
        self.split: Literal["val", "train"] = split

    @torch.inference_mode()
    def measure(self, subject: EvaluatedModel) -> MetricValue:
        subject.model.info.require_mean("metric", "inversion", "use a metric of samples, such as fid")
        images, space = subject.load(self.split), subject.model.space
        schedule = subject.model.denoiser.schedule
        count = min(self.num_images or len(images), len(images))
        if count < 1 or images[torch.zeros(1, dtype=torch.int64)].is_floating_point():
            raise UsageError("metric.inversion.split", self.split, "needs 8-bit images, but there are none")
        sampler = DDIM(schedule, eta=0.0, spacing=self.spacing)
        times = start_grid_at(sampler.grid(self.steps), self.strength)
        prior = schedule.prior_std(times[0])
        errors, squares = 0.0, 0.0
        with ProgressBar(total=count, desc=self.NAME, unit="image", delay=1.0) as bar:
            for rows in torch.arange(count).split(subject.batch_size):
                batch, y = subject.batch(images, rows)
                denoise = guided(subject.model, NoGuidance(), y, subject.clip)
                x = to_model_range(batch)
                with bar.batch(len(rows)) as advance, autocast(subject.device, subject.precision):
                    rising, falling = (
                        reporting(denoise, way, lambda share: advance(share / 2))
                        for way in (times.flip(0), times)
                    )
                    (noise,) = deque(invert(schedule, rising, space.encode(x), times), maxlen=1)
                    (back,) = deque(integrate(sampler, falling, noise, times, noise.clone), maxlen=1)
                errors += (127.5 * (space.decode(back) - x).double()).square().flatten(1).mean(1).sum().item()
                squares += (noise.double() / prior).square().flatten(1).mean(1).sum().item()
        return MetricValue(
            self.NAME,
            math.sqrt(errors / count),
            {"noise_mean_square": squares / count, "images": count, "steps": self.steps},
            {
                "split": self.split,
                **subject.identity(images),
                "spacing": self.spacing,
                "strength": self.strength,
            },
        )

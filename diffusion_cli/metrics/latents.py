"""Check of the normalization of a model's latents on other images."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from diffusion_cli.data import Images, to_model_range
from diffusion_cli.diffusion.latents import Latents, measured_scale
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.base import EvaluatedModel, MetricValue, ModelMetric
from diffusion_cli.system.progress import ProgressBar


class LatentMoments(ModelMetric):
    """Largest deviation of latents of real images from mean 0 and standard deviation 1.

    `max_c max(|mean_c|, |std_c - 1|)` over channels c, of latents as in training. Also reports mean and standard
    deviation of each channel.

    Args:
        split: split of the dataset.
        num_images: number of images; None: all.

    Raises:
        UsageError: the model works in pixels, or the split has no images.
    """

    NAME = "latents_deviation"

    def __init__(
        self, *, split: Literal["val", "train"] = "val", num_images: PositiveInt | None = None
    ) -> None:
        self.split: Literal["val", "train"] = split
        self.num_images = num_images

    @torch.inference_mode()
    def measure(self, subject: EvaluatedModel) -> MetricValue:
        space = subject.model.space
        if not isinstance(space, Latents):
            raise UsageError(
                "metric",
                "latents",
                "applies to latent models, but the model works in pixels",
                "use a run trained with latent.run= or latent.pretrained=",
            )
        images = subject.dataset.load(self.split)
        count = min(self.num_images or len(images), len(images))
        if not count:
            raise UsageError(
                "metric.latents.split", self.split, "has no images", "use metric.latents.split=train"
            )
        mean, std, explained = measured_scale(_moments(subject, space, images, count), space.shape[0])
        means = [(value - zero) / one for value, zero, one in zip(mean, space.mean, space.std, strict=True)]
        stds = [value / one for value, one in zip(std, space.std, strict=True)]
        details = {f"mean_{channel}": value for channel, value in enumerate(means)}
        details |= {f"std_{channel}": value for channel, value in enumerate(stds)}
        details |= {f"explained_{channel}": value for channel, value in enumerate(explained)}
        return MetricValue(
            self.NAME,
            max(abs(value) for value in [*means, *(value - 1 for value in stds)]),
            details | {"images": count},
            {"split": self.split, "images_sha256": images.digest()},
        )


def _moments(subject: EvaluatedModel, space: Latents, images: Images, count: int) -> Iterator[Tensor]:
    """Yield the latent moments of the first `count` images in batches."""
    with ProgressBar(total=count, desc=LatentMoments.NAME, unit="image", delay=1.0) as bar:
        for rows in torch.arange(count).split(subject.batch_size):
            batch = images[rows.to(images.device)].to(subject.device)
            yield space.moments(to_model_range(batch)).cpu()
            bar.update(len(rows))

"""Random images, features and data sets of the tests of metrics."""

from pathlib import Path
from typing import Literal

import torch
import yaml
from torch import Tensor

from diffusion_cli.config import CONF
from diffusion_cli.data import Dataset, ExternalImages, Images
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.metrics import (
    DatasetReference,
    FeatureBatch,
    FeatureExtractors,
    Features,
    FeatureView,
    FrechetDistance,
    GivenSamples,
    InceptionScore,
    Moments,
    RealImages,
    Report,
    Rows,
    evaluate,
    frechet_distance,
)

CPU = torch.device("cpu")


def option(name: str) -> dict:
    node = yaml.safe_load((CONF / "features" / f"{name}.yaml").read_text())
    return {key: value for key, value in node.items() if key != "_target_"}


class Held(Dataset):
    """Two splits given as tensors."""

    def __init__(self, train: Tensor, val: Tensor, classes: int | None = None) -> None:
        super().__init__("")
        self.name, self.flip = "held", False
        self.shape = (train.shape[1], train.shape[2], train.shape[3])
        self.class_names = None if classes is None else tuple(map(str, range(classes)))
        self.splits = {"train": train, "val": val}

    def load(self, split) -> Images:
        pixels = self.splits[split]
        labels = None if self.num_classes is None else torch.arange(len(pixels)) % self.num_classes
        return MemoryImages(pixels, labels)


class Projection(Features):
    """A fixed linear map of pixels; it remembers how many images it was shown."""

    name, resize, note, device = "projection", "none", "", CPU
    dim, classes = 5, 3
    digest = "0" * 64

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(64, self.dim + self.classes, generator=generator) / 64
        self.seen = 0

    def extract(self, images: Tensor) -> FeatureBatch:
        self.seen += len(images)
        values = images.flatten(1).float() @ self.matrix
        return FeatureBatch(values[:, : self.dim], values[:, self.dim :])


def pixels(count: int, seed: int, high: int = 256) -> Tensor:
    return torch.randint(
        high, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def number(value: float | None) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def moments_of(features: Tensor) -> Moments:
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments


def distance(first: Tensor, second: Tensor) -> float:
    a, b = moments_of(first), moments_of(second)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


METRICS = {
    "fid": FrechetDistance(reference_distance=True, infinity=0, bootstrap=0),
    "is": InceptionScore(splits=4),
}
DATA = Held(pixels(200, 0), pixels(40, 1, high=200))


class Through(FeatureExtractors):
    """Networks with a given one as the chosen one."""

    def __init__(self, features: Features, dataset: Dataset, cache_dir: Path) -> None:
        super().__init__({}, dataset, cache_dir, CPU)
        self.chosen = features

    def classifier(self) -> Features:
        return self.chosen


def measured(
    metrics,
    features: Features,
    images: Tensor,
    dataset: Dataset,
    cache_dir: Path,
    labels: Tensor | None = None,
    split: Literal["train", "val"] = "train",
    stats: str | None = None,
    batch_size: int = 33,
    made: dict | None = None,
    **settings,
) -> Report:
    """What an evaluation of images finds."""
    given = ExternalImages(MemoryImages(images, labels), dataset.class_names if labels is not None else None)
    return evaluate(
        metrics,
        Through(features, dataset, cache_dir),
        GivenSamples(given, dataset.class_names, made or {}, "samples"),
        DatasetReference(dataset, split=split, stats=stats),
        batch_size=batch_size,
        **settings,
    ).report


def array_rows(features: Tensor) -> Rows:
    return Rows(features.float().numpy())


class AsSeen(FeatureView):
    """Features of samples and of real images that are there already."""

    def __init__(self, samples: Tensor, real: Tensor, other: Tensor | None = None) -> None:
        self.network = Projection()
        self.network.dim = samples.shape[1]
        self._samples = array_rows(samples)
        given = ExternalImages(
            MemoryImages(torch.empty(len(samples), 1, 1, 1, dtype=torch.uint8), None), None
        )
        self.samples = GivenSamples(given, None, {}, "samples")
        self.real = RealRows(real, other)

    def rows(self) -> Rows:
        return self._samples


class RealRows(RealImages):
    def __init__(self, real: Tensor, other: Tensor | None) -> None:
        self._parts = {"images": real, "other": other}
        self.reference = DatasetReference(
            Held(pixels(9, 0), pixels(9 if other is not None else 0, 1)), split="train", stats=None
        )

    def rows(self, part="images") -> Rows:
        return array_rows(self._parts[part])

    def moments(self, part="images", count=None, stream="features") -> Moments:
        return moments_of(self._parts[part][:count])

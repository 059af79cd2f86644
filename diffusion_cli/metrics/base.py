"""What a metric is: a measurement that sees all samples go by once."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_cli.data import Dataset, Images
from diffusion_cli.data.base import Split
from diffusion_cli.metrics.features.base import FeatureBatch, Features
from diffusion_cli.metrics.features.registry import FeatureExtractors
from diffusion_cli.metrics.reference import RealImages
from diffusion_cli.metrics.rows import GrowingRows, Rows
from diffusion_cli.metrics.samples import Samples
from diffusion_cli.runs.load import LoadedDenoiser


@dataclass(frozen=True)
class MetricValue:
    """What was measured, and what must be known to compare it."""

    name: str
    """Of the number in reports."""
    value: float | None
    """None where there is no number, and the notes say why."""
    details: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name, in the order to show them in."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the metric that the value depends on, as plain data."""
    notes: tuple[str, ...] = ()
    pictures: Mapping[str, list[Tensor]] = field(default_factory=dict)
    """Pictures that belong to it by name: their rows of images, uint8 [n, C, H, W]."""
    higher_is_better: bool = False


class SampleBatch(NamedTuple):
    """A batch of samples, and what a network says of it."""

    images: Tensor
    """uint8 [B, C, H, W], on the CPU."""
    labels: Tensor | None
    """The classes that they were made as, int64 [B], if they were."""
    seen: FeatureBatch


class FeatureView:
    """The samples and the real images as one network sees them.

    What a metric asks for at its beginning is kept, on disk, for all of them: rows of features and of class scores.
    """

    def __init__(
        self, network: Features, real: RealImages, samples: Samples, dataset: Dataset, cache_dir: Path
    ) -> None:
        self.network, self.real, self.samples, self.cache_dir = network, real, samples, cache_dir
        self.class_names = dataset.class_names
        self._rows: GrowingRows | None = None
        self._logits: GrowingRows | None = None

    def rows(self) -> Rows:
        """The features of the samples, which are all there after the pass."""
        if self._rows is None:
            self._rows = GrowingRows(self.network.dim, self.cache_dir)
        return self._rows

    def logits(self) -> Rows:
        """The class scores of the samples, which are all there after the pass."""
        if self._logits is None:
            self._logits = GrowingRows(self.network.classes, self.cache_dir)
        return self._logits

    def update(self, batch: FeatureBatch) -> None:
        """Keep of a batch what was asked for."""
        if self._rows is not None:
            self._rows.append(batch.features)
        if self._logits is not None:
            assert batch.logits is not None
            self._logits.append(batch.logits)


class MetricState(ABC):
    """One metric at work: it is shown every batch of samples, and then asked for its findings."""

    def update(self, batch: SampleBatch) -> None:  # noqa: B027 - nothing to do for a metric that asked for rows
        """Take in B more samples."""

    @abstractmethod
    def compute(self) -> list[MetricValue]:
        """The results for all samples; none where there was nothing to measure."""


class Metric(ABC):
    """A number that says how good samples are."""

    keeps_rows: bool = False
    """Whether it asks for the features of all images, samples and real ones."""
    split: Split | None = None
    """Of real images, where it looks at an autoencoder's reconstructions of them, and at no other samples."""

    def network(self, networks: FeatureExtractors) -> Features:
        """The network that it looks through: the evaluation's own, unless a metric is defined on another."""
        return networks.chosen

    @abstractmethod
    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        """Raise UsageError if `count` samples are too few, or with `force` where one can, return warnings."""

    @abstractmethod
    def init_state(self, seen: FeatureView) -> MetricState:
        """Start on a set of samples; what is needed of real images is computed now."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A trained model to be measured on real images, and how."""

    model: LoadedDenoiser
    dataset: Dataset
    folder: Path
    """The run's."""
    device: torch.device
    seed: int
    batch_size: int
    clip: bool
    """Whether predicted images are kept in [-1, 1]."""
    precision: str

    def batch(self, images: Images, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Some of the images, and their labels if the model is told them, on the model's device."""
        rows = rows.to(images.device)
        labels = None
        if self.model.num_classes is not None and images.labels is not None:
            labels = images.labels[rows].to(self.device)
        return images[rows].to(self.device), labels


class ModelMetric(ABC):
    """A number that says how well a model knows real images; no samples are made for it."""

    @abstractmethod
    def measure(self, subject: EvaluatedModel) -> MetricValue | None:
        """The number for a model."""

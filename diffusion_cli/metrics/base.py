"""What a metric is: a measurement that sees the features of all samples go by once."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_cli.checkpoint import Model
from diffusion_cli.data import Dataset, Images
from diffusion_cli.metrics.features import FeatureBatch, Features
from diffusion_cli.metrics.real import RealImages


class Finding(NamedTuple):
    """What was measured, and what must be known to compare it."""

    value: float | None
    """None where there is no number, and the notes say why."""
    details: Mapping[str, float]
    """Further numbers by name, in the order to show them in."""
    protocol: Mapping[str, Any]
    """The settings of the metric that the value depends on, as plain data."""
    notes: tuple[str, ...] = ()


class Measurement(ABC):
    """One metric at work: it is told of every batch of samples, and then asked for its finding."""

    @abstractmethod
    def update(self, batch: FeatureBatch, labels: Tensor | None) -> None:
        """Take in B more samples, with the classes (int64 [B]) they were made as, if they were."""

    @abstractmethod
    def finding(self) -> Finding | None:
        """The result for all samples taken in, or None where they had nothing to measure."""


@dataclass(frozen=True)
class Subject:
    """A trained model to be measured on real images, and how."""

    model: Model
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
        return images.gather(rows).to(self.device), labels


class ModelMetric(ABC):
    """A number that says how well a model knows real images; no samples are made for it."""

    name: str
    """Of the number in reports."""

    @abstractmethod
    def measure(self, subject: Subject) -> Finding | None:
        """The number for a model."""


class Metric(ABC):
    """A number that says how good samples are, given features of them and of real images."""

    @abstractmethod
    def title(self, features: Features) -> str:
        """The name of the number in reports; only Inception's features give the published names."""

    @abstractmethod
    def check(self, count: int, real: RealImages, force: bool) -> list[str]:
        """Raise ValueError if `count` samples are too few, or with `force` where one can, return warnings."""

    @abstractmethod
    def begin(self, real: RealImages) -> Measurement:
        """Start on a set of samples; what is needed of real images is computed now."""

"""Base classes of metrics, which are computed in one pass over all samples."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.config.values import Clip
from diffusion_cli.data import Dataset, Images, to_model_range
from diffusion_cli.data.base import Split
from diffusion_cli.data.conditioned import lacking
from diffusion_cli.data.sources import conditions_digest
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import SampleFormat
from diffusion_cli.metrics.features.base import FeatureBatch, Features
from diffusion_cli.metrics.features.registry import FeatureExtractors
from diffusion_cli.metrics.reference import RealImages
from diffusion_cli.metrics.rows import GrowingRows, Rows
from diffusion_cli.metrics.samples import Samples
from diffusion_cli.runs.load import LoadedDenoiser
from diffusion_cli.system.downloads import PublishedFile


class MetricPicture(NamedTuple):
    """A figure of a metric."""

    rows: list[Tensor]
    """Rows of images, uint8 [n, C, H, W]."""
    names: tuple[str, ...] = ()
    """Names of the first rows, which repeat for the others."""
    columns: tuple[tuple[str, ...], ...] = ()
    """Words above the images of each group of `len(names)` rows."""
    title: str = ""


@dataclass(frozen=True)
class MetricValue:
    """Value of a metric with the settings needed to compare it."""

    name: str
    """Name of the value in reports."""
    value: float | None
    """The value; None if it cannot be computed, with the reason in `notes`."""
    details: Mapping[str, float] = field(default_factory=dict)
    """Additional values by name, in display order."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the metric that the value depends on, as plain data."""
    notes: tuple[str, ...] = ()
    pictures: Mapping[str, MetricPicture] = field(default_factory=dict)
    """Figures by name."""
    higher_is_better: bool = False


class SampleBatch(NamedTuple):
    """A batch of samples with its features."""

    images: Tensor
    """uint8 [B, C, H, W], on the CPU."""
    labels: Tensor | None
    """Class labels of the samples, int64 [B], or None."""
    seen: FeatureBatch
    condition: Condition | None = None
    """Conditions by which the samples were made, on the CPU; with class labels alone, these; None without any."""
    texts: Sequence[str | None] | None = None
    """Texts by which the samples were made, None for one without; None without texts."""
    stored: Tensor | None = None
    """Stored samples [B, *shape] on the CPU if a metric uses them and the format is known, else None."""


class FeatureView:
    """Samples and real images through one feature network.

    Features and class scores of all samples are stored on disk if a metric requests them before the pass.
    """

    def __init__(
        self, network: Features, real: RealImages, samples: Samples, dataset: Dataset, cache_dir: Path
    ) -> None:
        self.network, self.real, self.samples, self.cache_dir = network, real, samples, cache_dir
        self.dataset, self.class_names = dataset, dataset.class_names
        self._rows: GrowingRows | None = None
        self._logits: GrowingRows | None = None

    def rows(self) -> Rows:
        """Return the features of the samples, complete after the pass."""
        if self._rows is None:
            self._rows = GrowingRows(self.network.dim, self.cache_dir)
        return self._rows

    def logits(self) -> Rows:
        """Return the class scores of the samples, complete after the pass."""
        if self._logits is None:
            self._logits = GrowingRows(self.network.classes, self.cache_dir)
        return self._logits

    def update(self, batch: FeatureBatch) -> None:
        """Store the requested parts of a batch."""
        if self._rows is not None:
            self._rows.append(batch.features)
        if self._logits is not None:
            assert batch.logits is not None
            self._logits.append(batch.logits)


class MetricState(ABC):
    """State of a metric during the pass over samples: `update` per batch, then `compute`."""

    def update(self, batch: SampleBatch) -> None:  # noqa: B027 - optional for metrics that read stored rows
        """Add a batch of samples."""

    @abstractmethod
    def compute(self) -> list[MetricValue]:
        """Return the values over all samples; empty if there is nothing to measure."""


class Metric(ABC):
    """Base class of metrics of samples."""

    uses_features: bool = True
    """Whether the metric uses a feature network; without such a metric, none is loaded or trained."""
    uses_stored: bool = False
    """Whether the metric uses stored samples, `SampleBatch.stored`, which are not rounded to 8 bits."""
    keeps_rows: bool = False
    """Whether the metric stores the features of all samples and real images."""
    split: Split | None = None
    """Split that a metric of autoencoders reconstructs; None for other metrics."""

    def uses_previews(self, form: SampleFormat) -> bool:
        """Return whether the metric uses 8-bit previews of samples of a format."""
        return not self.uses_stored

    def network(self, networks: FeatureExtractors) -> Features:
        """Return the feature network: the one of the evaluation, unless the metric is defined on another or none."""
        return networks.chosen if self.uses_features else networks.pixels

    def downloads(self) -> Sequence[PublishedFile]:
        """Return the published files that the metric needs, apart from those of `features=`."""
        return []

    @abstractmethod
    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        """Check the number of samples and return warnings.

        Raises UsageError if `count` is too small; with `force`, warns instead where possible.
        """

    @abstractmethod
    def init_state(self, seen: FeatureView) -> MetricState:
        """Prepare a pass over samples, including all statistics of real images."""


@dataclass(frozen=True)
class EvaluatedModel:
    """Trained model and settings for metrics of models."""

    model: LoadedDenoiser
    dataset: Dataset
    """Dataset of the images, with the condition images and texts of the model."""
    folder: Path
    """Folder of the run."""
    device: torch.device
    seed: int
    batch_size: int
    clip: Clip
    """Whether predicted images are clipped to [-1, 1]."""
    precision: str

    def load(self, split: Split) -> Images:
        """Return a split of the dataset, for `batch` and `identity`.

        Raises UsageError if its images lack conditions of the model, or have other classes. Images may lack classes.
        """
        images = self.dataset.load(split)
        self._check(images)
        return images

    def batch(self, images: Images, rows: Tensor) -> tuple[Tensor, Condition | None]:
        """Return rows of images of `load`, and their conditions if the model has any, on the model's device.

        Images without classes have no condition for a model of classes alone.
        """
        pixels = images[rows.to(images.device)].to(self.device)
        if not self.model.denoiser.conditions.names:
            return pixels, None
        return pixels, images.condition(rows, to_model_range(pixels))

    def identity(self, images: Images) -> dict[str, str]:
        """Return digests of images and of their conditions, on which the results depend, for the protocol."""
        # The digest of the images covers the class labels.
        return {"images_sha256": images.digest(), **self.of_conditions(images)}

    def of_conditions(self, images: Images) -> dict[str, str]:
        """Return the digest of the conditions of images that the model gets; empty for classes alone."""
        conditions = self.model.denoiser.conditions
        used = {name: source for name, source in images.conditions.items() if name in conditions.names}
        found = None if conditions.only_classes else conditions_digest(None, used)
        return {} if found is None else {"conditions_sha256": found}

    def _check(self, images: Images) -> None:
        """Raise UsageError if images lack conditions of the model, or have other classes."""
        conditions, names = self.model.denoiser.conditions, self.model.info.class_names
        if conditions.only_classes:
            if conditions.names and images.labels is not None and self.dataset.class_names != names:
                raise UsageError(
                    "dataset",
                    self.dataset.name,
                    "has other classes than the model",
                    "use the dataset of the run",
                )
        elif lacks := lacking(conditions, self.dataset, images):
            problem = f"has no {' or '.join(lacks)} of the model, on which it is conditioned"
            remedy = "use the dataset of the run, with its captions and attributes"
            raise UsageError("dataset", self.dataset.name, problem, remedy)


class ModelMetric(ABC):
    """Base class of metrics of a model on real images, without samples."""

    @abstractmethod
    def measure(self, subject: EvaluatedModel) -> MetricValue | None:
        """Return the value for a model, or None if it is not applicable."""

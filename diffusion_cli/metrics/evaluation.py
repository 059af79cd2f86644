"""One pass over samples, for all metrics at once."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from diffusion_cli.data import Dataset
from diffusion_cli.metrics.base import Finding, Measurement, Metric, ModelMetric, Subject
from diffusion_cli.metrics.features import FeatureBatch, Features
from diffusion_cli.metrics.protocol import Report, Result
from diffusion_cli.metrics.real import RealImages

Samples = Tensor | tuple[Tensor, Tensor | None]
"""uint8 images [B, C, H, W], maybe with the classes (int64 [B]) they were made as."""


def evaluate(
    metrics: Mapping[str, Metric],
    features: Features,
    sample_batches: Iterable[Samples],
    dataset: Dataset,
    cache_dir: Path,
    *,
    count: int | None = None,
    sampling: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Report:
    """Measure samples by every metric, taking features of each sample once and keeping no image.

    `count` is the number of samples to come, if known: what is wrong with it is then said before the first
    is made. `sampling` is plain data on how they were made, for the protocol. Statistics of real images are
    kept in `cache_dir`. If the features know the classes, the share of labelled samples that are taken for
    what they were made as is reported too.

    Raises ValueError if samples are too few for a metric (with `force`, a warning in the report where that
    is possible), have another shape than the dataset's images, or are not uint8.
    """
    real = RealImages(dataset, features, cache_dir)
    if count is not None:
        for metric in metrics.values():
            metric.check(count, real, force)
    measurements = [(metric.title(features), metric.begin(real)) for metric in metrics.values()]
    if features.knows_labels:
        measurements.append(("class_accuracy", ClassAccuracy(features.held_out_accuracy)))
    number = _take_in(sample_batches, count, dataset, features, [item for _, item in measurements])

    notes = [features.note] if features.note else []
    for metric in metrics.values():
        notes += metric.check(number, real, force)
    common = _protocol(number, features, dataset)
    made = {} if sampling is None else {"sampling": dict(sampling)}
    results = []
    for name, measurement in measurements:
        finding = measurement.finding()
        if finding is not None and finding.value is not None:
            protocol = {**common, **finding.protocol, **made}
            results.append(Result(name, finding.value, dict(finding.details), protocol))
            notes += finding.notes
    return Report(results, list(dict.fromkeys(notes)))


def examine(metrics: Iterable[ModelMetric], subject: Subject, about: Mapping[str, Any]) -> Report:
    """Measure a model itself; `about` is plain data on it, for the protocol."""
    results, notes = [], []
    for metric in metrics:
        finding = metric.measure(subject)
        if finding is None:
            continue
        notes += finding.notes
        if finding.value is not None:
            protocol = {**finding.protocol, "dataset": subject.dataset.name, "model": dict(about)}
            results.append(Result(metric.name, finding.value, dict(finding.details), protocol))
    return Report(results, notes)


def _take_in(
    batches: Iterable[Samples],
    count: int | None,
    dataset: Dataset,
    features: Features,
    measurements: list[Measurement],
) -> int:
    """Show every batch to every measurement; the number of samples."""
    number = 0
    with tqdm(total=count, desc="evaluating samples", unit="image", delay=1.0) as progress:
        for batch in batches:
            images, labels = batch if isinstance(batch, tuple) else (batch, None)
            if images.shape[1:] != dataset.shape:
                raise ValueError(
                    f"dataset={dataset.name}: its images are {dataset.shape}, and the samples "
                    f"{tuple(images.shape[1:])}; compare with the dataset the model was trained on"
                )
            seen = features(images)
            for measurement in measurements:
                measurement.update(seen, labels)
            number += len(images)
            progress.update(len(images))
    return number


def _protocol(number: int, features: Features, dataset: Dataset) -> dict[str, Any]:
    return {
        "samples": number,
        "shape": list(dataset.shape),
        "features": {
            "name": features.name,
            "dim": features.dim,
            "digest": features.digest,
            "resize": features.resize,
        },
    }


class ClassAccuracy(Measurement):
    """The share, 0 to 1, of labelled samples that the network takes for the class they were made as."""

    def __init__(self, held_out_accuracy: float | None) -> None:
        self.held_out_accuracy = held_out_accuracy
        self.correct = self.labelled = 0

    def update(self, batch: FeatureBatch, labels: Tensor | None) -> None:
        if labels is not None:
            self.correct += int((batch.logits.argmax(1) == labels.to(batch.logits.device)).sum())
            self.labelled += len(labels)

    def finding(self) -> Finding | None:
        if self.labelled == 0:
            return None
        real = {} if self.held_out_accuracy is None else {"on_real_held_out": self.held_out_accuracy}
        return Finding(self.correct / self.labelled, {"labelled": self.labelled, **real}, {})

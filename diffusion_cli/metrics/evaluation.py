"""Evaluation of all metrics in one pass over the samples."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from diffusion_cli.conditions import Condition
from diffusion_cli.data import PixelDigest
from diffusion_cli.data.base import Split
from diffusion_cli.data.class_shares import differing_shares
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.base import (
    EvaluatedModel,
    FeatureView,
    Metric,
    MetricPicture,
    MetricState,
    MetricValue,
    ModelMetric,
    SampleBatch,
)
from diffusion_cli.metrics.features.base import Features
from diffusion_cli.metrics.features.registry import FeatureExtractors
from diffusion_cli.metrics.protocol import Report, Result
from diffusion_cli.metrics.reference import RealImages, Reference
from diffusion_cli.metrics.samples import Samples
from diffusion_cli.samplers import Advance
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.progress import ProgressBar


class Evaluation(NamedTuple):
    """Result of an evaluation."""

    report: Report
    pictures: dict[str, MetricPicture]
    """Figures by name."""
    first: dict[str, MetricValue]
    """First value of each metric, by the metric's name in the configuration."""


class EvaluationCancelled(Exception):
    """An evaluation was stopped before its end."""


def evaluate(
    metrics: Mapping[str, Metric],
    networks: FeatureExtractors,
    samples: Samples,
    reference: Reference,
    *,
    batch_size: int,
    force: bool = False,
    environment: Mapping[str, Any] | None = None,
    called_off: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Evaluate samples with all metrics in one pass, computing each feature network once per sample.

    Memory use does not grow with the number of samples. With several processes, each computes every n-th batch; the
    first one returns the report, the others an empty report. Statistics of real images are cached.

    Args:
        metrics: metrics by name.
        networks: feature networks, with the dataset and the cache folder.
        samples: samples to evaluate.
        reference: real images to compare with.
        batch_size: samples per batch and process.
        force: whether too few samples give warnings where possible, instead of an error.
        environment: software and hardware as plain data, for the protocol.
        called_off: callback, called by all processes before each round of batches, that returns True to stop.

    Raises:
        EvaluationCancelled: `called_off` returned True.
        UsageError: there are too few samples for a metric, or they differ in shape from the real images. This is
            checked before any sample is generated.
    """
    ranks = Distributed()
    seen, notes = require(metrics, networks, samples, reference, force)
    views = list(dict.fromkeys(seen.values()))
    # Metrics that store features first: the others reuse their real features.
    order = sorted(metrics, key=lambda name: not metrics[name].keeps_rows)
    states = {name: metrics[name].init_state(seen[name]) for name in order}
    shown_to = [[states[name] for name in metrics if seen[name] is view] for view in views]
    with_stored = any(metric.uses_stored for metric in metrics.values())
    digest, labels = _pass(
        samples, batch_size, list(zip(views, shown_to, strict=True)), ranks, called_off, with_stored
    )
    if not ranks.is_main:
        return Evaluation(Report([], []), {}, {})

    made = {
        "sampling": {**samples.protocol(), "pixels_sha256": digest},
        "environment": dict(environment or {}),
    }
    results, pictures, first = [], {}, {}
    for name in metrics:
        common = _protocol(samples, seen[name].network)
        for finding in states[name].compute():
            first.setdefault(name, finding)
            notes += finding.notes
            pictures |= finding.pictures
            results += _result(finding, {**common, **finding.protocol, **made})
    notes += samples.notes()
    if any("reference" in result.protocol for result in results):
        notes += _class_notes(samples, labels, reference)
    return Evaluation(Report(results, list(dict.fromkeys(notes))), pictures, first)


def require(
    metrics: Mapping[str, Metric],
    networks: FeatureExtractors,
    samples: Samples,
    reference: Reference,
    force: bool,
) -> tuple[dict[str, FeatureView], list[str]]:
    """Return the view of each metric, and warnings; UsageError if a metric is impossible, as `evaluate`."""
    dataset, cache_dir, ranks = networks.dataset, networks.cache_dir, Distributed()
    if samples.shape != dataset.shape:
        raise UsageError(
            "dataset",
            dataset.name,
            f"its images have shape {dataset.shape}, but the samples {samples.shape}",
            "compare with the dataset the model was trained on",
        )
    seen: dict[str, FeatureView] = {}
    for name, metric in metrics.items():
        network = ranks.main_first(lambda metric=metric: metric.network(networks))
        view = FeatureView(
            network, RealImages(reference, network, cache_dir, ranks), samples, dataset, cache_dir
        )
        seen[name] = next((other for other in seen.values() if other.network is network), view)
    warnings = [
        note for name, metric in metrics.items() for note in metric.check(len(samples), seen[name], force)
    ]
    networks_of = dict.fromkeys(view.network for view in seen.values())
    for network in networks_of:  # may train a network, so only after all checks
        ranks.main_first(network.prepare)
    return seen, [*(network.note for network in networks_of if network.note), *warnings]


def evaluate_model(
    metrics: Iterable[ModelMetric],
    subject: EvaluatedModel,
    record: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> Report:
    """Evaluate metrics of a model on real images.

    Args:
        metrics: the metrics.
        subject: the model and its settings.
        record: description of the model for the protocol.
        environment: software and hardware as plain data, for the protocol.
    """
    results, notes = [], []
    for metric in metrics:
        finding = metric.measure(subject)
        if finding is not None:
            notes += finding.notes
            model = {"dataset": subject.dataset.name, "model": dict(record), "environment": dict(environment)}
            results += _result(finding, {**finding.protocol, **model})
    return Report(results, notes)


def conditions_of(metrics: Iterable[ModelMetric], subject: EvaluatedModel) -> dict[str, Any]:
    """Return the identity of the conditions on which metrics of a model depend, as plain data.

    Empty for a model of classes alone, as in earlier versions.
    """
    chosen: set[Any] = {getattr(metric, "split", None) for metric in metrics}
    splits: list[Split] = [split for split in get_args(Split) if split in chosen]
    found = {split: subject.of_conditions(subject.dataset.load(split)) for split in splits}
    return {"conditions": found} if any(found.values()) else {}


def _pass(
    samples: Samples,
    batch_size: int,
    views: Sequence[tuple[FeatureView, list[MetricState]]],
    ranks: Distributed,
    called_off: Callable[[], bool],
    with_stored: bool,
) -> tuple[str, Counter[int]]:
    """Compute the features of every batch and update the metrics, in order.

    Returns the SHA-256 of all images, and the number of samples per label.
    """
    digest, labels, count = PixelDigest(), Counter[int](), len(samples)
    each_round = batch_size * ranks.world
    with ProgressBar(
        total=count, desc="evaluating samples", unit="image", delay=1.0, disable=not ranks.is_main
    ) as progress:
        for place, mine in enumerate(ranks.shard(count, batch_size)):
            if called_off():
                raise EvaluationCancelled
            with progress.batch(min(each_round, count - place * each_round)) as advance:
                networks = [view.network for view, _ in views]
                looked = _look(samples, mine, networks, ranks, advance, with_stored) if mine else None
                gathered = ranks.gather(looked)
            for batches in gathered:
                if batches is None:
                    continue
                for (view, measurements), batch in zip(views, batches, strict=True):
                    view.update(batch.seen)
                    for measurement in measurements:
                        measurement.update(batch)
                digest.update(batches[0].images)
                if batches[0].labels is not None:
                    labels.update(label for label in batches[0].labels.tolist() if label >= 0)
    return digest.hexdigest(), labels


def _class_notes(samples: Samples, labels: Counter[int], reference: Reference) -> list[str]:
    """Return a note if the class shares of the samples differ from those of the reference."""
    names = samples.class_names
    if not labels or names is None:
        return []
    wanted = reference.class_counts(names)
    if wanted is None:
        return []
    found = differing_shares([labels[label] for label in range(len(names))], wanted, names)
    if found is None:
        return []
    name, share, expected = found
    return [
        f"class shares: class {name} has a share of {share:.3g} in the samples and {expected:.3g} in "
        f"{reference.name}; this difference is part of the distance"
    ]


def _look(
    samples: Samples,
    numbers: range,
    networks: Sequence[Features],
    ranks: Distributed,
    advance: Advance,
    with_stored: bool,
) -> list[SampleBatch]:
    """Return samples with the features of each network, on the CPU if sent between processes."""
    images, labels = samples.batch(numbers, advance)
    said = [network(images) for network in networks]
    images, labels = images.cpu(), None if labels is None else labels.cpu()
    condition = samples.condition_of(numbers) or (None if labels is None else Condition.of(labels))
    condition = None if condition is None else condition.to("cpu")
    texts, stored = samples.texts_of(numbers), None
    if with_stored and samples.latest is not None:
        stored = samples.latest.cpu()
    return [
        SampleBatch(images, labels, batch if ranks.world == 1 else batch.cpu(), condition, texts, stored)
        for batch in said
    ]


def _result(finding: MetricValue, protocol: Mapping[str, Any]) -> list[Result]:
    if finding.value is None:
        return []
    return [Result(finding.name, finding.value, dict(finding.details), dict(protocol))]


def _protocol(samples: Samples, features: Features) -> dict[str, Any]:
    return {
        "samples": len(samples),
        "shape": list(samples.shape),
        "features": {
            "name": features.name,
            "dim": features.dim,
            "digest": features.digest,
            "resize": features.resize,
            "precision": features.precision,
        },
    }

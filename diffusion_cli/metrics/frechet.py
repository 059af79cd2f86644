"""Frechet distance of features (FID) and its variants."""

import numpy as np
import torch
from pydantic import NonNegativeInt
from torch import Tensor

from diffusion_cli.data import spread
from diffusion_cli.errors import Problem, UsageError
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue, SampleBatch
from diffusion_cli.metrics.features.base import Features
from diffusion_cli.metrics.features.registry import FeatureExtractors
from diffusion_cli.metrics.kernel import suggested_subset
from diffusion_cli.metrics.moments import Moments
from diffusion_cli.metrics.reference import Stream
from diffusion_cli.metrics.rows import Rows
from diffusion_cli.system import pretrained
from diffusion_cli.system.files import file_digest
from diffusion_cli.system.progress import ProgressBar

IMAGES_NEEDED = "images_needed"
"""Detail of a biased distance: the least number of samples and of real images for one that is not."""
MOST_SUBSETS = 10
"""Maximum number of disjoint subsets of samples; their mean distance is compared with the reference distance.

A single subset is noisy: for 359 of 2,000 samples of digits, distances of 0.7 to 1.0 vary by 0.2.
"""


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Return the squared Frechet (2-Wasserstein) distance of two Gaussians, at least 0.

    `|mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1^1/2 sigma2 sigma1^1/2)^1/2`

    The last trace is computed as the sum of the singular values of A1^T A2, where sigma = A A^T. This is more
    accurate than the square roots of eigenvalues of sigma1 sigma2, which turn rounding errors of 1e-16 into 1e-8.

    Args:
        mu1: mean, float64 [d].
        sigma1: covariance, float64 [d, d].
        mu2: mean, float64 [d].
        sigma2: covariance, float64 [d, d].

    Source: Dowson and Landau 1982; Heusel et al. 2017, Eq. 6.
    """
    return _distance(mu1, sigma1, mu2, sigma2, _root(sigma2))


def _distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor, root2: Tensor) -> float:
    overlap = torch.linalg.svdvals(_root(sigma1).T @ root2).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap
    return max(float(distance), 0.0)


def _root(sigma: Tensor) -> Tensor:
    """Return A [d, rank] with A A^T = sigma, ignoring eigenvalues that are zero up to rounding."""
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


class FrechetDistance(Metric):
    """Frechet distance between samples and real images in feature space: FID with Inception features.

    Args:
        reference_distance: whether to report the distance between the training and the validation split, which a
            perfect model would reach. Because the distance depends on the number of images, both distances are also
            reported for an equal number of samples and real images. A model that copies training images is lower.
        infinity: number of subset sizes for extrapolation to infinitely many samples, at least 3; 0: none.
        bootstrap: number of resamples for a 95 % interval, at least 20; 0: none.

    Raises:
        UsageError: there are fewer samples or reference images than features + 1, so that the covariance does not
            have full rank.

    Source: Heusel et al. 2017; Chong and Forsyth 2020.
    """

    key = "fid"
    stream: Stream = "features"
    has_kernel_distance = True
    """Whether metric=kid evaluates the same samples, which needs fewer images."""

    def __init__(
        self, *, reference_distance: bool = True, infinity: NonNegativeInt = 0, bootstrap: NonNegativeInt = 0
    ) -> None:
        for key, value, least in (("infinity", infinity, 3), ("bootstrap", bootstrap, 20)):
            if 0 < value < least:
                raise UsageError(
                    f"metric.{self.key}.{key}", value, "is too small", f"use at least {least}, or 0 for none"
                )
        self.reference_distance, self.infinity, self.bootstrap = reference_distance, infinity, bootstrap

    def title(self, features: Features) -> str:
        """Return the name of the value in reports."""
        return {"inception": "fid", "dinov2": "fd_dinov2"}.get(features.name, f"frechet_{features.name}")

    def dim(self, features: Features) -> int:
        """Return the number of features; UsageError if the network lacks the features of this metric."""
        return features.dim

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        dim, reference = self.dim(seen.network), seen.real.reference
        if reference.stats is not None:
            reference.published(self.stream, dim)
        if self.infinity and max(dim + 1, count // 10) >= count:
            raise UsageError(
                f"metric.{self.key}.infinity",
                self.infinity,
                f"needs subsets of at least {dim + 1} samples, but there are only {count} samples",
                "raise num_samples, or set 0",
            )
        sets: list[tuple[str, str | int, int, str]] = [("num_samples", count, count, "raise num_samples")]
        if reference.stats is None:
            real = len(reference.images)
            remedy = "use more images"
            if self.has_kernel_distance:
                size = suggested_subset(min(count, real))
                remedy += f", or metric=kid metric.kid.subset_size={size} instead of {self.key}"
            sets.append(("reference", reference.name, real, remedy))
        problems, warnings = [], []
        for key, value, number, remedy in sets:
            if number > dim:
                continue
            wrong = (
                f"{number} images are fewer than the {dim + 1} needed for the covariance of {dim} features of "
                f"{seen.network.name}"
            )
            if number < 2 or not force:
                forced = "" if number < 2 else ", or set force=true for a biased value"
                problems.append(Problem(key, value, wrong, f"{remedy}{forced}"))
            warnings.append(f"{key}={value}: {wrong}, so the distance is biased and not comparable")
        if problems:
            raise UsageError.several(problems)
        return warnings

    def init_state(self, seen: FeatureView) -> MetricState:
        return FrechetState(self, seen)


class FrechetDistanceDINOv2(FrechetDistance):
    """Frechet distance of DINOv2 features (FD-DINOv2), independent of `features=`.

    Args:
        weights: DINOv2 weights, a folder or a name on the Hugging Face hub.
        reference_distance: see `FrechetDistance`.
        infinity: see `FrechetDistance`.
        bootstrap: see `FrechetDistance`.

    Source: Stein et al. 2023.
    """

    key = "fd_dinov2"

    def __init__(
        self,
        *,
        weights: str = "facebook/dinov2-large",
        reference_distance: bool = True,
        infinity: NonNegativeInt = 0,
        bootstrap: NonNegativeInt = 0,
    ) -> None:
        super().__init__(reference_distance=reference_distance, infinity=infinity, bootstrap=bootstrap)
        self.weights = weights

    def network(self, networks: FeatureExtractors) -> Features:
        return networks.of_metric(self.key, "dinov2", self.weights)

    def downloads(self) -> list[pretrained.HubFile]:
        return pretrained.files(self.weights, pretrained.NETWORK)


class SpatialFrechetDistance(FrechetDistance):
    """Spatial Frechet distance (sFID), of 7 channels of a 17x17 feature map of Inception.

    Args:
        reference_distance: see `FrechetDistance`.

    Source: Nash et al. 2021; Dhariwal and Nichol 2021.
    """

    key = "sfid"
    stream = "spatial"

    def __init__(self, *, reference_distance: bool = True) -> None:
        super().__init__(reference_distance=reference_distance, infinity=0, bootstrap=0)

    def title(self, features: Features) -> str:
        return "sfid"

    def dim(self, features: Features) -> int:
        if not features.spatial_dim:
            raise UsageError(
                "metric",
                "sfid",
                f"needs feature maps of Inception; features={features.name} has none",
                "use features=inception",
            )
        return features.spatial_dim


class FrechetState(MetricState):
    """Moments of all samples, and of disjoint subsets as large as the other real split."""

    def __init__(self, metric: FrechetDistance, seen: FeatureView) -> None:
        self.metric, self.seen, self.real = metric, seen, seen.real
        dim, stats = metric.dim(seen.network), seen.real.reference.stats
        moments = None if stats is not None else seen.real.moments(stream=metric.stream)
        if moments is None:
            self.mean, self.covariance = seen.real.reference.published(metric.stream, dim)
        else:
            self.mean, self.covariance = moments.mean, moments.covariance
        numbers = [len(seen.samples)] + ([] if moments is None else [moments.n])
        self.biased = min(numbers) <= dim
        self.root = _root(self.covariance)  # reused for all distances
        other = seen.real.reference.other if metric.reference_distance and stats is None else None
        enough = other is not None and len(other) > dim
        self.other = seen.real.moments("other", stream=metric.stream) if enough else None
        self.equal = self.other
        if self.other is not None and dim < len(seen.samples) < self.other.n:
            # Computed here because all processes take part; `compute` runs in the first process only.
            self.equal = seen.real.moments("other", len(seen.samples), metric.stream)
        number = 0 if self.other is None else min(self.other.n, len(seen.samples))
        count = min(len(seen.samples) // number, MOST_SUBSETS) if number else 0
        self.all, self.equal_sets = Moments(dim), [Moments(dim) for _ in range(count)]
        # Evenly spread over the samples, because files may be sorted by class.
        self.set_of = torch.full((len(seen.samples),), -1)
        self.set_of[spread(len(seen.samples), count * number)] = torch.arange(count * number) % max(count, 1)
        self.rows = seen.rows() if metric.infinity or metric.bootstrap else None

    def update(self, batch: SampleBatch) -> None:
        values = getattr(batch.seen, self.metric.stream)
        set_of = self.set_of[self.all.n : self.all.n + len(values)].to(values.device)
        self.all.update(values)
        for number, moments in enumerate(self.equal_sets):
            moments.update(values[set_of == number])

    def compute(self) -> list[MetricValue]:
        value, details, notes = self._distance(self.all), {}, []
        if self.rows is not None:
            details = self._extrapolated(self.rows) | self._interval(self.rows, value)
        if self.other is not None:
            more, notes = self._beside_real(value, self.other)
            details |= more
        elif self.metric.reference_distance and self.real.reference.stats is not None:
            notes = ["no reference distance: the reference has statistics, not images"]
        elif self.metric.reference_distance:
            notes = [f"no reference distance: there are too few real images besides {self.real.name()}"]
        if self.biased:
            details |= {IMAGES_NEEDED: len(self.mean) + 1}
        protocol = {"reference": self._reference()}
        return [MetricValue(self.metric.title(self.seen.network), value, details, protocol, tuple(notes))]

    def _reference(self) -> dict[str, object]:
        stats = self.real.reference.stats
        return self.real.protocol() if stats is None else {"stats": stats.name, "sha256": file_digest(stats)}

    def _beside_real(self, value: float, other: Moments) -> tuple[dict[str, float], list[str]]:
        """Return the distance between the real splits, and both distances for equal numbers of images, with notes."""
        reference = f"the {len(self.real.images())} of {self.real.name()}"
        reference_distance = self._distance(other)
        details = {"reference_distance": reference_distance, "reference_distance_images": other.n}
        details |= _ratio("ratio_to_reference", value, reference_distance)
        notes = [
            f"reference distance: {other.n} real images of {self.real.name('other')} against {reference}"
        ]
        number = self.equal_sets[0].n
        if number > len(self.mean) and self.equal is not None:
            values = [self._distance(each) for each in self.equal_sets] if number < self.all.n else [value]
            mean, reference_distance = float(np.mean(values)), self._distance(self.equal)
            details |= {
                "equal_size_images": number,
                "equal_size_sets": len(values),
                "equal_size_distance": mean,
            }
            details |= {"equal_size_deviation": float(np.std(values, ddof=1))} if len(values) > 1 else {}
            details |= {"equal_size_reference": reference_distance} | _ratio(
                "equal_size_ratio", mean, reference_distance
            )
            sets = f"mean over {len(values)} disjoint sets of " if len(values) > 1 else ""
            notes.append(
                f"equal_size: {sets}{number} samples, and {number} real images of {self.real.name('other')}, each "
                f"against {reference}"
            )
        return details, notes

    def _extrapolated(self, rows: Rows) -> dict[str, float]:
        """Return the limit of distances of subsets, fitted as linear in 1 / size, with slope and number of points."""
        points, count = self.metric.infinity, len(rows)
        if not points:
            return {}
        least = max(len(self.mean) + 1, count // 10)
        sizes = np.linspace(least, count, points).astype(int)
        random = np.random.RandomState(0)
        bar = ProgressBar(sizes, desc="extrapolating", unit="subset", delay=1.0, leave=False)
        values = [self._subset(rows, random.permutation(count)[:size]) for size in bar]
        slope, limit = np.polyfit(1 / sizes, values, 1)
        return {"at_infinity": float(limit), "at_infinity_slope": float(slope), "at_infinity_points": points}

    def _interval(self, rows: Rows, value: float) -> dict[str, float]:
        """Return the 2.5 and 97.5 percentiles of bootstrap distances, shifted so that their mean is the distance.

        A resample has fewer distinct samples, which biases its distance; only the spread is used.
        """
        count, random = len(rows), np.random.RandomState(0)
        if not self.metric.bootstrap:
            return {}
        bar = ProgressBar(
            range(self.metric.bootstrap), desc="resampling", unit="resample", delay=1.0, leave=False
        )
        values = np.array([self._subset(rows, np.sort(random.randint(count, size=count))) for _ in bar])
        low, high = np.percentile(values - values.mean(), [2.5, 97.5]) + value
        return {"low": float(low), "high": float(high), "standard_error": float(values.std(ddof=1))}

    def _subset(self, rows: Rows, order: np.ndarray) -> float:
        moments = Moments(len(self.mean))
        for block in rows.blocks(order):
            moments.update(block.to(self.seen.network.device))
        return self._distance(moments)

    def _distance(self, moments: Moments) -> float:
        return _distance(moments.mean, moments.covariance, self.mean, self.covariance, self.root)


def _ratio(name: str, value: float, reference: float) -> dict[str, float]:
    """Return value / reference under its name, or nothing if the real splits are identical."""
    return {name: value / reference} if reference > 0 else {}

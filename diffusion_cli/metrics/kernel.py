"""Kernel distances between samples and real images: KID and CMMD."""

import math

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue
from diffusion_cli.metrics.features.base import Features
from diffusion_cli.metrics.features.registry import FeatureExtractors
from diffusion_cli.metrics.rows import Rows
from diffusion_cli.system import pretrained
from diffusion_cli.system.progress import ProgressBar


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Return the unbiased squared MMD of x [m, d] and y [n, d] with the kernel `(x.y / d + 1)^3`; may be negative.

    sum_{i != j} k(x_i, x_j) / m (m - 1) + the same for y - 2 mean k(x_i, y_j), in float64.

    Source: Binkowski et al. 2018, Eq. 4 and Sec. 4.
    """
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1).pow(3)

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def suggested_subset(count: int) -> int:
    """Return the subset size to suggest for the smaller set of images: half of it, so that subsets differ."""
    return max(2, count // 2)


class KernelDistance(Metric):
    """Kernel distance between samples and real images in feature space: KID with Inception features.

    Reports the mean over pairs of random subsets, drawn as by torch-fidelity, their standard deviation `std`, and the
    standard error of the mean. Because subsets overlap, the error is `std sqrt(r / (1 - r) + 1 / subsets)`, where
    r = subset_size / M and M is the smaller number of images; there is none for r = 1.

    Args:
        subsets: number of subset pairs.
        subset_size: images per subset, at least 2.
        seed: seed of the subsets.

    Raises:
        UsageError: there are fewer images than `subset_size`.

    Source: Binkowski et al. 2018; Blom 1976 (incomplete means).
    """

    keeps_rows = True

    def __init__(
        self, *, subsets: PositiveInt = 100, subset_size: PositiveInt = 1000, seed: NonNegativeInt = 2020
    ) -> None:
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        sets = {"samples": count, seen.real.name(): len(seen.real.images())}
        name = min(sets, key=lambda key: sets[key])
        if sets[name] < self.subset_size or self.subset_size < 2:
            raise UsageError(
                "metric.kid.subset_size",
                self.subset_size,
                f"must be at least 2 and at most {sets[name]}, the number of images of {name}",
                f"use {suggested_subset(sets[name])}, or more images",
            )
        return []

    def init_state(self, seen: FeatureView) -> MetricState:
        return KernelState(self, seen)


class KernelState(MetricState):
    def __init__(self, metric: KernelDistance, seen: FeatureView) -> None:
        self.metric, self.seen = metric, seen
        self.samples, self.real = seen.rows(), seen.real.rows()

    def compute(self) -> list[MetricValue]:
        size, number = self.metric.subset_size, self.metric.subsets
        random = np.random.RandomState(self.metric.seed)
        values = []
        for _ in ProgressBar(range(number), desc="kernel distance", unit="subset", delay=1.0, leave=False):
            drawn = [
                rows[random.choice(len(rows), size, replace=False)].to(self.seen.network.device)
                for rows in (self.samples, self.real)
            ]
            values.append(polynomial_mmd(*drawn))
        share = size / min(len(self.samples), len(self.real))
        std = float(np.std(values))
        error = {"standard_error": std * math.sqrt(share / (1 - share) + 1 / number)} if share < 1 else {}
        protocol = {
            "subsets": number, "subset_size": size, "subset_seed": self.metric.seed,
            "reference": self.seen.real.protocol(),
        }  # fmt: skip
        details = error | {"std": std}
        return [MetricValue(self.seen.network.named("kid"), float(np.mean(values)), details, protocol)]


def gaussian_mmd(x: Rows, y: Rows, sigma: float, device: torch.device) -> float:
    """Return the squared MMD of two sets of features with the kernel `exp(-|x - y|^2 / 2 sigma^2)`, at least 0.

    This is the biased estimate: the mean of k over all pairs of x, plus that of y, minus twice that between both.

    Source: Jayasumana et al. 2024, Eq. 3.
    """

    def mean(a: Rows, b: Rows) -> float:
        total = 0.0
        for p in a.blocks():
            for q in b.blocks():
                squares = torch.cdist(p.to(device).double(), q.to(device).double()).square()
                total += float((-squares / (2 * sigma**2)).exp().sum())
        return total / (len(a) * len(b))

    return max(mean(x, x) + mean(y, y) - 2 * mean(x, y), 0.0)


class CLIPDistance(Metric):
    """MMD between samples and real images over CLIP features (CMMD).

    Does not assume Gaussian features, and depends little on the number of images.

    Args:
        weights: CLIP weights, a folder or a name on the Hugging Face hub.
        sigma: width of the Gaussian kernel; 10 as published.
        scale: factor of the value; 1000 as published.

    Source: Jayasumana et al. 2024.
    """

    keeps_rows = True

    def __init__(
        self,
        *,
        weights: str = "openai/clip-vit-large-patch14-336",
        sigma: PositiveFloat = 10.0,
        scale: PositiveFloat = 1000.0,
    ) -> None:
        self.weights, self.sigma, self.scale = weights, sigma, scale

    def network(self, networks: FeatureExtractors) -> Features:
        return networks.of_metric("mmd", "clip", self.weights)

    def downloads(self) -> list[pretrained.HubFile]:
        return pretrained.files(self.weights, pretrained.NETWORK)

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        return []

    def init_state(self, seen: FeatureView) -> MetricState:
        return CLIPDistanceState(self, seen)


class CLIPDistanceState(MetricState):
    def __init__(self, metric: CLIPDistance, seen: FeatureView) -> None:
        self.metric, self.seen = metric, seen
        self.samples, self.real = seen.rows(), seen.real.rows()

    def compute(self) -> list[MetricValue]:
        sigma, scale = self.metric.sigma, self.metric.scale
        value = scale * gaussian_mmd(self.samples, self.real, sigma, self.seen.network.device)
        protocol = {"sigma": sigma, "scale": scale, "reference": self.seen.real.protocol()}
        return [MetricValue("cmmd", value, {}, protocol)]

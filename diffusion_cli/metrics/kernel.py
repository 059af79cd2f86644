"""Distances of sets by a kernel: KID, and CMMD on CLIP's features."""

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
from diffusion_cli.system.progress import ProgressBar


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy of sets [m, d] and [n, d], kernel (x.y / d + 1)^3; may be negative.

    sum_{i != j} k(x_i, x_j) / m (m - 1) + the same of y - 2 mean k(x_i, y_j), in float64.
    Source: Binkowski et al. 2018, Eq. 4 and Sec. 4.
    """
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1).pow(3)

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


class KernelDistance(Metric):
    """The kernel distance between samples and real images, over features: KID, where they are Inception's.

    The mean over `subsets` pairs of random subsets of `subset_size` images, drawn as torch-fidelity does, their
    deviation (`std`, as torch-fidelity reports), and the standard error of the mean. With M the smaller number of
    images and r = m/M that is std sqrt(r / (1 - r) + 1 / subsets): subsets share images, so that their deviation is
    smaller than that of independent ones by a factor sqrt(1 - r). There is none for r = 1.

    Raises UsageError for fewer images than a subset has. Source: Binkowski et al. 2018; Blom 1976 (incomplete means).
    """

    keeps_rows = True

    def __init__(
        self, *, subsets: PositiveInt = 100, subset_size: PositiveInt = 1000, seed: NonNegativeInt = 2020
    ) -> None:
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        for name, number in (("samples", count), (seen.real.name(), len(seen.real.images()))):
            if number < self.subset_size or self.subset_size < 2:
                raise UsageError(
                    "metric.kid.subset_size",
                    self.subset_size,
                    f"must be 2 or more and at most the {number} images of {name}",
                    "change it, or take more images",
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
    """The squared maximum mean discrepancy of two sets, kernel exp(-|x - y|^2 / 2 sigma^2); at least 0.

    The mean of k over all pairs of x and of y, twice that over the pairs of both taken off, in float64.
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
    """The maximum mean discrepancy between samples and real images over CLIP's features: CMMD.

    The Gaussian kernel has the width `sigma`, and the number is multiplied by `scale`, as published (10 and 1000).
    It assumes no Gaussian features, and is biased little by their number. Source: Jayasumana et al. 2024.
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
        return networks.option("clip", weights=self.weights)

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

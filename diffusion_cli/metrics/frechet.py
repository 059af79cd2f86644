"""The Frechet distance of Gaussians fitted to features: FID, where the features are Inception's."""

from typing import Literal

import torch
from torch import Tensor

from diffusion_cli.data.base import Split
from diffusion_cli.metrics.base import Finding, Measurement, Metric
from diffusion_cli.metrics.features import FeatureBatch, Features
from diffusion_cli.metrics.moments import Moments
from diffusion_cli.metrics.real import RealImages


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """The squared Frechet (2-Wasserstein) distance of two Gaussians, at least 0.

    |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1^1/2 sigma2 sigma1^1/2)^1/2, for means [d] and
    covariances [d, d], all float64.

    With sigma = A A^T the last trace is the sum of the singular values of A1^T A2. Taking the square root
    of the product's eigenvalues instead would make 1e-8 of every 1e-16 that stands for a zero.

    Source: Dowson and Landau 1982; Heusel et al. 2017, Eq. 6.
    """
    overlap = torch.linalg.svdvals(_root(sigma1).T @ _root(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap
    return max(float(distance), 0.0)


def _root(sigma: Tensor) -> Tensor:
    """A [d, rank] with A A^T = sigma, where eigenvalues that rounding made out of zeros do not count."""
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


class FrechetDistance(Metric):
    """The Frechet distance between samples and one split of the real images, over features.

    With `floor`, the distance between the two real splits is reported beside it: that of a perfect model, but
    for the number of images, with which the distance falls. So both are given once more for equal numbers,
    the first m samples against m images of the other split. A model that copies training images goes below.

    Raises ValueError for fewer samples, or reference images, than features + 1, as their covariance has no
    full rank.

    Source: Heusel et al. 2017.
    """

    def __init__(self, *, reference: Literal["train", "held_out"], floor: bool) -> None:
        self.reference: Split = reference
        self.floor = floor

    def title(self, features: Features) -> str:
        return "fid" if features.name == "inception" else f"frechet_{features.name}"

    def check(self, count: int, real: RealImages, force: bool) -> list[str]:
        dim, images = real.features.dim, len(real.images(self.reference))
        warnings = []
        for key, value, number, remedy in (
            ("num_samples", count, count, "raise num_samples"),
            ("metric.fid.reference", self.reference, images, "take a larger split or dataset"),
        ):
            if number > dim:
                continue
            wrong = (
                f"{key}={value}: {number} images are fewer than the {dim + 1} that the covariance of {dim} "
                f"features of {real.features.name} needs"
            )
            if number < 2 or not force:
                forced = "" if number < 2 else ", or set force=true to have a biased number"
                raise ValueError(f"{wrong}; {remedy}{forced}")
            warnings.append(f"{wrong}, so the distance is biased and fit for no comparison")
        return warnings

    def begin(self, real: RealImages) -> Measurement:
        return FrechetMeasurement(real, self.reference, self.floor)


class FrechetMeasurement(Measurement):
    """The moments of all samples, and of as many first ones as the other real split has images."""

    def __init__(self, real: RealImages, reference: Split, floor: bool) -> None:
        self.real = real
        self.split: Split = reference
        self.other_split: Split = "held_out" if reference == "train" else "train"
        self.reference = real.moments(reference)
        self.floor = floor
        others = len(real.images(self.other_split)) if floor else 0
        self.other = real.moments(self.other_split) if others > real.features.dim else None
        self.all = Moments(real.features.dim)
        self.head = Moments(real.features.dim)

    def update(self, batch: FeatureBatch, labels: Tensor | None) -> None:
        self.all.update(batch.features)
        if self.other is not None:
            self.head.update(batch.features[: self.other.n - self.head.n])

    def finding(self) -> Finding:
        value = self._distance(self.all)
        details: dict[str, float] = {}
        notes: list[str] = []
        if self.other is not None:
            details, notes = self._beside_real(value, self.other)
        elif self.floor:
            notes = [f"no floor: {self.real.dataset.name}/{self.other_split} has too few images for one"]
        return Finding(value, details, {"reference": self.real.protocol(self.split)}, tuple(notes))

    def _beside_real(self, value: float, other: Moments) -> tuple[dict[str, float], list[str]]:
        """The distance between the real splits, then both distances for equal numbers of images."""
        name = self.real.dataset.name
        reference = f"the {self.reference.n} of {name}/{self.split}"
        floor = self._distance(other)
        details = {"floor": floor, "floor_images": other.n} | _ratio("ratio_to_floor", value, floor)
        notes = [f"floor: {other.n} real images of {name}/{self.other_split} against {reference}"]
        number = self.head.n
        if number > self.real.features.dim:
            if number < other.n:
                floor = self._distance(self.real.moments(self.other_split, number))
            if number < self.all.n:
                value = self._distance(self.head)
            details |= {
                "equal_size_images": number,
                "equal_size_distance": value,
                "equal_size_floor": floor,
            } | _ratio("equal_size_ratio", value, floor)
            notes.append(
                f"equal_size: the first {number} samples, and {number} real images of "
                f"{name}/{self.other_split}, each against {reference}"
            )
        return details, notes

    def _distance(self, moments: Moments) -> float:
        reference = self.reference
        return frechet_distance(moments.mean, moments.covariance, reference.mean, reference.covariance)


def _ratio(name: str, value: float, floor: float) -> dict[str, float]:
    """value / floor under its name, or nothing where the two real splits do not differ."""
    return {name: value / floor} if floor > 0 else {}

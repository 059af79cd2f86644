"""Memorization: samples that copy training images."""

import torch
from pydantic import PositiveInt
from torch import Tensor

from diffusion_cli.data import FEW_VAL
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.base import FeatureView, Metric, MetricPicture, MetricState, MetricValue
from diffusion_cli.metrics.neighbours import nearest
from diffusion_cli.metrics.reference import DatasetReference

COLUMNS = 16  # pairs in a row of the figure
SAME = 1e-6  # relative to the mean squared norm of features; smaller distances are rounding errors of equal images


class Memorization(Metric):
    """Fraction of samples, 0 to 1, that are nearer to a training image than any real validation image is.

    Distances are between features. Validation images that also are training images are left out; samples that are
    always count. Also reports the number of copies, `median_distance_ratio`, and a figure of the nearest samples with
    their training images and distances. The ratio divides the median distance of samples to their nearest training
    image by that of validation images; it is below 1 if samples concentrate around training images.

    The reference must be the training split. If it has no other split, each of its images is compared with the others.

    Args:
        pairs: number of samples in the figure.

    Raises:
        UsageError: the reference is not a training split, or too small.
    """

    keeps_rows = True

    def __init__(self, *, pairs: PositiveInt = 32) -> None:
        self.pairs = pairs

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        reference = seen.real.reference
        if isinstance(reference, DatasetReference) and reference.split != "train":
            raise UsageError(
                "reference.split",
                reference.split,
                "metric=memorization compares with training images",
                "set reference.split=train",
            )
        if len(seen.real.images()) < 2:
            raise UsageError("metric", "memorization", f"{seen.real.name()} has fewer than 2 images")
        return []

    def init_state(self, seen: FeatureView) -> MetricState:
        return MemorizationState(seen, self.pairs)


class MemorizationState(MetricState):
    def __init__(self, seen: FeatureView, pairs: int) -> None:
        self.seen, self.pairs = seen, pairs
        self.samples, self.train = seen.rows(), seen.real.rows()
        self.other = None if seen.real.reference.other is None else seen.real.rows("other")

    def compute(self) -> list[MetricValue]:
        seen = self.seen
        distances, which = nearest(
            self.samples, self.train, 1, seen.network.device, "nearest training images"
        )
        distances, real = distances[:, 0], self._real()
        same = SAME * float(
            torch.cat([block.double().square().sum(1) for block in self.train.blocks()]).mean()
        )
        copies, known = distances <= same, real <= same
        apart = real[~known]
        nearer = copies | (distances < apart.min()) if len(apart) else copies
        details = {
            "copies": int(copies.sum()),
            "nearer": int(nearer.sum()),
            "images": len(distances),
            "median_distance_ratio": float((distances.median() / real.median()).sqrt())
            if real.median() > 0
            else 1.0,
        }
        beside = seen.real.name() if self.other is None else seen.real.name("other")
        notes = [
            f"memorization: samples nearer to {seen.real.name()} than any of {len(apart)} images of {beside}"
        ]
        if known.any():
            notes.append(
                f"memorization: {int(known.sum())} images of {beside} also are training images, and are left out"
            )
        if len(apart) < FEW_VAL:
            notes.append(f"memorization: rough, because only {len(apart)} real images are compared")
        title = "feature distance of each pair"
        if len(apart):
            title += f"; smallest of real images: {float(apart.min().sqrt()):.3g}"
        order = distances.argsort(stable=True)[: self.pairs]
        return [
            MetricValue(
                seen.network.named("memorization"),
                float(nearer.double().mean()),
                details,
                {"reference": seen.real.protocol()},
                tuple(notes),
                {
                    "memorization": MetricPicture(
                        self._picture(order.tolist(), which[order, 0]),
                        ("sample", "training"),
                        tuple(
                            tuple(f"{distance:.3g}" for distance in part.sqrt().tolist())
                            for part in distances[order].split(COLUMNS)
                        ),
                        title,
                    )
                },
            )
        ]

    def _real(self) -> Tensor:
        """Return squared distances of images that are not memorized to their nearest training images."""
        device = self.seen.network.device
        if self.other is not None:
            return nearest(self.other, self.train, 1, device, "neighbours of validation images")[0][:, 0]
        return nearest(self.train, self.train, 2, device, "neighbours among training images")[0][:, 1]

    def _picture(self, samples: list[int], training: Tensor) -> list[Tensor]:
        """Return samples above their training images, in rows of COLUMNS, nearest first."""
        images = self.seen.samples.batch(samples)[0].cpu()
        beneath = self.seen.real.images()[training].cpu()
        lines = zip(images.split(COLUMNS), beneath.split(COLUMNS), strict=True)
        return [row for pair in lines for row in pair]

"""LPIPS distances: diversity of samples of a class, or distance of samples to their originals."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue, SampleBatch
from diffusion_cli.metrics.features.base import FeatureBatch, Features
from diffusion_cli.metrics.features.lpips import LPIPSDistance, published_backbone
from diffusion_cli.metrics.features.registry import FeatureExtractors
from diffusion_cli.metrics.originals import Pairs, PairState, originals_of
from diffusion_cli.system.downloads import WebFile


class PairNetwork(Features):
    """LPIPS as a `Features` network; it compares pairs and has no features of single images."""

    dim = classes = 0
    resize = "none"
    note = ""

    def __init__(self, distance: LPIPSDistance) -> None:
        self.distance, self.device = distance, distance.device
        self.name, self.digest = f"lpips_{distance.name}", distance.digest

    def extract(self, images: Tensor) -> FeatureBatch:
        return FeatureBatch(torch.empty(len(images), 0), None)


class LPIPS(Metric):
    """Mean LPIPS distance of samples, with the standard error of the mean.

    Without originals, this is the diversity: the distance of disjoint pairs of consecutive samples of a class. With
    originals, it is the distance of sample n to original n, for example of edits, and of a model with an image
    condition.

    Args:
        network: LPIPS backbone.
        weights: file of torchvision's backbone weights; None: download the published ones.
        originals: folder, ZIP or NumPy file of one image per sample; None: the originals that the samples have, if any.

    Raises:
        UsageError: there are fewer than 4 samples, or not one original per sample.

    Source: Zhang et al. 2018.
    """

    def __init__(
        self,
        *,
        network: Literal["alex", "vgg", "squeeze"] = "alex",
        weights: str | None = None,
        originals: str | None = None,
    ) -> None:
        self.kind: Literal["alex", "vgg", "squeeze"] = network
        self.weights, self.originals = weights, originals

    def network(self, networks: FeatureExtractors) -> Features:
        return networks.once(
            f"lpips {self.kind} {self.weights}",
            lambda: PairNetwork(
                LPIPSDistance(self.kind, self.weights, networks.device, "metric.lpips.weights")
            ),
        )

    def downloads(self) -> list[WebFile]:
        return [published_backbone(self.kind)] if self.weights is None else []

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        self._originals(seen)
        if count < 4:
            raise UsageError("num_samples", count, "metric=lpips needs at least 4", "raise num_samples")
        return []

    def init_state(self, seen: FeatureView) -> MetricState:
        assert isinstance(seen.network, PairNetwork)
        originals = self._originals(seen)
        if originals is None:
            return DiversityState(seen.network.distance)
        return LPIPSState(originals, seen.network.distance)

    def _originals(self, seen: FeatureView) -> Pairs | None:
        return originals_of(self.originals, "metric.lpips.originals", seen, len(seen.samples))


class LPIPSState(PairState):
    def compute(self) -> list[MetricValue]:
        return [_mean("lpips", self.values, self.protocol)]


class DiversityState(MetricState):
    def __init__(self, distance: LPIPSDistance) -> None:
        self.distance = distance
        self.labelled = False
        self.alone: dict[int, Tensor] = {}
        self.values: list[Tensor] = []

    def update(self, batch: SampleBatch) -> None:
        if pairs := self._pairs(batch):
            first, second = (torch.stack(images) for images in zip(*pairs, strict=True))
            self.values.append(self.distance(first, second).cpu().double())

    def _pairs(self, batch: SampleBatch) -> list[tuple[Tensor, Tensor]]:
        self.labelled = batch.labels is not None
        classes = [0] * len(batch.images) if batch.labels is None else batch.labels.tolist()
        pairs = []
        for image, label in zip(batch.images, classes, strict=True):
            if label < 0:
                continue  # its class is missing
            if label in self.alone:
                pairs.append((self.alone.pop(label), image))
            else:
                self.alone[label] = image
        return pairs

    def compute(self) -> list[MetricValue]:
        values = torch.cat(self.values) if self.values else torch.empty(0)
        pairs = {"pairs_of": "one class" if self.labelled else "any samples"}
        return [_mean("lpips_diversity", values, pairs, diversity=True)]


def _mean(name: str, values: Tensor, protocol: dict[str, Any], diversity: bool = False) -> MetricValue:
    """Return the mean of distances [N] with its standard error; no value for N < 2."""
    if len(values) < 2:
        note = f"{name}: fewer than 2 pairs of samples of one class; generate more samples"
        return MetricValue(name, None, notes=(note,))
    details = {"standard_error": float(values.std() / math.sqrt(len(values))), "pairs": len(values)}
    return MetricValue(name, float(values.mean()), details, protocol, higher_is_better=diversity)

"""A metric of samples."""

import torch
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue, SampleBatch
from torch import Tensor


class Example(Metric):
    """Difference between the brightness of samples and of real images.

    A metric has the settings; its state gets the samples, batch by batch, and returns the values. For features remove
    `uses_features = False`, use `seen.rows()` and `seen.real.rows()`, and set `keeps_rows = True`.

    Args:
        absolute: report the absolute value of the difference
    """

    uses_features = False

    def __init__(self, *, absolute: bool = True) -> None:
        self.absolute = absolute

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        """Return warnings about the number of samples; raise UsageError if there are too few."""
        return []

    def init_state(self, seen: FeatureView) -> MetricState:
        """Return the state of a pass over the samples."""
        images = seen.real.images()
        real = images[torch.arange(len(images), device=images.device)]
        return ExampleState(brightness(real).mean().item(), self.absolute, seen.real.protocol())


class ExampleState(MetricState):
    """Sum of the brightness of samples."""

    def __init__(self, real: float, absolute: bool, reference: dict) -> None:
        self.real, self.absolute, self.reference = real, absolute, reference
        self.sum, self.count = 0.0, 0

    def update(self, batch: SampleBatch) -> None:
        """Add a batch of samples."""
        values = brightness(batch.images)
        self.sum, self.count = self.sum + values.sum().item(), self.count + len(values)

    def compute(self) -> list[MetricValue]:
        """Return the value, with the settings that it depends on."""
        difference = self.sum / self.count - self.real
        protocol = {"absolute": self.absolute, "reference": self.reference}
        return [MetricValue("example", abs(difference) if self.absolute else difference, {}, protocol)]


def brightness(images: Tensor) -> Tensor:
    """Return the mean of each image, 0 to 1, float64 [B], for uint8 images [B, C, H, W]."""
    return images.double().flatten(1).mean(1) / 255

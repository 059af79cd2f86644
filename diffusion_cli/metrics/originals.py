"""Metrics of samples against their originals: PSNR and SSIM."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from diffusion_cli.data import PixelDigest, given_images
from diffusion_cli.data.previews import stored_as
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import SampleFormat, has_own_numbers
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue, SampleBatch
from diffusion_cli.metrics.samples import Samples

RANGE = 255.0  # of uint8 pixels, and of other values after scaling
WINDOW = 11  # pixels per side of the SSIM window
WINDOW_SIGMA = 1.5  # standard deviation of the window's Gaussian weights, in pixels
K1, K2 = 0.01, 0.03  # SSIM constants, as published
Pairs = Callable[[Sequence[int]], Tensor]
"""Returns the originals of samples by index: 8-bit [B, C, H, W], or stored values, float32 [B, *shape] in [-1, 1]."""


def compares_values(form: SampleFormat | None) -> bool:
    """Return whether PSNR and SSIM compare the stored values of a format: not of pictures, nor of sets of points."""
    return form is not None and form.ordered and has_own_numbers(form)


def originals_of(
    path: str | None, key: str, seen: FeatureView, count: int, *, stored: bool = False
) -> Pairs | None:
    """Return the originals of all samples, or None if they have none.

    Args:
        path: folder, ZIP or NumPy file of one image per sample, in order; None: the originals that the samples have.
        key: configuration key of the path, for errors.
        seen: the samples.
        count: number of samples.
        stored: whether formats of `compares_values` give stored values; all others are 8-bit images.

    Raises:
        UsageError: there is not one original per sample.
    """
    if path is None:
        return own_originals(seen.samples, stored)
    files = Path(path).expanduser()
    if stored and compares_values(seen.samples.form):
        images = stored_as(seen.dataset, files, key)
        rows = images.stored
    else:
        images = given_images(files, key, seen.samples.shape).images
        rows = images.__getitem__
    if len(images) != count:
        raise UsageError(
            key,
            path,
            f"has {len(images)} images, but there are {count} samples",
            "give one image per sample, in order",
        )
    return lambda numbers: rows(torch.tensor(list(numbers)))


def own_originals(samples: Samples, stored: bool) -> Pairs | None:
    """Return the originals that samples have, or None; see `originals_of`."""
    if samples.originals([0]) is None:
        return None
    form = None if stored and compares_values(samples.form) else samples.form

    def originals(numbers: Sequence[int]) -> Tensor:
        found = samples.originals(numbers)
        assert found is not None
        return found if form is None else form.measured(found)

    return originals


class PairState(MetricState):
    """State of a metric that compares each sample with its original.

    Args:
        originals: the originals.
        compare: function from samples and originals, [B, C, H, W] in 0..255 by `levels`, to values [B].
    """

    def __init__(self, originals: Pairs, compare: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.originals, self.compare = originals, compare
        self.digest, self.count = PixelDigest(), 0
        self.compared: list[Tensor] = []
        self.none = torch.empty(0)
        """No originals, of their shape and dtype."""

    def update(self, batch: SampleBatch) -> None:
        originals = self.originals(range(self.count, self.count + len(batch.images))).cpu()
        self.count += len(batch.images)
        self.digest.update(originals)
        self.none = originals[:0]
        made, real = levels(samples_like(originals, batch)), levels(originals)
        self.compared.append(self.compare(made, real).cpu().double())

    @property
    def values(self) -> Tensor:
        """Values of all samples so far, float64 [N]."""
        return torch.cat(self.compared)

    @property
    def protocol(self) -> dict[str, Any]:
        """What identifies the originals, for the protocol."""
        return {"originals_sha256": self.digest.hexdigest(), **values_protocol(self.none)}

    def compute(self) -> list[MetricValue]:
        raise NotImplementedError


class Fidelity(Metric):
    """Base class of metrics that compare samples with their originals.

    8-bit images are compared by their pixels. Deep images, signals and volumes are compared by their values over the
    range of the dataset, without rounding to 8 bits; originals in files have the format of the samples. Images with
    opacity and point clouds are compared by their 8-bit previews.

    Args:
        originals: folder, ZIP or NumPy file of one image per sample; None: the originals that the samples have, as
            those of a model with an image condition.
    """

    uses_features = False
    uses_stored = True
    name: str
    """Name of the metric in configurations and reports."""

    def __init__(self, originals: str | None) -> None:
        self.originals = originals

    def uses_previews(self, form: SampleFormat) -> bool:
        return not compares_values(form)

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        originals = self._originals(seen)
        if originals is None:
            raise UsageError(
                "metric",
                self.name,
                "the samples have no originals, which only a model with an image condition has",
                f"give them in metric.{self.name}.originals, or use a run trained with condition=image",
            )
        if count < 2:
            raise UsageError(
                "num_samples", count, f"metric={self.name} needs at least 2", "raise num_samples"
            )
        *_, height, width = levels(originals([0])).shape
        self.check_size(min(height, width))
        return []

    def check_size(self, side: int) -> None:
        """Raise UsageError if images with this short side are too small."""

    def init_state(self, seen: FeatureView) -> MetricState:
        originals = self._originals(seen)
        assert originals is not None
        return self.state(originals)

    @abstractmethod
    def state(self, originals: Pairs) -> MetricState:
        """Return the state of a pass over samples with these originals."""

    def _originals(self, seen: FeatureView) -> Pairs | None:
        key = f"metric.{self.name}.originals"
        return originals_of(self.originals, key, seen, len(seen.samples), stored=True)


class PSNR(Fidelity):
    """Mean peak signal-to-noise ratio of samples to their originals, in dB, with the standard error of the mean.

    `10 log10((high - low)^2 / MSE)` of each image, over all its pixels or voxels; `[low, high]` is the range of the
    dataset, and [0, 255] for 8-bit images. With a range for each channel, errors are in units of it. Samples that equal
    their originals have an infinite ratio, and are left out of the mean. See `Fidelity` for the arguments and errors.
    """

    name = "psnr"

    def __init__(self, *, originals: str | None = None) -> None:
        super().__init__(originals)

    def state(self, originals: Pairs) -> MetricState:
        return PSNRState(originals, peak_ratio)


class PSNRState(PairState):
    def compute(self) -> list[MetricValue]:
        finite = self.values[self.values.isfinite()]
        exact = self.count - len(finite)
        notes = (
            [f"psnr: {exact} samples equal their originals, and are left out of the mean"] if exact else []
        )
        return [mean_value("psnr", finite, self.protocol, tuple(notes))]


class SSIM(Fidelity):
    """Mean structural similarity of samples and their originals, at most 1, with the standard error of the mean.

    Values are counted from the low end of the range. The similarity of volumes is the mean over slices along depth.

    Args:
        originals: see `Fidelity`.
        window: side of the Gaussian window in pixels; published values use 11.

    Raises:
        UsageError: see `Fidelity`.

    Source: Wang et al. 2004.
    """

    name = "ssim"

    def __init__(
        self,
        *,
        originals: str | None = None,
        window: Literal[3, 5, 7, 9, 11] = 11,
    ) -> None:
        super().__init__(originals)
        self.window = window

    def check_size(self, side: int) -> None:
        if side < self.window:
            raise UsageError(
                "metric.ssim.window",
                self.window,
                f"the images have only {side} pixels per side",
                f"use {side - 1 + side % 2} or less",
            )

    def state(self, originals: Pairs) -> MetricState:
        return SSIMState(originals, self.window)


class SSIMState(PairState):
    def __init__(self, originals: Pairs, window: int) -> None:
        super().__init__(originals, lambda made, real: structural_similarity(made, real, window))
        self.window = window

    def compute(self) -> list[MetricValue]:
        return [mean_value("ssim", self.values, self.protocol | ssim_protocol(self.none, self.window))]


def samples_like(originals: Tensor, batch: SampleBatch) -> Tensor:
    """Return the samples of a batch as their originals are: stored values or 8-bit images."""
    if not originals.is_floating_point():
        return batch.images
    assert batch.stored is not None
    return batch.stored


def levels(images: Tensor) -> Tensor:
    """Return images as [B, C, H, W] in 0..255: 8-bit ones as they are, stored values [B, *shape] without rounding.

    The slices of a volume along depth become channels, and a signal [C, L] an image of one channel.
    """
    if not images.is_floating_point():
        return images
    values = (images.double() + 1) * (RANGE / 2)
    return values.reshape(len(values), -1, *values.shape[-2:])


def values_protocol(originals: Tensor) -> dict[str, Any]:
    """Return what is compared, for the protocol; empty for 8-bit images."""
    return {"compared": "stored values over the range"} if originals.is_floating_point() else {}


def peak_ratio(first: Tensor, second: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of pairs of images [B, C, H, W] in 0..255: float64 [B]."""
    return 10 * torch.log10(RANGE**2 / (first.double() - second.double()).square().flatten(1).mean(1))


def structural_similarity(first: Tensor, second: Tensor, window: int = WINDOW) -> Tensor:
    """Return the SSIM, at most 1, between pairs of images [B, C, H, W] in 0..255: float64 [B].

    (2 m1 m2 + c1) (2 s12 + c2) / ((m1^2 + m2^2 + c1) (s1^2 + s2^2 + c2)), c = (255 K)^2, with means, variances and
    covariance of a Gaussian window; averaged over all windows inside the image, then over channels. Sides must have at
    least `window` pixels.

    Source: Wang et al. 2004, Eq. 13-17, with a window of 11 pixels.
    """
    offsets = torch.arange(window, dtype=torch.float64, device=first.device) - window // 2
    weights = torch.exp(-(offsets**2) / (2 * WINDOW_SIGMA**2))
    weights = weights / weights.sum()

    def smooth(images: Tensor) -> Tensor:
        return conv2d(conv2d(images, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    x, y = (images.double().flatten(0, 1)[:, None] for images in (first, second))
    m1, m2 = smooth(x), smooth(y)
    v1, v2, covariance = smooth(x * x) - m1**2, smooth(y * y) - m2**2, smooth(x * y) - m1 * m2
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    index = (2 * m1 * m2 + c1) * (2 * covariance + c2) / ((m1**2 + m2**2 + c1) * (v1 + v2 + c2))
    return index.view(*first.shape[:2], -1).mean(dim=(1, 2))


def ssim_protocol(originals: Tensor, window: int = WINDOW) -> dict[str, Any]:
    """Return the settings of the SSIM, for the protocol."""
    slices = {"slices": "along depth"} if originals.dim() == 5 else {}
    return {"window": f"{window}x{window} Gaussian, sigma {WINDOW_SIGMA}, inside the image", **slices}


def mean_value(
    name: str, values: Tensor, protocol: dict[str, Any] | None = None, notes: tuple[str, ...] = ()
) -> MetricValue:
    """Return the mean of values [N] with its standard error; no value for N < 2."""
    if len(values) < 2:
        return MetricValue(name, None, notes=notes)
    details = {"standard_error": float(values.std() / math.sqrt(len(values))), "images": len(values)}
    return MetricValue(
        name, float(values.mean()), details, protocol or {}, notes=notes, higher_is_better=True
    )

"""Reconstruction metrics of autoencoders: PSNR, SSIM and rFID."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from diffusion_cli.data import Images, to_model_range
from diffusion_cli.data.base import Split
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import SampleFormat
from diffusion_cli.metrics.base import (
    FeatureView,
    Metric,
    MetricPicture,
    MetricState,
    MetricValue,
    SampleBatch,
)
from diffusion_cli.metrics.features.base import Features
from diffusion_cli.metrics.frechet import FrechetDistance
from diffusion_cli.metrics.samples import Samples
from diffusion_cli.networks import ImageAutoencoder
from diffusion_cli.samplers import Advance, unreported

RANGE = 255.0  # of uint8 pixels
WINDOW = 11  # pixels per side of the SSIM window
WINDOW_SIGMA = 1.5  # standard deviation of the window's Gaussian weights, in pixels
K1, K2 = 0.01, 0.03  # SSIM constants, as published
PICTURES = 8  # images per row, and rows, of the figure


class ReconstructedSamples(Samples):
    """Reconstructions of real images by an autoencoder from mean latents, in the order of the images."""

    labelled = False
    class_names = None

    def __init__(
        self, network: ImageAutoencoder, images: Images, form: SampleFormat, record: dict[str, Any]
    ) -> None:
        self.network, self.images, self.form, self.record = network, images, form, record
        self.shape = form.picture_shape(images.shape)

    def __len__(self) -> int:
        return len(self.images)

    def originals(self, numbers: Sequence[int]) -> Tensor:
        """Return the original images as previews, uint8 [B, C, H, W]."""
        return self.form.to_rgb(self._real(numbers))

    @torch.inference_mode()
    def batch(self, numbers: Sequence[int], advance: Advance = unreported) -> tuple[Tensor, None]:
        x = to_model_range(self._real(numbers)).to(next(self.network.parameters()).device)
        return self.form.to_rgb(self.form.quantize(self.network.reconstruct(x).cpu())), None

    def _real(self, numbers: Sequence[int]) -> Tensor:
        return self.images[torch.tensor(list(numbers)).to(self.images.device)].cpu()

    def protocol(self) -> dict[str, Any]:
        return self.record | {"images_sha256": self.images.digest()}


class Reconstruction(Metric):
    """PSNR in dB and SSIM of reconstructions, as means over images with standard errors.

    Both are computed on 8-bit previews. Exact reconstructions, of infinite PSNR, are left out of its mean. SSIM needs
    images of at least 11 pixels per side.

    Args:
        split: split of the dataset.

    Raises:
        UsageError: the split has fewer than 2 images.

    Source: Wang et al. 2004.
    """

    uses_features = False

    def __init__(self, *, split: Split = "val") -> None:
        self.split = split

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        if count < 2:
            raise UsageError(
                "metric.reconstruction.split", self.split, f"has {count} images; at least 2 are needed"
            )
        return []

    def init_state(self, seen: FeatureView) -> MetricState:
        assert isinstance(seen.samples, ReconstructedSamples)
        return ReconstructionState(seen.samples)


class ReconstructionState(MetricState):
    def __init__(self, samples: ReconstructedSamples) -> None:
        self.samples = samples
        self.ratios: list[Tensor] = []
        self.similarities: list[Tensor] = []
        self.count = 0
        self.pairs: list[Tensor] = []
        """Rows of originals, each followed by a row of reconstructions."""

    def update(self, batch: SampleBatch) -> None:
        originals = self.samples.originals(range(self.count, self.count + len(batch.images)))
        self.count += len(batch.images)
        made, real = batch.images.double(), originals.double()
        self.ratios.append(10 * torch.log10(RANGE**2 / (made - real).square().flatten(1).mean(1)))
        if min(real.shape[2:]) >= WINDOW:
            self.similarities.append(structural_similarity(made, real))
        for start in range(0, len(real), PICTURES):
            if len(self.pairs) < PICTURES:
                self.pairs += [part[start : start + PICTURES] for part in (originals, batch.images)]

    def compute(self) -> list[MetricValue]:
        ratios = torch.cat(self.ratios)
        finite = ratios[ratios.isfinite()]
        exact = len(ratios) - len(finite)
        notes = [f"psnr: {exact} images are reconstructed exactly, and left out of the mean"] if exact else []
        pictures = {"reconstructions": MetricPicture(self.pairs, ("given", "reconstructed"))}
        found = [_mean("psnr", finite, tuple(notes), pictures)]
        if self.similarities:
            protocol = {"window": f"{WINDOW}x{WINDOW} Gaussian, sigma {WINDOW_SIGMA}, inside the image"}
            return [*found, replace(_mean("ssim", torch.cat(self.similarities)), protocol=protocol)]
        note = f"ssim: the images are smaller than its window of {WINDOW} pixels per side"
        return [*found, MetricValue("ssim", None, notes=(note,))]


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return the SSIM, at most 1, between pairs of images [B, C, H, W] in 0..255: float64 [B].

    (2 m1 m2 + c1) (2 s12 + c2) / ((m1^2 + m2^2 + c1) (s1^2 + s2^2 + c2)), c = (255 K)^2, with means, variances and
    covariance of an 11x11 Gaussian window; averaged over all windows inside the image, then over channels. Sides must
    be at least 11 pixels.

    Source: Wang et al. 2004, Eq. 13-17.
    """
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=first.device) - WINDOW // 2
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


def _mean(
    name: str, values: Tensor, notes: tuple[str, ...] = (), pictures: dict[str, MetricPicture] | None = None
) -> MetricValue:
    """Return the mean of values [N] with its standard error; no value for N < 2."""
    if len(values) < 2:
        return MetricValue(name, None, notes=notes, pictures=pictures or {})
    details = {"standard_error": float(values.std() / math.sqrt(len(values))), "images": len(values)}
    return MetricValue(
        name, float(values.mean()), details, notes=notes, pictures=pictures or {}, higher_is_better=True
    )


class ReconstructionFrechetDistance(FrechetDistance):
    """Frechet distance between reconstructions and their originals: rFID with Inception features.

    Args:
        split: split of the dataset.

    Source: Esser et al. 2021; Rombach et al. 2022, Table 8.
    """

    key = "rfid"
    has_kernel_distance = False

    def __init__(self, *, split: Split = "val") -> None:
        super().__init__(reference_distance=False, infinity=0, bootstrap=0)
        self.split = split

    def title(self, features: Features) -> str:
        return f"r{super().title(features)}"

"""Reconstruction metrics of autoencoders: PSNR, SSIM and rFID."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion_cli.data import Images, quantized, to_model_range
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
from diffusion_cli.metrics.originals import (
    WINDOW,
    compares_values,
    levels,
    mean_value,
    own_originals,
    peak_ratio,
    samples_like,
    ssim_protocol,
    structural_similarity,
    values_protocol,
)
from diffusion_cli.metrics.samples import Samples
from diffusion_cli.networks import ImageAutoencoder
from diffusion_cli.samplers import Advance, unreported

PICTURES = 8  # images per row, and rows, of the figure


class ReconstructedSamples(Samples):
    """Reconstructions of real images by an autoencoder from mean latents, in the order of the images."""

    labelled = False
    class_names = None

    def __init__(
        self, network: ImageAutoencoder, images: Images, form: SampleFormat, record: dict[str, Any]
    ) -> None:
        self.network, self.images, self.record = network, images, record
        self.form = self._form = form
        self.shape = form.measured_shape(images.shape)

    def __len__(self) -> int:
        return len(self.images)

    def originals(self, numbers: Sequence[int]) -> Tensor:
        return quantized(self._real(numbers), self._form)

    @torch.inference_mode()
    def batch(self, numbers: Sequence[int], advance: Advance = unreported) -> tuple[Tensor, None]:
        x = to_model_range(self._real(numbers)).to(next(self.network.parameters()).device)
        self.latest = self._form.quantize(self.network.reconstruct(x).cpu())
        return self._form.measured(self.latest), None

    def _real(self, numbers: Sequence[int]) -> Tensor:
        return self.images[torch.tensor(list(numbers)).to(self.images.device)].cpu()

    def protocol(self) -> dict[str, Any]:
        return self.record | {"images_sha256": self.images.digest()}


class Reconstruction(Metric):
    """PSNR in dB and SSIM of reconstructions, as means over images with standard errors.

    They compare what `PSNR` and `SSIM` compare: of deep images, signals and volumes the values over the range, without
    rounding to 8 bits, and the SSIM of volumes is the mean over slices along depth. Exact reconstructions, of infinite
    PSNR, are left out of its mean. SSIM needs images of at least 11 pixels per side.

    Args:
        split: split of the dataset.

    Raises:
        UsageError: the split has fewer than 2 images.

    Source: Wang et al. 2004.
    """

    uses_features = False
    uses_stored = True

    def __init__(self, *, split: Split = "val") -> None:
        self.split = split

    def uses_previews(self, form: SampleFormat) -> bool:
        return not compares_values(form)

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
        originals = own_originals(samples, stored=True)
        assert originals is not None
        assert samples.form is not None
        self.originals, self.form = originals, samples.form
        self.none = torch.empty(0)
        """No originals, of their shape and dtype."""
        self.ratios: list[Tensor] = []
        self.similarities: list[Tensor] = []
        self.count = 0
        self.pairs: list[Tensor] = []
        """Rows of originals, each followed by a row of reconstructions."""

    def update(self, batch: SampleBatch) -> None:
        originals = self.originals(range(self.count, self.count + len(batch.images)))
        self.count += len(batch.images)
        self.none = originals[:0]
        made, real = levels(samples_like(originals, batch)), levels(originals)
        self.ratios.append(peak_ratio(made, real))
        if min(real.shape[2:]) >= WINDOW:
            self.similarities.append(structural_similarity(made, real))
        shown = self.form.measured(originals) if originals.is_floating_point() else originals
        for start in range(0, len(shown), PICTURES):
            if len(self.pairs) < PICTURES:
                self.pairs += [part[start : start + PICTURES] for part in (shown, batch.images)]

    def compute(self) -> list[MetricValue]:
        ratios = torch.cat(self.ratios)
        finite = ratios[ratios.isfinite()]
        exact = len(ratios) - len(finite)
        notes = [f"psnr: {exact} images are reconstructed exactly, and left out of the mean"] if exact else []
        pictures = {"reconstructions": MetricPicture(self.pairs, ("given", "reconstructed"))}
        found = [
            replace(
                mean_value("psnr", finite, values_protocol(self.none), notes=tuple(notes)), pictures=pictures
            )
        ]
        if self.similarities:
            protocol = values_protocol(self.none) | ssim_protocol(self.none)
            return [*found, mean_value("ssim", torch.cat(self.similarities), protocol)]
        note = f"ssim: the images are smaller than its window of {WINDOW} pixels per side"
        return [*found, MetricValue("ssim", None, notes=(note,))]


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

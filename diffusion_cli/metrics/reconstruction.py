"""How near an autoencoder's images come to their originals, pixel by pixel and in features."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_cli.data import Images, normalised
from diffusion_cli.data.base import Split
from diffusion_cli.forms import Form
from diffusion_cli.metrics.base import Finding, Measurement, Metric, Seen, Shown
from diffusion_cli.metrics.features import FeatureBatch, Features
from diffusion_cli.metrics.frechet import FrechetDistance
from diffusion_cli.metrics.networks import Networks
from diffusion_cli.metrics.samples import Samples
from diffusion_cli.networks import AutoencoderKL

WINDOW = 11  # pixels of a side of the structural similarity's
PICTURES = 8  # images of a row, and rows


class Reconstructions(Samples):
    """What an autoencoder decodes of the mean latents of real images, each of them in its place."""

    labelled = False
    class_names = None

    def __init__(self, network: AutoencoderKL, images: Images, form: Form, about: dict[str, Any]) -> None:
        self.network, self.images, self.form, self.about = network, images, form, about
        self.shape = form.picture_shape(images.shape)

    def __len__(self) -> int:
        return len(self.images)

    def originals(self, numbers: Sequence[int]) -> Tensor:
        """The real images by number, as pictures: uint8 [B, C, H, W]."""
        return self.form.pictures(self._real(numbers))

    @torch.inference_mode()
    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, None]:
        x = normalised(self._real(numbers)).to(next(self.network.parameters()).device)
        return self.form.pictures(self.form.stored(self.network.reconstruct(x).cpu())), None

    def _real(self, numbers: Sequence[int]) -> Tensor:
        return self.images.gather(torch.tensor(list(numbers)).to(self.images.device)).cpu()

    def protocol(self) -> dict[str, Any]:
        return self.about | {"images_sha256": self.images.digest()}


class Pixels(Features):
    """Stands for the network of metrics that look at the pixels themselves."""

    name = "pixels"
    dim = classes = 0
    digest = note = ""
    resize = "none"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def extract(self, images: Tensor) -> FeatureBatch:
        return FeatureBatch(torch.empty(len(images), 0), None)


class Reconstruction(Metric):
    """The peak signal-to-noise ratio in dB and the structural similarity of reconstructions: the means over images.

    Of 256 values a pixel, those of deeper images over their stated range, by torchmetrics, with standard errors. An
    image that comes back exactly has no finite ratio, and one with a side under 11 pixels no similarity. Source: Wang
    et al. 2004.
    """

    def __init__(self, *, split: Split) -> None:
        self.split = split

    def network(self, networks: Networks) -> Features:
        return networks.once("pixels", lambda: Pixels(networks.device))

    def check(self, count: int, seen: Seen, force: bool) -> list[str]:
        if count < 2:
            raise ValueError(f"metric.reconstruction.split={self.split}: has {count} images; two are needed")
        return []

    def begin(self, seen: Seen) -> Measurement:
        assert isinstance(seen.samples, Reconstructions)
        return ReconstructionMeasurement(seen.samples)


class ReconstructionMeasurement(Measurement):
    def __init__(self, samples: Reconstructions) -> None:
        self.samples = samples
        self.ratios: list[Tensor] = []
        self.similarities: list[Tensor] = []
        self.count = 0
        self.pairs: list[Tensor] = []
        """Rows of originals, each above its reconstructions."""

    def update(self, batch: Shown) -> None:
        from torchmetrics.functional.image import (  # takes seconds to import
            peak_signal_noise_ratio,
            structural_similarity_index_measure,
        )

        originals = self.samples.originals(range(self.count, self.count + len(batch.images)))
        self.count += len(batch.images)
        made, real = batch.images.double(), originals.double()
        self.ratios.append(
            peak_signal_noise_ratio(made, real, data_range=255.0, reduction="none", dim=(1, 2, 3))
        )
        if min(real.shape[2:]) >= WINDOW:
            similar = structural_similarity_index_measure(made, real, data_range=255.0, reduction="none")
            assert isinstance(similar, Tensor)
            self.similarities.append(similar)
        for start in range(0, len(real), PICTURES):
            if len(self.pairs) < PICTURES:
                self.pairs += [part[start : start + PICTURES] for part in (originals, batch.images)]

    def findings(self) -> list[Finding]:
        ratios = torch.cat(self.ratios)
        finite = ratios[ratios.isfinite()]
        exact = len(ratios) - len(finite)
        notes = [f"psnr: {exact} images come back exactly, and are not in the mean"] if exact else []
        pictures = {"reconstructions": self.pairs}
        found = [_mean("psnr", finite, tuple(notes), pictures)]
        if self.similarities:
            return [*found, _mean("ssim", torch.cat(self.similarities))]
        note = f"ssim: its window of {WINDOW} pixels a side does not fit into these images"
        return [*found, Finding("ssim", None, notes=(note,))]


def _mean(
    name: str, values: Tensor, notes: tuple[str, ...] = (), pictures: dict[str, list[Tensor]] | None = None
) -> Finding:
    """The mean of values [N] with its standard error; no number of fewer than two."""
    if len(values) < 2:
        return Finding(name, None, notes=notes, pictures=pictures or {})
    details = {"standard_error": float(values.std() / math.sqrt(len(values))), "images": len(values)}
    return Finding(
        name, float(values.mean()), details, notes=notes, pictures=pictures or {}, higher_is_better=True
    )


class ReconstructionFrechetDistance(FrechetDistance):
    """The Frechet distance between reconstructions and their originals: rFID, where the features are Inception's.

    Source: Esser et al. 2021; Rombach et al. 2022, Table 8.
    """

    key = "rfid"

    def __init__(self, *, split: Split) -> None:
        super().__init__(floor=False, infinity=0, bootstrap=0)
        self.split = split

    def title(self, features: Features) -> str:
        return f"r{super().title(features)}"

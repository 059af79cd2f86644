"""Distance of the mean power spectra of sampled and real signals."""

import math
from itertools import pairwise

import torch
from pydantic import PositiveInt
from torch import Tensor

from diffusion_cli.data import Images, PicturedImages, has_signals
from diffusion_cli.data.base import row_chunks
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue, SampleBatch

NO_POWER = 1e-12
"""Power of a band of constant signals, where rounding of float64 leaves about 1e-30."""


class Spectrum(Metric):
    """Relative error of the mean power spectrum of sampled signals, in octave bands.

    With the mean power P_b of the samples in band b, and R_b of the real signals, the value is the mean over bands and
    channels of `|P_b - R_b| / R_b`. Powers are squared moduli of the discrete Fourier transform with a Hann window.
    Band 1 has the upper half of the frequencies, band 2 the upper half of the rest, and the last one all lower ones but
    0. `real` is the same error of the other split of the dataset.

    A band without real power, as of a constant channel, is left out.

    Args:
        bands: number of bands; the signals need at least 2^bands values.

    Raises:
        UsageError: the samples are no signals, or too short.

    Source: Welch 1967 (mean of windowed spectra).
    """

    uses_features = False
    uses_stored = True

    def __init__(self, *, bands: PositiveInt = 5) -> None:
        self.bands = bands

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        if not has_signals(seen.dataset):
            raise UsageError("metric", "spectrum", "needs signals", "use dataset=signals, or leave it out")
        if not isinstance(seen.real.images(), PicturedImages):
            raise UsageError("reference", seen.real.name(), "has no signals", "use reference=dataset")
        length = seen.samples.shape[-1]
        if 2**self.bands > length:
            raise UsageError(
                "metric.spectrum.bands",
                self.bands,
                f"needs signals of at least {2**self.bands} values, not {length}",
                f"use {length.bit_length() - 1} or less",
            )
        return []

    def init_state(self, seen: FeatureView) -> MetricState:
        return SpectrumState(self, seen)


class SpectrumState(MetricState):
    def __init__(self, metric: Spectrum, seen: FeatureView) -> None:
        self.bands, self.seen = metric.bands, seen
        self.powers: list[Tensor] = []
        self.real = self._mean(seen.real.images())
        other = seen.real.reference.other
        self.other = None if other is None or not len(other) else self._mean(other)

    def update(self, batch: SampleBatch) -> None:
        assert batch.stored is not None
        self.powers.append(band_powers(batch.stored, self.bands))

    def compute(self) -> list[MetricValue]:
        errors = self._errors(torch.cat(self.powers).mean(0))
        details = {f"band {band}": value for band, value in enumerate(errors.tolist(), 1)}
        if self.other is not None:
            details = {"real": float(self._errors(self.other).nanmean()), **details}
        protocol = {"bands": self.bands, "window": "hann", "reference": self.seen.real.protocol()}
        value = float(errors.nanmean())
        if math.isnan(value):
            return [MetricValue("spectrum", None, notes=("no spectrum: real signals are constant",))]
        details = {name: error for name, error in details.items() if not math.isnan(error)}
        return [MetricValue("spectrum", value, details, protocol)]

    def _mean(self, images: Images) -> Tensor:
        assert isinstance(images, PicturedImages)
        chunks = row_chunks(len(images), "power spectra")
        return torch.cat(
            [band_powers(images.stored(rows.to(images.device)).cpu(), self.bands) for rows in chunks]
        ).mean(0)

    def _errors(self, powers: Tensor) -> Tensor:
        """Return the mean relative error over channels in each band, [bands]; NaN without real power."""
        return ((powers - self.real).abs() / self.real).where(self.real > NO_POWER, torch.nan).nanmean(0)


def band_powers(signals: Tensor, bands: int) -> Tensor:
    """Return the power of signals in octave bands, float64 [B, C, bands], with the highest frequencies first.

    Args:
        signals: values in about [-1, 1], float32 [B, C, L].
        bands: number of bands; the last one has all lower frequencies but 0.
    """
    x = signals.double()
    length = x.shape[-1]
    window = torch.hann_window(length, periodic=False, dtype=torch.float64)
    power = torch.fft.rfft((x - x.mean(-1, keepdim=True)) * window).abs().square()
    highest = power.shape[-1] - 1
    edges = [*(highest // 2**band for band in range(bands)), 0]
    return torch.stack([power[..., low + 1 : high + 1].sum(-1) for high, low in pairwise(edges)], -1)

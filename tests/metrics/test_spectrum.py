"""The power spectrum of signals: exact powers, and errors of known filters."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.formats import Signal
from diffusion_cli.metrics import FeatureView, Spectrum, band_powers
from diffusion_cli.metrics.spectrum import SpectrumState

FORM = Signal("float32", [-1.0], [1.0])


def noise(count: int, length: int = 128, scale: float = 0.2, channels: int = 1) -> torch.Tensor:
    """White noise as stored samples."""
    return scale * torch.randn(count, channels, length, generator=torch.Generator().manual_seed(count))


def test_the_power_of_a_sine_lies_in_its_band():
    t = torch.arange(256) / 256
    for cycles, band in [(100, 0), (48, 1), (20, 2), (12, 3), (3, 4)]:
        sine = 0.8 * torch.sin(2 * torch.pi * cycles * t)[None, None]
        powers = band_powers(sine, 5)[0, 0]
        assert powers.argmax() == band
        # By Parseval: a^2 / 2 times the sum of the squared window, half of it at positive frequencies.
        assert powers.sum().item() == pytest.approx(0.8**2 / 2 * 0.375 * 255 * 256 / 2, rel=0.02)


def test_white_noise_has_equal_power_at_all_frequencies():
    powers = band_powers(noise(4000, channels=2), 4).mean((0, 1))
    expected = 0.2**2 * 0.375 * 127 * torch.tensor([32.0, 16, 8, 8], dtype=torch.float64)
    torch.testing.assert_close(powers, expected, rtol=0.06, atol=0)


def test_a_constant_has_no_power():
    assert band_powers(torch.full((2, 1, 64), 0.3), 3).max() < 1e-20


def test_signals_are_measured_without_their_plots():
    x = noise(3, channels=2)
    seen = FORM.measured(x)
    assert seen.shape == (3, *FORM.measured_shape((2, 128))) == (3, 1, 2, 128)
    assert (seen[:, 0].float() / 127.5 - 1 - x).abs().max() <= 1 / 255 + 1e-6


def test_images_have_no_such_spectrum(digits):
    seen = cast(FeatureView, SimpleNamespace(dataset=digits))
    with pytest.raises(
        ValueError, match="metric=spectrum: needs signals; use dataset=signals, or leave it out"
    ):
        Spectrum().check(9, seen, False)


def test_a_quiet_component_is_found(tmp_path, monkeypatch, capsys):
    """Its amplitude is 80 dB below that of the signals; 8 bits are 48 dB."""
    monkeypatch.chdir(tmp_path)
    t = np.arange(128) / 128
    phases = np.random.default_rng(0).uniform(0, 2 * np.pi, (40, 2))
    loud = 0.8 * np.sin(2 * np.pi * 3 * t + phases[:, :1])
    quiet = 0.8e-4 * np.sin(2 * np.pi * 50 * t + phases[:, 1:])
    np.save(tmp_path / "real.npy", (loud + quiet).astype(np.float32))
    for folder, amount in (("same", 1.0), ("double", 2.0), ("none", 0.0)):
        (tmp_path / folder).mkdir()
        for number, signal in enumerate(loud + amount * quiet):
            np.save(tmp_path / folder / f"{number:06d}.npy", signal.astype(np.float32))
        words = ["dataset=signals", "dataset.path=real.npy", "dataset.range=[-1,1]", "dataset.val_fraction=0"]
        assert (
            run(
                [
                    "eval",
                    f"samples={folder}",
                    "metric=spectrum",
                    "metric.spectrum.bands=2",
                    *words,
                    "device=cpu",
                ]
            )
            == 0
        )
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("spectrum"))
        # The mean over two bands, of which the lower one is equal; the window leaks 4 % of the power of the other.
        assert float(line.split()[1]) == pytest.approx(abs(amount**2 - 1) / 2, rel=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_spectra_of_samples_are_compared_with_real_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    real, louder = noise(2000), 1.2 * noise(1000)
    np.save(tmp_path / "real.npy", real[:, 0].numpy())
    for folder, values in (("same", noise(1000)), ("louder", louder)):
        (tmp_path / folder).mkdir()
        for number, signal in enumerate(values):
            FORM.write(signal, tmp_path / folder / f"{number:06d}.npy")
    words = [
        "metric=spectrum",
        "dataset=signals",
        "dataset.path=real.npy",
        "dataset.range=[-1,1]",
        "device=cpu",
    ]
    found = {}
    for folder in ("same", "louder"):
        assert run(["eval", f"samples={folder}", *words]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("spectrum"))
        found[folder] = float(line.split()[1])
    assert found["same"] < 0.06
    assert found["louder"] == pytest.approx(1.2**2 - 1, abs=0.06)
    assert run(["eval", "samples=same", *words, "metric.spectrum.bands=8"]) == 2
    assert "needs signals of at least 256 values, not 128; use 7 or less" in capsys.readouterr().err


def test_bands_without_real_power_are_left_out():
    state = SpectrumState.__new__(SpectrumState)
    state.real = torch.tensor([[2.0, 1e-30], [1e-30, 1e-30]], dtype=torch.float64)  # channels, bands
    errors = state._errors(torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
    assert errors[0] == 0.5
    assert errors[1].isnan()

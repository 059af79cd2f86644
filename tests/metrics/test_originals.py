"""PSNR and SSIM of samples and their originals."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_cli.data import ExternalImages, NoDataset
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.metrics import (
    PSNR,
    SSIM,
    FeatureExtractors,
    GivenReference,
    GivenSamples,
    Metric,
    evaluate,
)
from diffusion_cli.metrics.originals import structural_similarity

CPU = torch.device("cpu")
SHAPE = (3, 16, 13)


class Paired(GivenSamples):
    """Samples that have originals, as those of a model with an image condition."""

    def __init__(self, images: Tensor, originals: Tensor | None) -> None:
        super().__init__(ExternalImages(MemoryImages(images, None), None), None, {}, "samples")
        self.targets = originals

    def originals(self, numbers):
        return None if self.targets is None else self.targets[list(numbers)]


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    originals = torch.randint(256, (7, *SHAPE), dtype=torch.uint8, generator=generator)
    error = torch.randint(-40, 40, originals.shape, generator=generator)
    return (originals.int() + error).clamp(0, 255).to(torch.uint8), originals


def measured(metrics: dict[str, Metric], images, originals, tmp_path, batch_size: int = 3):
    """The report on images, without real images: neither metric uses them."""
    dataset = NoDataset("pairs", images.shape[1:])
    return evaluate(
        metrics,
        FeatureExtractors({}, dataset, tmp_path, CPU),
        Paired(images, originals),
        GivenReference(dataset, path="none"),
        batch_size=batch_size,
    ).report


def test_values_are_means_over_pairs_with_standard_errors(pair, tmp_path):
    images, originals = pair
    errors = (images.double() - originals.double()).square().flatten(1).mean(1)
    expected = 10 * torch.log10(255**2 / errors)
    for size in (1, 3, 7):
        psnr, ssim = measured({"psnr": PSNR(), "ssim": SSIM()}, images, originals, tmp_path, size).results
        assert (psnr.name, ssim.name) == ("psnr", "ssim")
        assert psnr.value == pytest.approx(float(expected.mean()), rel=1e-12)
        deviation = float(expected.std() / math.sqrt(7))
        assert psnr.details == pytest.approx({"standard_error": deviation, "images": 7}, rel=1e-9)
        values = structural_similarity(images, originals)
        assert ssim.value == pytest.approx(float(values.mean()), rel=1e-12)
        assert ssim.protocol["window"].startswith("11x11 Gaussian")
        assert psnr.protocol["originals_sha256"] == ssim.protocol["originals_sha256"]


@pytest.mark.parametrize("window", [3, 7, 11])
def test_ssim_of_an_image_of_one_window_is_its_formula(pair, window):
    first, second = (part[..., :window, :window].double() for part in pair)
    places = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    weights = torch.exp(-(places[:, None] ** 2 + places**2) / (2 * 1.5**2))
    weights /= weights.sum()

    def mean(x):
        return (weights * x).sum((2, 3))

    m1, m2 = mean(first), mean(second)
    v1, v2, cov = mean(first**2) - m1**2, mean(second**2) - m2**2, mean(first * second) - m1 * m2
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * m1 * m2 + c1) * (2 * cov + c2) / ((m1**2 + m2**2 + c1) * (v1 + v2 + c2))
    assert torch.allclose(structural_similarity(first, second, window), expected.mean(1))
    assert torch.allclose(structural_similarity(pair[0], pair[0], window), torch.ones(7).double())


def test_originals_come_from_files_in_order(pair, tmp_path):
    images, originals = pair
    own = measured({"psnr": PSNR()}, images, originals, tmp_path).results[0]
    np.save(tmp_path / "originals.npy", originals.numpy())
    path = str(tmp_path / "originals.npy")
    given = measured({"psnr": PSNR(originals=path)}, images, None, tmp_path).results[0]
    assert given.value == own.value
    assert given.protocol["originals_sha256"] == own.protocol["originals_sha256"]
    np.save(path, originals[:5].numpy())
    for metric in (PSNR(originals=path), SSIM(originals=path)):
        with pytest.raises(
            ValueError, match=r"originals=.*has 5 images, but there are 7 samples; give one image"
        ):
            measured({metric.name: metric}, images, None, tmp_path)


def test_samples_without_originals_are_refused_in_one_line(pair, tmp_path):
    for metric in (PSNR(), SSIM()):
        key = f"metric={metric.name}"
        wanted = rf"{key}: the samples have no originals.*metric.{metric.name}.originals.*condition=image$"
        with pytest.raises(ValueError, match=wanted):
            measured({metric.name: metric}, pair[0], None, tmp_path)
        with pytest.raises(ValueError, match=rf"num_samples=1: {key} needs at least 2"):
            measured({metric.name: metric}, pair[0][:1], pair[1][:1], tmp_path)


def test_exact_samples_are_left_out_of_the_mean_of_psnr(pair, tmp_path):
    images, originals = pair
    some = images.clone()
    some[2] = originals[2]
    report = measured({"psnr": PSNR()}, some, originals, tmp_path)
    rest = [0, 1, 3, 4, 5, 6]
    assert (
        report.results[0].value
        == measured({"psnr": PSNR()}, images[rest], originals[rest], tmp_path).results[0].value
    )
    assert report.notes == ["psnr: 1 samples equal their originals, and are left out of the mean"]
    assert measured({"psnr": PSNR()}, originals, originals, tmp_path).results == []


def test_the_window_of_ssim_fits_the_images(pair, tmp_path):
    small, originals = (part[..., :8, :8] for part in pair)
    with pytest.raises(
        ValueError, match=r"metric.ssim.window=11: the images have only 8 pixels per side; use 7 or"
    ):
        measured({"ssim": SSIM()}, small, originals, tmp_path)
    (ssim,) = measured({"ssim": SSIM(window=7)}, small, originals, tmp_path).results
    assert ssim.protocol["window"].startswith("7x7")

"""PSNR and SSIM of deep images and volumes: of their values over the range, without rounding to 8 bits."""

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_cli.data import ExternalImages, NoDataset, PicturedImages, pictured
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.formats import HighDepthImage, Volume
from diffusion_cli.metrics import (
    PSNR,
    SSIM,
    FeatureBatch,
    FeatureExtractors,
    GivenReference,
    GivenSamples,
    ReconstructedSamples,
    Reconstruction,
    SampleBatch,
    evaluate,
)
from diffusion_cli.metrics.originals import structural_similarity
from diffusion_cli.metrics.reconstruction import ReconstructionState
from diffusion_cli.networks import AutoencoderKL
from helpers.autoencoders import SMALL

CPU = torch.device("cpu")
DEEP = HighDepthImage("uint16", [0.0], [4095.0], "png")
OPACITY = HighDepthImage("uint8", [0.0], [255.0], "png", "LA")
SCAN = Volume(
    low=-1000.0, high=1000.0, dtype="int16", slope=1.0, inter=0.0,
    affine=np.eye(4)[:3].tolist(), file=".nii.gz",
)  # fmt: skip


class Paired(GivenSamples):
    """Stored samples that have originals, as those of a model with an image condition."""

    def __init__(self, samples: Tensor, targets: Tensor | None, form: HighDepthImage | Volume) -> None:
        images = PicturedImages(MemoryImages(samples, None), form)
        super().__init__(ExternalImages(images, None), None, {}, "samples")
        self.targets = targets

    def originals(self, numbers):
        return None if self.targets is None else self.targets[list(numbers)]


def measured(metrics, samples, targets, form, tmp_path):
    whole = NoDataset("pairs", samples.shape[1:])
    whole.form = form
    dataset = pictured(whole)
    return evaluate(
        metrics,
        FeatureExtractors({}, dataset, tmp_path, CPU),
        Paired(samples, targets, form),
        GivenReference(dataset, path="none"),
        batch_size=3,
    ).report.results


def test_an_error_below_a_256th_of_the_range_counts(tmp_path):
    """Errors of one number of 4096, which 8-bit previews do not show."""
    numbers = np.random.default_rng(0).integers(0, 4000, (5, 1, 16, 13)).astype(np.uint16)
    samples, targets = DEEP.samples(numbers + 1), DEEP.samples(numbers)
    psnr, ssim = measured({"psnr": PSNR(), "ssim": SSIM()}, samples, targets, DEEP, tmp_path)
    assert psnr.value == pytest.approx(20 * np.log10(4095), rel=1e-4)
    assert 0.999 < ssim.value < 1
    assert psnr.protocol["compared"] == "stored values over the range"
    assert "slices" not in ssim.protocol
    np.save(tmp_path / "originals.npy", numbers[:, 0])
    (given,) = measured(
        {"psnr": PSNR(originals=str(tmp_path / "originals.npy"))}, samples, None, DEEP, tmp_path
    )
    assert given.value == psnr.value
    assert given.protocol["originals_sha256"] == psnr.protocol["originals_sha256"]


def test_all_voxels_of_volumes_count(tmp_path):
    """An error in a corner, which the middle slices do not show; SSIM is the mean over slices."""
    generator = torch.Generator().manual_seed(0)
    targets = SCAN.quantize(1.6 * torch.rand(4, 1, 5, 12, 14, generator=generator) - 0.8)
    samples = targets.clone()
    samples[:, :, 0, 0, 0] += 0.1
    psnr, ssim = measured({"psnr": PSNR(), "ssim": SSIM()}, samples, targets, SCAN, tmp_path)
    # 100 of 2000, in one voxel of 5 x 12 x 14
    assert psnr.value == pytest.approx(10 * np.log10(20**2 * 5 * 12 * 14), rel=1e-3)
    slices = [
        structural_similarity((made.double() + 1) * 127.5, (real.double() + 1) * 127.5)
        for made, real in zip(samples.unbind(2), targets.unbind(2), strict=True)
    ]
    assert ssim.value == pytest.approx(float(torch.stack(slices).mean()), rel=1e-9)
    assert ssim.protocol["slices"] == "along depth"


def test_images_with_opacity_are_compared_as_they_are_shown(tmp_path):
    """The gray value of a transparent pixel does not count."""
    targets = torch.full((3, 2, 12, 12), -1.0)
    targets[:, :, :6] = 1.0
    samples = targets.clone()
    samples[:, 0, 6:] = 0.5
    assert measured({"psnr": PSNR()}, samples, targets, OPACITY, tmp_path) == []  # all equal
    assert [metric.uses_previews(OPACITY) for metric in (PSNR(), SSIM(), Reconstruction())] == [True] * 3
    assert [metric.uses_previews(SCAN) for metric in (PSNR(), SSIM(), Reconstruction())] == [False] * 3


def test_reconstructions_are_compared_by_their_values():
    targets = DEEP.samples(np.random.default_rng(0).integers(0, 4000, (4, 1, 16, 16)).astype(np.uint16))
    samples = ReconstructedSamples(
        AutoencoderKL((1, 16, 16), None, **SMALL), MemoryImages(targets, None), DEEP, {}
    )
    state = ReconstructionState(samples)
    made = DEEP.quantize(targets + 2 / 4095)
    state.update(SampleBatch(DEEP.measured(made), None, FeatureBatch(torch.empty(4, 0), None), stored=made))
    psnr, ssim = state.compute()
    assert psnr.value == pytest.approx(20 * np.log10(4095), rel=1e-4)
    assert psnr.pictures["reconstructions"].rows[0].dtype == torch.uint8
    assert ssim.protocol["compared"] == psnr.protocol["compared"] == "stored values over the range"

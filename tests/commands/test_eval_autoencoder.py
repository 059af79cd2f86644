"""`diffuse eval` of an autoencoder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from diffusion_cli.cli import run
from diffusion_cli.config import CONF, build
from diffusion_cli.data import Digits, to_model_range
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.formats import Uint8Image
from diffusion_cli.formats.uint8 import to_bytes
from diffusion_cli.metrics import FeatureBatch, ReconstructedSamples, SampleBatch, frechet_distance
from diffusion_cli.metrics.originals import structural_similarity
from diffusion_cli.metrics.reconstruction import ReconstructionState
from diffusion_cli.networks import AutoencoderKL
from diffusion_cli.runs.load import load_autoencoder
from helpers.autoencoders import PUBLISHED, SMALL, train


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the published one, to be changed."""
    return Path(shutil.copytree(PUBLISHED, tmp_path / "vae"))


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs with a short autoencoder, `tiny`."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "max_steps=40", "optimizer.lr=0.005")
    return folder


def evaluate(folder: Path, *words: str) -> int:
    return run(
        ["eval", "run=tiny", f"output_dir={folder}", f"cache_dir={folder}/cache", "device=cpu", *words]
    )


@pytest.fixture(scope="module")
def pixels(runs) -> tuple[Tensor, Tensor]:
    """All validation digits, and what the run makes of them, as bytes in float64."""
    images = Digits("", val_fraction=0.2, flip=False).load("val")
    originals = images[torch.arange(len(images))]
    network = load_autoencoder(runs / "tiny", torch.device("cpu")).network
    return originals.double(), to_bytes(network.reconstruct(to_model_range(originals))).double()


def test_the_peak_signal_to_noise_ratio_is_the_mean_of_each_images_own(runs, pixels, capsys):
    assert evaluate(runs, "metric=reconstruction", "batch_size=77") == 0
    originals, made = pixels
    ratios = 10 * torch.log10(255**2 / (originals - made).square().flatten(1).mean(1))
    (report,) = json.loads((runs / "tiny" / "metrics.json").read_text())[-1:]
    (result,) = report["results"]
    assert result["name"] == "psnr"
    assert result["value"] == pytest.approx(ratios.mean().item())
    assert result["details"]["standard_error"] == pytest.approx((ratios.std() / len(ratios) ** 0.5).item())
    assert result["details"]["images"] == len(originals) == 359
    assert result["protocol"]["sampling"]["split"] == "val"
    said = capsys.readouterr().out
    assert "ssim: the images are smaller than its window of 11 pixels" in said
    assert "reconstructions of 359 images of digits/val, ema weights" in said
    assert list((runs / "tiny" / "pictures").glob("reconstructions-*.png"))


def test_numbers_of_deep_images_say_over_what_range_they_are(tmp_path, capsys):
    np.save(tmp_path / "deep.npy", np.random.RandomState(0).randint(0, 4096, (40, 8, 8, 1)).astype(np.uint16))
    data = [
        "dataset=array",
        f"dataset.path={tmp_path}/deep.npy",
        "dataset.range=[0,4095]",
        "dataset.val_fraction=0.2",
    ]
    checkpoint = train(tmp_path, *data, "max_steps=2")
    assert evaluate(tmp_path, "metric=reconstruction") == 0
    assert "previews" not in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "tiny" / "metrics.json").read_text())[-1]["results"]
    assert result["protocol"]["compared"] == "stored values over the range"
    about = result["protocol"]["sampling"]
    assert about["form"] == checkpoint["diffuse"]["form"]
    assert (about["form"]["low"], about["form"]["high"]) == ([0], [4095])
    assert about["dataset"] == "deep"
    assert len(about["images_sha256"]) == 64


def test_the_frechet_distance_is_between_reconstructions_and_their_originals(runs, pixels):
    assert evaluate(runs, "metric=rfid", "features=classifier", "features.steps=20") == 0
    (result,) = json.loads((runs / "tiny" / "metrics.json").read_text())[-1]["results"]
    dataset = Digits("", val_fraction=0.2, flip=False)
    node = yaml.safe_load((CONF / "features" / "classifier.yaml").read_text()) | {"steps": 20}
    features = build(node, dataset, runs / "cache", torch.device("cpu"))
    features.prepare()
    seen = [features(part.to(torch.uint8)).features for part in pixels]
    assert result["name"] == "rfrechet_classifier"
    moments = [(values.double().mean(0), values.double().T.cov()) for values in seen]
    (mean, covariance), (other_mean, other_covariance) = moments
    expected = frechet_distance(mean, covariance, other_mean, other_covariance)
    assert result["value"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.usefixtures("forked")
def test_reconstructions_do_not_depend_on_the_number_of_processes(runs):
    values = []
    for count in (1, 2):
        assert evaluate(runs, "metric=reconstruction", "batch_size=50", f"processes={count}") == 0
        (result,) = json.loads((runs / "tiny" / "metrics.json").read_text())[-1]["results"]
        values.append((result["value"], result["protocol"]["sampling"]["pixels_sha256"]))
    assert values[0] == values[1]


def test_bigger_images_have_a_structural_similarity():
    originals = (255 * torch.rand(4, 1, 16, 16)).to(torch.uint8)
    images = MemoryImages(originals, None)
    samples = ReconstructedSamples(small_of(16), images, Uint8Image(), {})
    measurement = ReconstructionState(samples)
    seen = FeatureBatch(torch.empty(4, 0), None)
    measurement.update(SampleBatch(originals, None, seen))  # as though the autoencoder were perfect
    found = {finding.name: finding for finding in measurement.compute()}
    assert found["ssim"].value == pytest.approx(1)
    assert found["psnr"].value is None
    assert found["psnr"].notes == ("psnr: 4 images are reconstructed exactly, and left out of the mean",)


def test_structural_similarity_is_as_published():
    """Wang et al. 2004, window by window: Gaussian weights of sigma 1.5, only windows that lie inside the image."""
    generator = np.random.RandomState(0)
    first = generator.randint(0, 256, (2, 3, 14, 17)).astype(float)
    second = np.clip(first + generator.normal(0, 40, first.shape), 0, 255)
    place = np.arange(-5, 6)
    window = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = np.zeros((2, 3, 4, 7))
    for b, c, i, j in np.ndindex(expected.shape):
        x, y = (images[b, c, i : i + 11, j : j + 11] for images in (first, second))
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
        both = (window * (x - mx) * (y - my)).sum()
        expected[b, c, i, j] = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    found = structural_similarity(torch.from_numpy(first), torch.from_numpy(second))
    np.testing.assert_allclose(found, expected.mean((1, 2, 3)), rtol=1e-10)


def small_of(size: int) -> AutoencoderKL:
    return AutoencoderKL((1, size, size), None, **SMALL)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["metric=fid"],
            "metric=fid: does not evaluate autoencoders, and run=tiny is one; use metric=[reconstruction,rfid]",
        ),
        (["metric=[reconstruction,inversion]"], "metric=inversion: does not evaluate autoencoders"),
        (
            ["metric=[reconstruction,rfid]", "metric.rfid.split=train"],
            "reconstruction.split=val, rfid.split=train",
        ),
        (
            ["metric=reconstruction", "num_samples=5"],
            "num_samples=5: applies only to denoisers, and run=tiny is an autoencoder; leave it out",
        ),
        (["metric=reconstruction", "reference.split=val"], "leave it out"),
        (
            ["metric=reconstruction", "run=null", "samples=there"],
            "metric=reconstruction: evaluates an autoencoder",
        ),
        (["metric=rfid", "run=null"], "set run= to a run of task=autoencoder"),
    ],
)
def test_what_is_not_measured_of_an_autoencoder_is_refused_in_a_line(runs, capsys, words, line):
    assert evaluate(runs, *words) == 2
    said = capsys.readouterr().err
    assert line in said
    assert "Traceback" not in said

"""The Inception score and the Inception features, against torch-fidelity, pytorch-fid and clean-fid."""

import urllib.error
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import FrechetDistance, InceptionFeatures, InceptionScore, inception_score
from diffusion_cli.metrics.features.inception import prepared, resized
from diffusion_cli.system import downloads
from helpers.metrics import DATA, Held, measured, pixels

CPU = torch.device("cpu")


# --- The Inception score ------------------------------------------------------------


@pytest.mark.parametrize("case", ["a", "b"])
def test_inception_score_equals_the_reference(reference, agree, case) -> None:
    arrays = reference("metrics")
    logits = arrays[f"is_logits_{case}"]
    found = torch.tensor(inception_score(logits, 10), dtype=torch.float64)
    agree(
        f"metrics/is_{case}_splits10_shuffle1",
        found,
        arrays[f"is_{case}_splits10_shuffle1"],
        1e-12,
        relative=True,
    )
    assert inception_score(logits, 1) == pytest.approx((float(arrays[f"is_{case}_one"]), 0), rel=1e-12)


def test_inception_score_runs_from_one_to_the_number_of_classes() -> None:
    assert inception_score(torch.zeros(20, 7), 4) == pytest.approx((1, 0), abs=1e-12)
    sure = 1e4 * torch.eye(7).repeat(5, 1)  # so sure that other probabilities are zero in float64
    assert inception_score(sure, 1)[0] == pytest.approx(7, rel=1e-12)
    assert inception_score(sure[:1].repeat(9, 1), 3) == pytest.approx((1, 0), abs=1e-12)


def test_inception_score_refuses_more_splits_than_samples() -> None:
    with pytest.raises(ValueError, match=r"splits=10: exceeds the 9 samples"):
        inception_score(torch.zeros(9, 3), 10)


# --- Inception ------------------------------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """The path where the weights would lie, on a machine without them and without a network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(downloads, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"


def test_without_weights_and_network_the_error_says_what_to_put_where(offline) -> None:
    with pytest.raises(UsageError) as caught:
        InceptionFeatures(DATA, Path(), CPU, weights=None, resize="tensorflow", precision="fp32")
    message = str(caught.value)
    for part in ("no network", offline.name, str(offline), "github.com/toshas/torch-fidelity/releases"):
        assert part in message
    assert "\n" not in message


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_weights_file_runs_no_code(tmp_path) -> None:
    path, mark = tmp_path / "weights.pth", tmp_path / "mark"
    torch.save({"fc.weight": Malicious(mark)}, path)
    with pytest.raises(ValueError, match=r"features.weights=.*weights.pth: does not have the weights"):
        inception(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the danger was real
    assert mark.exists()


def png_folder(folder: Path, images: Tensor) -> str:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:03}.png")
    return str(folder)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory) -> Path:
    """A file of random weights, as the published ones cannot be had here."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Theirs

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(Theirs, "load_state_dict", lambda self, state: None)
        network = Theirs("random", ["2048"], str(folder / "empty.pth"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, torch.nn.BatchNorm2d):
                for name in ("weight", "running_var"):
                    module.state_dict()[name].uniform_(0.7, 1.3)
    network.fc.weight.mul_(100)  # for a score that is not all but 1
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


def inception(weights: Path, precision: Literal["fp32", "bf16"] = "fp32") -> InceptionFeatures:
    return InceptionFeatures(
        DATA, Path(), CPU, weights=str(weights), resize="tensorflow", precision=precision
    )


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (7, 13), (299, 299), (400, 301)])
def test_images_are_resized_bit_for_bit_as_torch_fidelity_does(size) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = torch.randint(256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    assert torch.equal(resized(images, 299), theirs)


@pytest.mark.parametrize("size", [32, 400])
def test_images_are_prepared_as_clean_fid_and_pytorch_fid_do(size) -> None:
    images = torch.randint(256, (2, 3, size, size), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    pillow = torch.tensor(
        np.array([[np.asarray(Image.fromarray(plane.float().numpy()).resize((299, 299), Image.Resampling.BICUBIC))
                   for plane in image] for image in images])
    )  # fmt: skip
    assert (prepared(images, "clean") - (pillow.clamp(0, 255) - 128) / 128).abs().max() < 1e-4
    scaled = torch.nn.functional.interpolate(images / 255, (299, 299), mode="bilinear") * 2 - 1
    assert torch.equal(prepared(images, "pytorch"), scaled)


@pytest.mark.slow
def test_inception_features_equal_those_of_torch_fidelity(random_inception) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Theirs

    images = pixels(6, 0).view(2, 3, 8, 8)
    theirs = Theirs("random", ["2048", "logits_unbiased"], str(random_inception))
    maps = {}
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: maps.update(mixed_6_conv=out))
    features, logits = theirs(images)
    expected = (features, logits, maps["mixed_6_conv"][:, :7].permute(0, 2, 3, 1).flatten(1))
    exact = inception(random_inception)(images)
    rough = inception(random_inception, "bf16")(images)
    for ours, rounded, reference in zip(exact, rough, expected, strict=True):
        assert ours is not None
        assert rounded is not None
        assert ours.dtype == rounded.dtype == torch.float32
        assert (ours - reference).norm() / reference.norm() < 5e-6
        assert 1e-4 < (rounded - reference).norm() / reference.norm() < 3e-2


@pytest.mark.slow
def test_inception_numbers_equal_those_of_torch_fidelity(tmp_path, random_inception) -> None:
    import torch_fidelity

    weights = random_inception
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(256, (16, 3, 1, 1), generator=generator)
    noise = torch.randint(-40, 40, (16, 3, 16, 16), generator=generator)
    samples, real = (colours + noise).clamp(0, 255).to(torch.uint8).split(8)
    features = inception(weights)
    metrics = {
        "fid": FrechetDistance(reference_distance=True, infinity=0, bootstrap=0),
        "is": InceptionScore(splits=3),
    }
    report = measured(metrics, features, samples, Held(real, real), tmp_path, batch_size=5, force=True)
    theirs = torch_fidelity.calculate_metrics(
        input1=png_folder(tmp_path / "samples", samples),
        input2=png_folder(tmp_path / "real", real),
        fid=True,
        isc=True,
        isc_splits=3,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        feature_extractor_weights_path=str(weights),
    )
    assert theirs["inception_score_mean"] > 1.1
    ours = {result.name: result.value for result in report.results}
    # With fewer samples than features, torch-fidelity takes square roots of rounding errors; ours is exact.
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    first, second = (features(images).features.double() for images in (samples, real))
    cross = (first - first.mean(0)) @ (second - second.mean(0)).T / 7
    shift = (first.mean(0) - second.mean(0)).square().sum()
    exact = shift + first.var(0).sum() + second.var(0).sum() - 2 * torch.linalg.svdvals(cross).sum()
    assert ours["fid"] == pytest.approx(float(exact), rel=1e-7)
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert report.results[1].details["std"] == pytest.approx(theirs["inception_score_std"], rel=1e-4)

    gray = samples[:2, :1]
    assert torch.equal(features(gray).features, features(gray.repeat(1, 3, 1, 1)).features)

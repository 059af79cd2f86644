"""LPIPS, and the metrics that use published networks."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from diffusion_cli.data import ExternalImages, NoDataset
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.errors import UsageError
from diffusion_cli.images import save_png
from diffusion_cli.metrics import (
    LPIPS,
    CLIPDistance,
    CLIPFeatures,
    CLIPScore,
    FeatureExtractors,
    FrechetDistanceDINOv2,
    GivenReference,
    GivenSamples,
    LPIPSDistance,
    evaluate,
)
from diffusion_cli.system import downloads
from helpers.features import made, pixels

CPU = torch.device("cpu")


# --- LPIPS ------------------------------------------------------------


@pytest.fixture(scope="module", params=["alex", "squeeze"])
def lpips(request, tmp_path_factory) -> tuple[str, torch.nn.Module, LPIPSDistance]:
    """A random backbone of torchvision, and our distance by it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1}[
            request.param
        ](weights=None)
    path = tmp_path_factory.mktemp("lpips") / "backbone.pth"
    torch.save(
        {key: value for key, value in backbone.state_dict().items() if key.startswith("features.")}, path
    )
    state = torch.get_rng_state()
    distance = LPIPSDistance(request.param, str(path), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    return request.param, backbone, distance


def test_lpips_equals_that_of_torchmetrics(lpips, monkeypatch) -> None:
    name, backbone, distance = lpips
    builder = {"alex": "alexnet", "squeeze": "squeezenet1_1"}[name]
    monkeypatch.setattr(torchvision.models, builder, lambda weights: backbone)
    first, second = pixels(6, 3, 32, 40).split(3)
    expected = learned_perceptual_image_patch_similarity(
        first / 127.5 - 1, second / 127.5 - 1, net_type=name, reduction="none"
    )
    found = distance(first, second)
    assert found.shape == (3,)
    assert found.min() > 1e-3
    assert torch.allclose(found, expected, rtol=1e-5)


def test_lpips_is_a_distance_of_each_pair(lpips) -> None:
    _, _, distance = lpips
    first, second = pixels(4, 1, 32, 32).split(2)
    assert torch.equal(distance(first, first), torch.zeros(2))
    assert torch.equal(distance(first, second), distance(second, first))
    assert torch.allclose(distance(first[:1], second[:1]), distance(first, second)[:1], rtol=1e-5)
    assert torch.equal(distance(first, second), distance(*(x.expand(-1, 3, -1, -1) for x in (first, second))))


def test_lpips_says_which_images_are_too_small(lpips) -> None:
    name, _, distance = lpips
    least = {"alex": 31, "squeeze": 17}[name]
    assert distance(pixels(1, 3, least, least), pixels(1, 3, least, 50)[..., :least]).isfinite().all()
    remedy = {"alex": "use vgg or squeeze", "squeeze": "use vgg"}[name]
    with pytest.raises(ValueError, match=rf"LPIPS={name}: needs at least {least} .*{remedy}$"):
        distance(*2 * [pixels(1, 3, least - 1, 50)])
    with pytest.raises(ValueError, match="no LPIPS network supports"):
        distance(*2 * [pixels(1, 1, 8, 8)])
    with pytest.raises(ValueError, match="uint8"):
        distance(*2 * [torch.zeros(1, 3, 32, 32)])


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_backbone_runs_no_code_and_must_be_the_right_one(tmp_path) -> None:
    path, mark = tmp_path / "backbone.pth", tmp_path / "mark"
    torch.save({"features.0.weight": Malicious(mark)}, path)
    with pytest.raises(ValueError, match=r"metric.lpips.weights=.*backbone.pth: does not have the weights"):
        LPIPSDistance("squeeze", str(path), CPU, "metric.lpips.weights")
    assert not mark.exists()
    torch.save({"features.0.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"does not have the weights"):
        LPIPSDistance("squeeze", str(path), CPU)
    with pytest.raises(UsageError, match=r"weights=.*nowhere.pth: no such file"):
        LPIPSDistance("squeeze", str(tmp_path / "nowhere.pth"), CPU)


def test_lpips_without_network_says_what_to_put_where(tmp_path, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(downloads, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UsageError, match=r"weights=null: .*alexnet-owt-7be5be79.pth.*no network"):
        LPIPSDistance("alex", None, CPU)


# --- Metrics by these networks ------------------------------------------------------------


@pytest.fixture(scope="module")
def frogs() -> tuple[NoDataset, Tensor, Tensor]:
    """Twelve images of four classes in turn, and what they belong to."""
    dataset = NoDataset("frogs", (3, 32, 32))
    dataset.class_names = ("a", "b", "tree_frog", "d")
    return dataset, pixels(12, 3, 32, 32), torch.arange(12) % 4


def found(metric, frogs, cache_dir: Path, folder: Path, batch_size: int = 5, images: Tensor | None = None):
    """The one number that a metric finds of the images, or of others in their place."""
    dataset, own, labels = frogs
    given = ExternalImages(MemoryImages(own if images is None else images, labels), dataset.class_names)
    (folder / "real").mkdir(exist_ok=True)
    for row, image in enumerate(own):
        save_png(image, folder / "real" / f"{row:02d}.png")
    (result,) = evaluate(
        {"metric": metric},
        FeatureExtractors({}, dataset, cache_dir, CPU),
        GivenSamples(given, dataset.class_names, {}, "samples"),
        GivenReference(dataset, path=str(folder / "real")),
        batch_size=batch_size,
        force=True,
    ).report.results
    return result


def test_diversity_is_the_distance_of_pairs_within_a_class(lpips, frogs, tmp_path) -> None:
    name, backbone, distance = lpips
    path = tmp_path / "backbone.pth"
    torch.save(backbone.state_dict(), path)
    _, images, _ = frogs
    # Of three images of each class the first two are a pair; the third stays alone.
    expected = distance(images[:4], images[4:8]).double()
    for batch_size in (1, 5, 12):
        result = found(
            LPIPS(network=name, weights=str(path), originals=None), frogs, tmp_path, tmp_path, batch_size
        )
        assert result.name == "lpips_diversity"
        assert result.value == pytest.approx(float(expected.mean()), rel=1e-5)
        assert result.details == pytest.approx(
            {"standard_error": float(expected.std() / 2), "pairs": 4}, rel=1e-5
        )
        assert result.protocol["features"]["digest"] == distance.digest


def test_edits_are_compared_with_their_originals_in_order(lpips, frogs, tmp_path) -> None:
    name, backbone, distance = lpips
    path = tmp_path / "backbone.pth"
    torch.save(backbone.state_dict(), path)
    _, images, _ = frogs
    edits = images.clone()
    edits[7] = 255 - edits[7]
    np.save(tmp_path / "originals.npy", images.numpy())
    metric = LPIPS(network=name, weights=str(path), originals=str(tmp_path / "originals.npy"))
    result = found(metric, frogs, tmp_path, tmp_path, images=edits)
    assert result.name == "lpips"
    assert result.value == pytest.approx(float(distance(edits[7:8], images[7:8])) / 12, rel=1e-5)
    np.save(tmp_path / "originals.npy", images[:11].numpy())
    with pytest.raises(ValueError, match=r"metric.lpips.originals=.*has 11 images, but there are 12 samples"):
        found(metric, frogs, tmp_path, tmp_path)


def test_clip_score_is_the_cosine_with_the_prompt_of_the_class(folders, frogs, tmp_path) -> None:
    metric = CLIPScore(weights=str(folders["clip"]), prompt="a {} b")
    network = made("clip", folders["clip"])
    assert isinstance(network, CLIPFeatures)
    _, images, labels = frogs
    prompts = network.text([f"a {name} b" for name in ("a", "b", "tree frog", "d")])
    scores = (100 * (network(images).features * prompts[labels]).sum(1)).clamp(min=0).double()
    result = found(metric, frogs, tmp_path, tmp_path)
    assert result.value == pytest.approx(float(scores.mean()), rel=1e-4)
    assert result.details["standard_error"] == pytest.approx(
        float(scores.std() / 12**0.5), rel=1e-3, abs=1e-6
    )
    with pytest.raises(ValueError, match=r"metric.clip_score.prompt=a photo: has no placeholder"):
        CLIPScore(weights=str(folders["clip"]), prompt="a photo")


def test_metrics_take_their_own_network_whatever_the_evaluation_chose(folders, frogs, tmp_path) -> None:
    """Of the reference itself both distances are zero; of inverted images they are not."""
    _, images, _ = frogs
    dino = FrechetDistanceDINOv2(
        weights=str(folders["dinov2"]), reference_distance=False, infinity=0, bootstrap=0
    )
    clip = CLIPDistance(weights=str(folders["clip"]), sigma=10.0, scale=1000.0)
    for metric, name in ((dino, "fd_dinov2"), (clip, "cmmd")):
        same = found(metric, frogs, tmp_path, tmp_path)
        other = found(metric, frogs, tmp_path, tmp_path, images=255 - images)
        assert same.name == name
        assert same.value == pytest.approx(0, abs=1e-9)
        assert other.value > 1e-6

"""DINOv2, CLIP and LPIPS: their numbers are those of the published code, on small random networks."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from diffusion_cli.data import Digits, ExternalImages, NoDataset
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.errors import UsageError
from diffusion_cli.images import save_png
from diffusion_cli.metrics import (
    LPIPS,
    CLIPDistance,
    CLIPFeatures,
    CLIPScore,
    DINOv2Features,
    FeatureExtractors,
    FrechetDistanceDINOv2,
    GivenReference,
    GivenSamples,
    LPIPSDistance,
    evaluate,
)
from diffusion_cli.metrics.features import clip, hub
from diffusion_cli.metrics.features.dinov2 import resampled

CPU = torch.device("cpu")
DIGITS = Digits("", val_fraction=0.2, flip=False)
NETWORKS = {"dinov2": DINOv2Features, "clip": CLIPFeatures}


def pixels(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Small networks with random weights, saved as transformers publishes them."""
    transformers = pytest.importorskip("transformers")
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dino = transformers.Dinov2Model(transformers.Dinov2Config(**layers, patch_size=14, image_size=224))
        torch.nn.init.normal_(dino.embeddings.position_embeddings)
        vision = {**layers, "intermediate_size": 64, "patch_size": 14, "image_size": 56, "projection_dim": 16}
        text = {
            **layers,
            "intermediate_size": 64,
            "vocab_size": 28,
            "max_position_embeddings": 8,
            "projection_dim": 16,
        }
        ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        clip = transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=vision, text_config=text | ends, projection_dim=16)
        )
    found = {"dinov2": tmp_path_factory.mktemp("dinov2"), "clip": tmp_path_factory.mktemp("clip")}
    dino.save_pretrained(found["dinov2"])
    clip.save_pretrained(found["clip"])
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (found["clip"] / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (found["clip"] / "merges.txt").write_text("#version: 0.2\n")
    (found["clip"] / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    return found


def made(name: str, folder: Path | str) -> DINOv2Features | CLIPFeatures:
    return NETWORKS[name](DIGITS, Path(), CPU, weights=str(folder))


@torch.no_grad()
def by_hand(name: str, folder: Path, picture: Image.Image) -> Tensor:
    """The features of a picture as the documentation of transformers takes them."""
    import transformers

    if name == "dinov2":
        kind = getattr(transformers, "BitImageProcessorPil", transformers.BitImageProcessor)
        processor = kind(
            size={"height": 224, "width": 224}, do_center_crop=False, resample=3,
            image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225),
        )  # fmt: skip
        network = transformers.Dinov2Model.from_pretrained(folder).eval()
        return network(**processor(picture, return_tensors="pt")).pooler_output
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = kind(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    network = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    embedding = network(**processor(picture, return_tensors="pt")).image_embeds
    return embedding / embedding.norm()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (300, 300), (31, 48), (90, 61)])
def test_features_are_those_that_transformers_gives_of_a_saved_png(folders, tmp_path, name, size) -> None:
    image = pixels(3, *size)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    expected = by_hand(name, folders[name], Image.open(tmp_path / "image.png"))
    found = made(name, folders[name])(image[None])
    assert torch.allclose(found.features, expected, rtol=1e-4, atol=1e-5)
    assert found.logits is None
    assert found.spatial is None


@pytest.mark.parametrize("size", [(16, 16), (16, 23), (23, 16), (225, 400), (301, 224)])
def test_clip_sees_the_pixels_of_its_published_processor(size) -> None:
    """The short side is resized to the size of the network and the centre cropped; nothing is squashed."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    image = pixels(3, *size)
    expected = kind()(Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
    found = hub.prepared(image[None], 224, clip.MEAN, clip.STD, crop=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_protocol_states_the_crop_of_clip(folders) -> None:
    square, wide = (
        CLIPFeatures(NoDataset("x", (3, 8, width)), Path(), CPU, weights=str(folders["clip"])).resize
        for width in (8, 12)
    )
    assert square == "PIL bicubic to 56x56, antialiased, 8 bits"
    assert wide == f"{square}, short side first, then centre crop"


@pytest.mark.parametrize("name", NETWORKS)
def test_features_do_not_depend_on_the_batch_and_gray_is_three_equal_channels(folders, name) -> None:
    features, images = made(name, folders[name]), pixels(5, 1, 8, 8)
    whole = features(images).features
    assert whole.shape == (5, features.dim)
    assert torch.allclose(torch.cat([features(image[None]).features for image in images]), whole, atol=1e-5)
    assert torch.equal(features(images.expand(-1, 3, -1, -1)).features, whole)
    assert (whole[0] - whole[1]).abs().max() > 1e-3


def test_dinov2_scales_its_grid_of_positions_as_published(folders) -> None:
    """Place i of 16 is taken of 37 at (i + 1/2) 37 / 16.1 - 1/2, by the cubic kernel of a = -3/4, edges repeated."""
    before, after, a = 37, 16, -0.75
    table = torch.randn(1, 1 + before**2, 3, generator=torch.Generator().manual_seed(0))
    at = (torch.arange(after, dtype=torch.float64) + 0.5) * before / (after + 0.1) - 0.5
    weights = torch.zeros(after, before, dtype=torch.float64)
    for row, place in enumerate(at):
        for near in range(int(place) - 1, int(place) + 3):
            x = abs(place - near)
            weight = (a + 2) * x**3 - (a + 3) * x**2 + 1 if x < 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[row, min(max(near, 0), before - 1)] += weight
    grid = table[0, 1:].double().reshape(before, before, 3)
    expected = torch.einsum("ir,jc,rcd->ijd", weights, weights, grid).flatten(0, 1).float()
    found = resampled(table, after)
    assert torch.equal(found[:, 0], table[:, 0])
    assert torch.allclose(found[0, 1:], expected, atol=1e-4)
    assert torch.equal(resampled(table, before), table)


def test_clip_puts_prompts_where_images_are(folders) -> None:
    transformers = pytest.importorskip("transformers")
    features, prompts = made("clip", folders["clip"]), ["a cat", "b", "a b c d e f g h i j k"]
    assert isinstance(features, CLIPFeatures)
    image = Image.fromarray(pixels(56, 56, 3).numpy())
    embedded = features(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]).features
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["clip"])
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=8, return_tensors="pt")
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    seen = kind(do_resize=False, do_center_crop=False)(image, return_tensors="pt")
    network = transformers.CLIPModel.from_pretrained(folders["clip"]).eval()
    with torch.no_grad():
        expected = network(**tokens, **seen).logits_per_image / network.logit_scale.exp()
    cosines = embedded @ features.text(prompts).T
    assert torch.allclose(cosines, expected, atol=1e-5)
    assert torch.allclose(features.text(prompts[1:2]), features.text(prompts)[1:2], atol=1e-5)
    assert cosines.std() > 1e-3


def test_clip_needs_its_tokenizer_for_prompts_only(folders, tmp_path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folders["clip"] / file).read_bytes())
    features = made("clip", tmp_path)
    assert isinstance(features, CLIPFeatures)
    assert features(pixels(1, 3, 8, 8)).features.norm() == pytest.approx(1)
    with pytest.raises(UsageError, match=r"features.weights=.*vocab.json and merges.txt"):
        features.text(["a"])


# --- What cannot be ------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch, name) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=rf"features={name}: .*pip install 'diffuse-cli\[transformers\]'"):
        made(name, "anywhere")


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_that_are_nowhere_are_one_line(folders, monkeypatch, tmp_path, name) -> None:
    architecture = {"dinov2": "Dinov2Model", "clip": "CLIPModel"}[name]
    asked = []

    def refuse(weights, local_files_only=False, **options):
        asked.append((weights, local_files_only, options["use_safetensors"]))
        raise OSError("no network.\nTry again.")

    import transformers

    monkeypatch.setattr(getattr(transformers, architecture), "from_pretrained", refuse)
    with pytest.raises(UsageError) as caught:
        made(name, "some/where")
    assert str(caught.value).startswith("features.weights=some/where: no network; give a folder with")
    assert "\n" not in str(caught.value)
    assert asked == [("some/where", True, True), ("some/where", False, True)]


@pytest.mark.parametrize("name", NETWORKS)
def test_pickled_weights_are_refused(folders, tmp_path, name) -> None:
    (tmp_path / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"features.weights=.*safetensors .*pickled"):
        made(name, tmp_path)


def test_weights_of_another_network_or_damaged_ones_are_refused(folders, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"does not have the weights of a Dinov2Model \(it has no .*token"):
        made("dinov2", folders["clip"])
    (tmp_path / "config.json").write_bytes((folders["clip"] / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folders["clip"] / "model.safetensors").read_bytes()[:-999])
    with pytest.raises(ValueError, match=r"does not have the weights of a CLIPModel"):
        made("clip", tmp_path)


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

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
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

"""DINOv2 and CLIP: their features are those of transformers, on small random networks."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_cli.data import NoDataset
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import CLIPFeatures
from diffusion_cli.metrics.features import clip, hub
from diffusion_cli.metrics.features.dinov2 import resampled
from diffusion_cli.system import pretrained
from helpers.features import NETWORKS, made, pixels

CPU = torch.device("cpu")


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
    monkeypatch.setattr(pretrained, "connect", lambda: None)
    with pytest.raises(UsageError) as caught:
        made(name, "some/where")
    assert str(caught.value).startswith(
        "features.weights=some/where: no network; use another metric or features=classifier, give a folder with"
    )
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

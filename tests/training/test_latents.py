"""Latent diffusion: the laws of the space of latents, what is kept of a data set's, and every command in them."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from test_autoencoder import PUBLISHED, SMALL
from torch import Tensor

from diffusion_cli.batch_size import network_call
from diffusion_cli.cli import run
from diffusion_cli.commands.guides import _same_latents
from diffusion_cli.config import CONF, build
from diffusion_cli.data import Dataset, Digits, Images
from diffusion_cli.data.base import Split
from diffusion_cli.data.batches import Batches
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.diffusion.latents import Latents, Pixels, measured_scale
from diffusion_cli.editing.latent import known_of
from diffusion_cli.editing.operators import Mask
from diffusion_cli.formats import HighDepthImage, Uint8Image
from diffusion_cli.generate import SamplingPipeline, generate
from diffusion_cli.networks import AutoencoderKL
from diffusion_cli.networks.autoencoder import drawn
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.runs.load import AUTOENCODER, load_model
from diffusion_cli.runs.pretrained import WEIGHTS
from diffusion_cli.runs.schema import LatentInfo
from diffusion_cli.samplers import DDIM
from diffusion_cli.training import latent_cache, latent_data
from diffusion_cli.training.latent_cache import encoded
from diffusion_cli.training.latent_data import LatentDataset
from helpers import TINY, assert_same

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

SHAPE = (1, 8, 12)
LATENT = (3, 4, 6)


def latents(seed: int = 0, mean: float = 0.5, std: float = 2.0) -> Latents:
    """Latents of a random autoencoder, far from standardised."""
    torch.manual_seed(seed)
    network = AutoencoderKL(SHAPE, None, **SMALL)
    with torch.no_grad():
        network.get_parameter("quant_conv.bias").copy_(torch.tensor([3.0, -2, 0, -1, 0, 1]))
    return Latents(network, SHAPE, [mean, -mean, 0.0], [std, 1.0, std])


def pixels(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, *SHAPE), generator=generator).to(torch.uint8)


def images(count: int = 150, seed: int = 0) -> MemoryImages:
    return MemoryImages(pixels(count, seed), torch.arange(count) % 3)


def moments_of(space: Latents, given: Tensor) -> Tensor:
    """Encoded without a cache, one image at a time."""
    with torch.no_grad():
        return torch.cat([space.moments(image[None].float() / 127.5 - 1) for image in given])


# --- The space ----------------------------------------------------------------------------


def test_images_are_encoded_to_the_standardised_mean_and_decoded_from_it():
    space, x = latents(), torch.rand(2, *SHAPE) * 2 - 1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (space.mean, space.std))
    z = space.autoencoder.moments(x).chunk(2, dim=1)[0]
    torch.testing.assert_close(space.encode(x), (z - mean) / std)
    torch.testing.assert_close(space.decode(space.encode(x)), space.autoencoder.reconstruct(x))
    assert space.shape == LATENT == space.shape_of(SHAPE)
    assert space.shape_of((1, 4, 2)) == (3, 2, 1)


def test_states_are_drawn_from_the_moments_with_the_noise_that_is_given():
    space, noise = latents(), torch.randn(4, *LATENT)
    moments = moments_of(space, pixels(4))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (space.mean, space.std))
    expected = (drawn(moments, noise) - mean) / std
    torch.testing.assert_close(space.states(moments, lambda shape: noise.view(shape)), expected)


def test_neither_the_size_of_a_batch_nor_autocast_changes_what_is_encoded(monkeypatch):
    space, x = latents(), torch.rand(5, *SHAPE) * 2 - 1
    whole, back = space.encode(x), space.decode(torch.ones(5, *LATENT))
    monkeypatch.setattr("diffusion_cli.diffusion.latents.PIXELS", 2 * 8 * 12)  # two images at a time
    seen: list[int] = []
    space.autoencoder.encoder.register_forward_hook(lambda module, given, made: seen.append(len(made)))
    space.autoencoder.decoder.register_forward_hook(lambda module, given, made: seen.append(len(made)))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(space.encode(x), whole)
        torch.testing.assert_close(space.decode(torch.ones(5, *LATENT)), back)
    assert seen == [2, 2, 1] * 2
    assert whole.dtype == torch.float32


def test_the_measured_scale_is_that_of_brute_force_draws():
    space, given = latents(), moments_of(latents(), pixels(20))
    mean, std, told = measured_scale(given.split(7), 3)
    torch.manual_seed(0)
    draws = torch.cat([drawn(given, torch.randn(20, *LATENT)) for _ in range(200)]).double()
    error = 5 * np.array(std) / np.sqrt(200 * 20 * 24)  # five standard errors
    assert (np.abs(np.array(mean) - draws.mean((0, 2, 3)).numpy()) < error).all()
    assert np.array(std) == pytest.approx(draws.std((0, 2, 3)).numpy(), rel=0.02)
    of_images = given.double().chunk(2, dim=1)[0].transpose(0, 1).flatten(1).var(1, correction=0).numpy()
    np.testing.assert_allclose(told, of_images / np.square(std))
    assert max(abs(value) for value in mean) > 1  # there was something to take off
    both = torch.cat([given, moments_of(space, pixels(20).flip(-1))], 1)
    apart = torch.cat(both.chunk(2, dim=1))
    np.testing.assert_allclose(measured_scale([both], 3), measured_scale([apart], 3), rtol=1e-9)


# --- What is kept of a data set's -----------------------------------------------------------


class Some(Dataset):
    """Random images with a place in the cache; each read is counted."""

    def __init__(self, seed: int = 0, flip: bool = False) -> None:
        super().__init__("")
        self.name, self.shape, self.class_names, self.flip = "some", SHAPE, ("a", "b", "c"), flip
        self.seed, self.loads = seed, 0

    def load(self, split: str) -> Images:
        self.loads += 1
        return images(150 if split == "train" else 20, self.seed if split == "train" else 99)


@pytest.mark.parametrize("flip", [False, True])
def test_a_data_set_s_latents_are_standardised_by_the_training_images_alone(tmp_path, flip):
    space = latents(mean=0, std=1)
    dataset = LatentDataset(Some(flip=flip), space, tmp_path)
    train = dataset.load("train")
    scale = space.mean, space.std
    moments = torch.cat(train[torch.arange(150)].split(6, dim=1))
    # Noise of 1 and -1 in turn has the mean and variance of all noise, to the last digit.
    states = torch.cat(
        [space.states(moments, lambda shape, of=of: torch.full(shape, of)) for of in (-1.0, 1.0)]
    )
    assert states.mean((0, 2, 3)).abs().max() < 1e-5
    assert (states.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    dataset.load("val")
    assert scale == (space.mean, space.std)
    assert train.labels is not None
    assert train.labels.tolist() == [row % 3 for row in range(150)]


@pytest.mark.parametrize("flip", [False, True])
def test_kept_latents_are_those_that_are_computed_anew(tmp_path, flip):
    space, source = latents(), images()
    kept = encoded(source, space, tmp_path / "some" / "moments.npy", flip)
    rows = torch.tensor([3, 149, 64])
    fresh = moments_of(space, source.pixels[rows])
    if flip:
        mirrored = moments_of(space, source.pixels[rows].flip(-1))
        torch.testing.assert_close(
            kept.hflip(kept[rows], torch.tensor([0, 1, 0]))[1], mirrored[1], rtol=0, atol=1e-5
        )
        fresh = torch.cat([fresh, mirrored], 1)
    torch.testing.assert_close(kept[rows], fresh, rtol=0, atol=1e-5)
    again = encoded(source, space, tmp_path / "some" / "moments.npy", flip)
    assert torch.equal(again.pixels, kept.pixels)


def test_batches_of_latents_are_mirrored_as_those_of_their_images(tmp_path):
    space, source = latents(), images()
    kept = encoded(source, space, tmp_path / "some" / "moments.npy", flip=True)
    of_images, of_latents = (iter(Batches(given, 16, 3, True)) for given in (source, kept))
    for _ in range(12):
        seen, found = next(of_images), next(of_latents)
        assert torch.equal(seen.index, found.index)
        with torch.no_grad():
            torch.testing.assert_close(found.images, space.moments(seen.images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.003, 0.5, 0.999, 1.0])
def test_encoding_cut_off_anywhere_goes_on_to_the_same_file(tmp_path, share):
    space, source, path = latents(), images(), tmp_path / "some" / "moments.npy"
    encoded(source, space, path)
    whole = path.read_bytes()
    path.rename(path.with_name("moments.part"))
    os.truncate(path.with_name("moments.part"), int(share * len(whole)))
    encoded(source, space, path)
    assert path.read_bytes() == whole
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.crc32"}


@pytest.mark.parametrize("version", ["now", "earlier"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_damaged_latents_are_encoded_again_from_the_damage_on(tmp_path, capsys, monkeypatch, block, version):
    space, source, path = latents(), images(), tmp_path / "some" / "moments.npy"
    encoded(source, space, path)
    whole = path.read_bytes()
    if version == "earlier":
        (tmp_path / "some" / "moments.npy.crc32").unlink()
        encoded(source, space, path)
    damaged = bytearray(whole)
    row = (len(whole) - 128) // 150
    damaged[128 + row * (64 * block + 5)] ^= 1
    path.write_bytes(damaged)
    seen: list[int] = []
    encode = Latents.moments
    monkeypatch.setattr(
        Latents, "moments", lambda self, given: seen.append(len(given)) or encode(self, given)
    )
    encoded(source, space, path)
    assert path.read_bytes() == whole
    assert seen == [64, 64, 22][block:]
    assert capsys.readouterr().err.startswith(f"diffuse: {path}: is damaged (block {block} of 3 differs")


def test_large_latents_are_checked_while_they_are_used(tmp_path, monkeypatch):
    space, source, path = latents(), images(), tmp_path / "some" / "moments.npy"
    encoded(source, space, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    monkeypatch.setattr(latent_cache, "CHECKED_AT_ONCE", 0)
    kept = encoded(source, space, path)
    kept[torch.tensor([3, 127])]
    with pytest.raises(
        ValueError, match=r"moments.npy: is damaged \(block 2 of 3 .*; run the command again to encode"
    ):
        kept[torch.tensor([3, 128])]
    encoded(source, space, path)
    assert path.read_bytes() == whole


def test_what_was_encoded_before_a_stop_is_not_encoded_again(tmp_path, monkeypatch):
    space, source, path = latents(), images(), tmp_path / "some" / "moments.npy"
    seen: list[int] = []
    encode = Latents.moments

    def until_the_third(self: Latents, given: Tensor) -> Tensor:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(given))
        return encode(self, given)

    monkeypatch.setattr(Latents, "moments", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        encoded(source, space, path)
    monkeypatch.setattr(
        Latents, "moments", lambda self, given: seen.append(len(given)) or encode(self, given)
    )
    encoded(source, space, path)
    assert seen == [64, 64, 22]


def test_other_images_or_another_autoencoder_have_another_name_and_equal_ones_the_same(tmp_path):
    def keys(source: Dataset, space: Latents) -> dict[Split, str]:
        dataset = LatentDataset(source, space, tmp_path)
        dataset.load("train")
        return dataset.keys

    first = keys(Some(), latents())
    assert keys(Some(), latents()) == first
    assert len(list(tmp_path.iterdir())) == 1
    others = [
        keys(source, space)["train"]
        for source, space in [(Some(1), latents()), (Some(), latents(1)), (Some(flip=True), latents())]
    ]
    assert len({first["train"], *others}) == 4 == len([*tmp_path.iterdir()])


def test_a_run_that_knows_the_names_looks_at_no_scale_again(tmp_path):
    first = LatentDataset(Some(), latents(), tmp_path)
    first.load("train")
    space = latents()
    space.mean = [9.0, 9.0, 9.0]
    later = LatentDataset(Some(), space, tmp_path, first.keys)
    later.load("train")
    assert space.mean == [9.0, 9.0, 9.0]


def test_a_file_of_other_images_is_refused_in_a_line(tmp_path):
    path = tmp_path / "some" / "moments.npy"
    encoded(images(20), latents(), path)
    with pytest.raises(
        ValueError,
        match=r"moments.npy: has another shape or type than the latents of these images; remove it",
    ):
        encoded(images(21), latents(), path)
    with pytest.raises(ValueError, match="has another shape or type"):
        encoded(images(20), latents(), path, flip=True)
    np.save(path, np.zeros((20, 6, 4, 6)))
    with pytest.raises(ValueError, match="has another shape or type"):
        encoded(images(20), latents(), path)


def test_an_autoencoder_that_makes_nothing_of_a_channel_is_refused_in_a_line(tmp_path):
    space = latents()
    with torch.no_grad():
        for name, value in (("weight", 0.0), ("bias", -100.0)):  # the least log variance, -30, and no mean
            space.autoencoder.get_parameter(f"quant_conv.{name}")[1::3] = value
    with pytest.raises(ValueError, match=r"latent: channel 1 of the latents is constant"):
        LatentDataset(Some(), space, tmp_path).load("train")


def test_a_channel_that_holds_hardly_more_than_noise_is_named(tmp_path, capsys):
    space = latents()
    with torch.no_grad():
        for name in ("weight", "bias"):  # a standard normal, as the divergence wants it
            space.autoencoder.get_parameter(f"quant_conv.{name}")[1::3] = 0.0
    LatentDataset(Some(), space, tmp_path).load("train")
    assert (
        "latent: channel 1 of the latents is mostly noise (the images explain 0 of its"
        in capsys.readouterr().err
    )


def test_latents_that_are_not_finite_are_refused(tmp_path):
    space = latents()
    with torch.no_grad():
        space.autoencoder.get_parameter("quant_conv.bias")[0] = torch.nan
    with pytest.raises(ValueError, match="latent: the latents of the training images are not finite"):
        LatentDataset(Some(), space, tmp_path).load("train")


def test_a_disk_without_room_for_the_latents_is_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**4))
    with pytest.raises(
        ValueError, match=r"cache_dir=.*: the latents need 0.0 GB, but only 0.0 GB are free; free some space"
    ):
        encoded(images(), latents(), tmp_path / "a" / "moments.npy")
    assert not list(tmp_path.glob("a/*.npy"))


def test_a_latent_is_known_where_all_its_pixels_are():
    known = torch.ones(1, 1, 8, 12, dtype=torch.bool)
    known[..., 3, 5] = False
    space, x = latents(), torch.rand(2, *SHAPE)
    operator, y = known_of(space, Mask(known), x * known)
    assert isinstance(operator, Mask)
    assert (~operator.known).nonzero().tolist() == [[0, 0, 1, 2]]
    torch.testing.assert_close(y, space.encode(x * known) * operator.known)
    assert known_of(Pixels(SHAPE), Mask(known), x)[1] is x


def test_latents_that_were_removed_are_made_again_of_the_same_images_only(tmp_path):
    first = LatentDataset(Some(), latents(), tmp_path)
    kept = first.load("train")[torch.arange(150)].clone()
    shutil.rmtree(tmp_path)
    again = LatentDataset(Some(), latents(), tmp_path, first.keys).load("train")
    assert torch.equal(again[torch.arange(150)], kept)
    shutil.rmtree(tmp_path)
    with pytest.raises(
        ValueError, match="the train images differ from those that the run started with; restore"
    ):
        LatentDataset(Some(1), latents(), tmp_path, first.keys).load("train")


# --- The commands -------------------------------------------------------------------------

AUTOENCODING = [
    "task=autoencoder", "model.channel_mult=[1,2]", "model.latent_channels=3", "optimizer.lr=0.005", "name=ae",
]  # fmt: skip
NO_AUTOENCODER = ("model.num_heads=1", "model.head_channels=null", "name=tiny")
FEATURES = ["features=classifier", "features.steps=20"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A folder with an autoencoder `ae`, denoisers `a`, `b` and a classifier `c` of its latents, and some of pixels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("latents")
    words = [word for word in TINY if word not in NO_AUTOENCODER]
    assert run([*words, *AUTOENCODING, f"output_dir={folder}/o", "max_steps=20"]) == 0
    told = "model.class_conditional=true"
    for name, more in {
        "a": ["latent.run=ae", "max_steps=6", told],
        "b": ["latent.run=ae", "max_steps=3", told, "seed=1"],
        "c": ["latent.run=ae", "max_steps=3", "task=classifier"],
        "pixels": ["max_steps=3", told],
        "pixel_classifier": ["max_steps=3", "task=classifier"],
    }.items():
        assert train(folder, f"name={name}", *more) == 0
    yield folder
    torch.set_num_threads(threads)


def train(place: Path, *words: str) -> int:
    return run([*TINY, f"output_dir={place}/o", f"cache_dir={place}/cache", *words])


def call(place: Path, command: str, *words: str) -> int:
    return run([command, "run=a", f"output_dir={place}/o", *words])


def refused(capsys, line: str) -> None:
    said = capsys.readouterr().err
    assert line in said
    assert "Traceback" not in said


def test_a_run_taken_up_again_equals_one_without_a_stop(place):
    told = ["model.class_conditional=true", "latent.run=ae"]
    assert train(place, "name=parts", *told, "max_steps=2") == 0
    assert train(place, "name=parts", *told, "max_steps=6") == 0
    whole, parts = (read(place / "o" / name / LAST).state for name in ("a", "parts"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(whole[key], parts[key], key)
    assert whole["diffuse"]["latent"] == parts["diffuse"]["latent"]
    assert not any("autoencoder" in name for name in whole["state_dict"])


def test_what_a_run_works_in_are_the_standardised_latents_of_its_training_images(place):
    model = load_model(place / "o" / "a", "ema", torch.device("cpu"))
    assert isinstance(model.space, Latents)
    assert (model.shape, model.space.shape) == ((1, 8, 8), (3, 4, 4))
    given = Digits("", val_fraction=0.2, flip=False).load("train")
    moments = model.space.moments(given[torch.arange(len(given))].float() / 127.5 - 1)
    mean, std, _ = measured_scale([moments], 3)
    np.testing.assert_allclose(mean, model.space.mean, rtol=0, atol=1e-3)
    np.testing.assert_allclose(std, model.space.std, rtol=1e-3)


def test_samples_are_decoded_and_need_nothing_but_the_run_s_own_folder(place, tmp_path):
    words = ["steps=3", "num_samples=5", "strip=true", "gif=true", "precision=fp32"]
    assert call(place, "sample", *words, f"output={tmp_path}/here") == 0
    shutil.copytree(place / "o" / "a", tmp_path / "moved")
    there = [f"output={tmp_path}/there", "batch_size=2"]
    assert run(["sample", f"run={tmp_path}/moved", f"output_dir={tmp_path}/none", *words, *there]) == 0
    for name in ("000000.png", "000004.png", "strip.png", "denoising.gif"):
        assert (tmp_path / "here" / name).is_file()
    with (
        Image.open(tmp_path / "here" / "000003.png") as one,
        Image.open(tmp_path / "there" / "000003.png") as other,
    ):
        assert one.size == (8, 8)
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.parametrize("name", sorted(file.stem for file in CONF.glob("sampler/*.yaml")))
def test_every_sampler_makes_images_of_latents(place, name):
    model = load_model(place / "o" / "a", "ema", torch.device("cpu"))
    node = yaml.safe_load((CONF / "sampler" / f"{name}.yaml").read_text())
    sampler = build(node, model.denoiser.schedule)
    pipeline = SamplingPipeline(
        model=model, sampler=sampler, steps=4, guidance=NoGuidance(), labels=[3], clip=True, precision="fp32"
    )
    images = torch.cat([made.images for made in generate(pipeline, [0, 1], 2)])
    assert images.shape == (2, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    "words",
    [
        ["guidance=cfg", "guidance.scale=2"],
        ["guidance=auto", "guidance.run=b"],
        ["guidance=auto", "guidance.step=5"],
        ["guidance=classifier", "guidance.run=c"],
    ],
)
def test_every_guidance_guides_in_latents(place, words):
    assert call(place, "sample", "steps=3", "num_samples=2", *words) == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["guidance=auto", "guidance.run=pixels"], "works on pixels, but the model works on latents"),
        (
            ["guidance=classifier", "guidance.run=pixel_classifier"],
            "works on pixels, but the model works on latents",
        ),
        (
            ["run=pixels", "guidance=classifier", "guidance.run=c"],
            "works on latents, but the model works on pixels",
        ),
        (
            ["run=pixels", "guidance=auto", "guidance.run=b"],
            "works on latents, but the model works on pixels",
        ),
        (
            ["guidance=cfg", "guidance.dynamic_threshold=0.9"],
            "guidance.dynamic_threshold=0.9: works on pixels, but the model works on latents; leave it null",
        ),
    ],
)
def test_what_does_not_guide_in_the_same_space_is_refused_in_a_line(place, capsys, words, line):
    words = words if words[0].startswith("run=") else ["run=a", *words]
    assert run(["sample", f"output_dir={place}/o", "steps=2", "num_samples=1", *words]) == 2
    refused(capsys, line)


def test_guides_of_other_latents_are_refused_but_not_for_rounding():
    mine = LatentInfo(
        shape=(3, 4, 4),
        mean=[1.0, 0.0, 0.0],
        std=[1.0, 2.0, 3.0],
        autoencoder={},
        sha256="a",
        source="",
        cache={},
    )
    assert _same_latents(mine, mine.model_copy(update={"mean": [1 + 1e-6, 1e-6, 0.0]}))
    assert _same_latents(None, None)
    for other in ({"sha256": "b"}, {"std": [1.0, 2.0, 3.1]}, {"shape": (3, 8, 8)}):
        assert not _same_latents(mine, mine.model_copy(update=other))
    assert not _same_latents(mine, None)


@pytest.mark.parametrize(
    "words",
    [
        ["edit=img2img"],
        ["edit=reconstruct"],
        ["edit=interpolate", "edit.frames=3"],
        ["edit=attribute", "edit.source=1", "label=3"],
        ["edit=outpaint", "edit.left=2"],
        ["edit=super_resolution", "restoration=dps"],
        [
            "edit=inpaint",
            "restoration=dps",
            "guidance=classifier",
            "guidance.run=c",
            "label=3",
            "batch_size=auto",
        ],
    ],
)
def test_every_edit_works_in_latents(place, tmp_path, words):
    given = ["input=val", "num_images=2", "steps=3", f"output={tmp_path}/edit"]
    assert call(place, "edit", *given, *words) == 0
    assert (tmp_path / "edit" / "grid.png").is_file()


@pytest.mark.parametrize("gradient", [False, True])
def test_what_fits_counts_the_decoder_where_gradients_pass_through_it(place, monkeypatch, gradient):
    model = load_model(place / "o" / "a", "ema", torch.device("cpu"))
    decode, decoded = model.space.decode, []
    monkeypatch.setattr(model.space, "decode", lambda x: decoded.append(len(x)) or decode(x))
    sampler = DDIM(model.denoiser.schedule, eta=0.0, spacing="leading")
    pipeline = SamplingPipeline(
        model=model, sampler=sampler, steps=3, guidance=NoGuidance(), labels=None, clip=True, precision="fp32"
    )
    network_call(pipeline, each=2, gradient=gradient)(3)
    assert decoded == ([6] if gradient else [])


def test_noise_of_seeds_is_interpolated_between_what_they_are_sampled_to(place, tmp_path):
    steps = ["steps=3", "precision=fp32"]
    words = ["edit=interpolate", "edit.seeds=[0,1]", "edit.frames=3", "label=3", f"output={tmp_path}/way"]
    assert call(place, "edit", *steps, *words) == 0
    assert call(place, "sample", *steps, "num_samples=2", "label=3", f"output={tmp_path}/ends") == 0
    frames, ends = (sorted(tmp_path.glob(f"{name}/[0-9]*.png")) for name in ("way/*", "ends"))
    for frame, end in ((frames[0], ends[0]), (frames[2], ends[1])):
        with Image.open(frame) as one, Image.open(end) as other:
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.parametrize("method", ["replacement", "repaint", "dps"])
def test_known_pixels_stay_to_the_bit(place, tmp_path, method):
    image = Digits("", val_fraction=0.2, flip=False).load("val")[torch.tensor([7])][0, 0].numpy()
    Image.fromarray(image).save(tmp_path / "image.png")
    words = [
        "edit=inpaint",
        "edit.mask=[1,2,4,7]",
        f"restoration={method}",
        f"output={tmp_path}/edit",
        "steps=4",
    ]
    assert call(place, "edit", f"input={tmp_path}/image.png", *words) == 0
    with Image.open(tmp_path / "edit" / "image.png") as result:
        made = np.asarray(result)
    painted = np.zeros((8, 8), bool)
    painted[2:7, 1:4] = True
    assert (made[~painted] == image[~painted]).all()
    assert (made[painted] != image[painted]).any()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["edit=super_resolution"],
            "restoration=repaint with edit=super_resolution: works on pixels, but the model works on latents; use",
        ),
        (
            ["edit=super_resolution", "restoration=replacement"],
            "restoration=replacement with edit=super_resolution: works on pixels, but the model works on latents",
        ),
        (
            ["edit=outpaint", "edit.left=1"],
            "results have 9 x 8 pixels, but the autoencoder downsamples by 2",
        ),
    ],
)
def test_edits_that_latents_know_nothing_of_are_refused_before_anything_is_made(
    place, capsys, tmp_path, words, line
):
    given = ["input=val", "num_images=1", "steps=2", f"output={tmp_path}/edit"]
    assert call(place, "edit", *given, *words) == 2
    refused(capsys, line)
    assert not (tmp_path / "edit").exists()


def measured(place: Path, *words: str) -> dict[str, float]:
    """The first number of an evaluation of `a`, with its details."""
    assert call(place, "eval", f"cache_dir={place}/cache", *words) == 0
    result = json.loads((place / "o" / "a" / "metrics.json").read_text())[-1]["results"][0]
    return {"value": result["value"], **result["details"]}


def test_the_latents_of_validation_images_have_mean_0_and_standard_deviation_1(place):
    found = measured(place, "metric=latents", "batch_size=100")
    values = [abs(found[f"mean_{i}"]) for i in range(3)] + [abs(found[f"std_{i}"] - 1) for i in range(3)]
    assert found["value"] == max(values)
    assert found["value"] < 0.1
    assert found["images"] == 359
    assert measured(place, "metric=latents", "metric.latents.split=train")["value"] < 1e-3


def test_inversion_has_no_smaller_error_than_the_autoencoder(place):
    model = load_model(place / "o" / "a", "ema", torch.device("cpu"))
    x = Digits("", val_fraction=0.2, flip=False).load("val")[torch.arange(50)].float() / 127.5 - 1
    alone = 127.5 * (model.space.decode(model.space.encode(x)) - x).square().flatten(1).mean(1).mean().sqrt()
    words = ["metric=inversion", "metric.inversion.num_images=50", "metric.inversion.steps=100"]
    found = measured(place, *words, "metric.inversion.strength=0.01")
    assert found["value"] == pytest.approx(float(alone), rel=0.02)  # next to no way to go


def test_samples_of_latents_are_measured_and_compared(place, tmp_path):
    words = [*FEATURES, "metric=fid", "num_samples=80", f"cache_dir={place}/cache"]
    assert call(place, "compare", *words, "steps=[1,2]", f"output={tmp_path}/compared") == 0
    assert (tmp_path / "compared" / "plot.png").is_file()
    assert call(place, "report", f"output={tmp_path}/report.html") == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["metric=bits_per_dim"],
            "metric=bound: needs a pixel-space model",
        ),
        (["metric=flow_likelihood"], "metric=flow_likelihood: needs a pixel-space model"),
        (
            ["run=pixels", "metric=latents"],
            "metric=latents: applies to latent models, but the model works in pixels",
        ),
    ],
)
def test_numbers_that_a_space_does_not_have_are_refused_in_a_line(place, capsys, words, line):
    words = words if words[0].startswith("run=") else ["run=a", *words]
    assert run(["eval", f"output_dir={place}/o", f"cache_dir={place}/cache", *words]) == 2
    refused(capsys, line)


def published(folder: Path, channels: int) -> Path:
    """A random autoencoder as diffusers writes it."""
    torch.manual_seed(0)
    network = AutoencoderKL((channels, 8, 8), None, **SMALL)
    about = json.loads((PUBLISHED / "config.json").read_text()) | {
        "in_channels": channels,
        "out_channels": channels,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(about))
    save_file(network.state_dict(), folder / WEIGHTS)
    return folder


def test_published_weights_give_the_space_and_training_measures_on_the_way(place, tmp_path):
    folder = published(tmp_path / "vae", 1)
    words = ["max_steps=2", "eval_every=2", "eval_samples=80", "eval_steps=2", "preview_every=2", *FEATURES]
    assert train(place, "name=published", f"latent.pretrained={folder}", *words) == 0
    model = load_model(place / "o" / "published", "ema", torch.device("cpu"))
    assert isinstance(model.space, Latents)
    weights = load_file(folder / WEIGHTS)
    assert all(
        torch.equal(weights[name], tensor) for name, tensor in model.space.autoencoder.state_dict().items()
    )
    assert (place / "o" / "published" / "previews" / "step_00000002.png").is_file()
    shutil.rmtree(folder)
    assert train(place, "name=published", f"latent.pretrained={folder}", *words, "max_steps=3") == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-5]), "not fully covered"),
        (
            lambda file: file.write_bytes(file.read_bytes()[:-4] + b"abcd"),
            "is not the autoencoder that the run was trained",
        ),
        (lambda file: save_file({"a": torch.zeros(1)}, file), "more than the 1 stored tensors"),
    ],
    ids=["missing", "cut", "changed", "another"],
)
def test_a_run_without_its_own_autoencoder_is_refused_in_a_line(place, tmp_path, capsys, change, words):
    folder = Path(shutil.copytree(place / "o" / "a", tmp_path / "a"))
    change(folder / AUTOENCODER)
    assert run(["sample", f"run={folder}", "steps=2", "num_samples=1"]) == 2
    refused(capsys, f"{AUTOENCODER}: the autoencoder of the run cannot be read (")
    with pytest.raises(ValueError, match=words):
        load_model(folder, "ema", torch.device("cpu"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["latent.run=a"], "was trained with task=diffusion; give a run of task=autoencoder"),
        (["latent.run=none"], "latent.run=none: does not exist"),
        (
            ["latent.run=ae", "latent.pretrained=b"],
            "latent.pretrained=b: conflicts with latent.run",
        ),
        (
            [f"latent.pretrained={PUBLISHED}"],
            "encodes images with 2 channels, but those of digits have 1 (size 8x8); use another",
        ),
        (["latent.pretrained=nowhere"], "latent.pretrained=nowhere: contains no readable AutoencoderKL"),
        (["latent.run=ae", "progressive=[4,8]"], "progressive=[4, 8]: latents have one fixed size"),
        (["name=a", "model.class_conditional=true"], "latent.run=null: the run in"),
        (["name=a", "model.class_conditional=true", "latent.run=other"], "latent.run=other: the run in"),
        (
            ["latent.run=ae", "dataset=gaussian_mixture", "dataset.shape=[1,1,4]"],
            "latent.run=ae: downsamples by 2, which does not divide the image size 1x4",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(place, capsys, words, line):
    name = [] if words[0].startswith("name=") else ["name=wrong"]
    assert train(place, *name, *words, "max_steps=8") == 2
    refused(capsys, line)
    assert not (place / "o" / "wrong").exists()


def test_an_autoencoder_for_other_values_is_refused_with_the_values(tmp_path, monkeypatch):
    form = HighDepthImage(dtype="float32", low=[0.0], high=[2.0], file="tiff")
    data: Any = SimpleNamespace(name="photos", form=replace(form, high=[1.0]))
    monkeypatch.setattr(
        latent_data, "load_autoencoder", lambda *_: SimpleNamespace(info=SimpleNamespace(form=form))
    )
    line = r"^latent\.run=ae: was trained on images with high=\[2\.0\], but those of photos have high=\[1\.0\]; use"
    with pytest.raises(ValueError, match=line):
        latent_data.run_latents(tmp_path, "ae", data, torch.device("cpu"))
    data.form = Uint8Image()
    with pytest.raises(
        ValueError, match=r"was trained on images with kind=.*, but those of photos have kind=picture;"
    ):
        latent_data.run_latents(tmp_path, "ae", data, torch.device("cpu"))


def test_processes_change_neither_the_latents_nor_what_is_learned(place, tmp_path):
    alone, shared = (tmp_path / name for name in ("one", "two"))
    for folder, more in ((alone, []), (shared, ["trainer.devices=2"])):
        words = [
            f"output_dir={folder}",
            f"cache_dir={folder}/cache",
            f"latent.run={place}/o/ae",
            "max_steps=6",
        ]
        assert run([*TINY, *words, *more]) == 0
    kept = [sorted(folder.glob("cache/latents-*/moments.npy")) for folder in (alone, shared)]
    assert [path.parent.name for path in kept[0]] == [path.parent.name for path in kept[1]]
    for one, other in zip(*kept, strict=True):
        np.testing.assert_allclose(np.load(one), np.load(other), rtol=0, atol=1e-5)
    weights = [read(folder / "tiny" / LAST).state["state_dict"] for folder in (alone, shared)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)

"""The latents of a data set: exact scale, cache and damage."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_cli.conditions.operators import Mask
from diffusion_cli.data import Dataset, Images
from diffusion_cli.data.base import Split
from diffusion_cli.data.batches import Batches
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.diffusion.latents import Latents, Pixels, measured_scale
from diffusion_cli.editing.latent import known_of
from diffusion_cli.networks import AutoencoderKL
from diffusion_cli.networks.autoencoder import drawn
from diffusion_cli.training import latent_cache
from diffusion_cli.training.latent_cache import encoded
from diffusion_cli.training.latent_data import LatentDataset
from helpers.autoencoders import SMALL

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


# --- The space ------------------------------------------------------------


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


# --- What is kept of a data set's ------------------------------------------------------------


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

"""Decoding and resizing of image files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from diffusion_cli.data.decoding import ImageDecoder
from helpers.data import folder, save, write_images, zipped

RNG = np.random.default_rng(0)


def pixels_of(path: Path, **changes) -> np.ndarray:
    """The one image in a folder, as [C, H, W] integers."""
    images = folder(path, **changes).load("train")
    assert len(images) == 1
    return images[torch.tensor([0])][0].numpy().astype(int)


def test_files_are_known_by_their_bytes_and_how_they_are_decoded(tmp_path, monkeypatch):
    source = write_images(tmp_path / "images", 4)
    archive = zipped(source, tmp_path / "images.zip")
    monkeypatch.setattr(ImageDecoder, "__call__", lambda *_: pytest.fail("decoded"))

    def known(path: Path = source, **changes) -> tuple[bytes, ...]:
        images = folder(path, depth="8", in_memory=False, **changes).stream("train")
        return tuple(images.sources(torch.arange(len(images))))

    first = known()
    assert known(archive) == known(flip=True) == first
    others = {known(resolution=4), known(background="black"), known(channels=1)}
    data = (source / "a" / "0.png").read_bytes()
    (source / "a" / "0.png").write_bytes((source / "a" / "2.png").read_bytes())
    others.add(known())
    (source / "a" / "2.png").write_bytes(data)  # the two in the other order
    others.add(known())
    assert len(others | {first}) == 6


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_a_square_of_the_right_size_is_read_exactly(tmp_path, suffix):
    image = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    save(tmp_path / f"x.{suffix.upper()}", image, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(pixels_of(tmp_path), image.transpose(2, 0, 1))


def test_jpeg_is_read_as_pillow_decodes_it(tmp_path):
    path = save(tmp_path / "x.jpg", RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    np.testing.assert_array_equal(pixels_of(tmp_path), np.asarray(Image.open(path)).transpose(2, 0, 1))


def test_colour_to_gray_is_luma_and_gray_to_colour_repeats(tmp_path):
    save(tmp_path / "colour/x.png", np.full((8, 8, 3), [200, 100, 50], np.uint8))
    gray = pixels_of(tmp_path / "colour", channels=1)
    assert gray.shape == (1, 8, 8)
    np.testing.assert_allclose(gray, 0.299 * 200 + 0.587 * 100 + 0.114 * 50, atol=0.5)
    save(tmp_path / "gray/x.png", np.arange(64, dtype=np.uint8).reshape(8, 8))
    np.testing.assert_array_equal(pixels_of(tmp_path / "gray"), [np.arange(64).reshape(8, 8)] * 3)


@pytest.mark.parametrize(("background", "beneath"), [("white", 255), ("black", 0)])
def test_transparency_lies_on_the_background(tmp_path, background, beneath):
    image = np.full((8, 8, 4), [200, 100, 50, 128], np.uint8)
    image[0, :, 3] = 0
    save(tmp_path / "rgba/x.png", image)
    pixels = pixels_of(tmp_path / "rgba", background=background)
    assert (pixels[:, 0] == beneath).all()
    expected = np.array([200, 100, 50]) * 128 / 255 + beneath * 127 / 255
    np.testing.assert_allclose(pixels[:, 1:].mean((1, 2)), expected, atol=1)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    save(tmp_path / "palette/x.png", palette, transparency=1)
    assert (pixels_of(tmp_path / "palette", background=background) == beneath).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_gray_keeps_its_range(tmp_path, suffix):
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    save(tmp_path / f"x.{suffix}", values)
    np.testing.assert_array_equal(pixels_of(tmp_path, channels=1, depth=8)[0], np.rint(values / 257))


def test_floating_point_pixels_are_refused_by_name(tmp_path):
    save(tmp_path / "x.tif", np.zeros((8, 8), np.float32))
    with pytest.raises(ValueError, match=r"x\.tif.*floating-point"):
        pixels_of(tmp_path, depth=8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_the_camera_is_honoured(tmp_path, orientation):
    upright = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stored = {  # how a camera stores what is seen as `upright`
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "x.png", np.ascontiguousarray(stored), exif=exif)
    np.testing.assert_array_equal(pixels_of(tmp_path), upright.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(427, 427), (517, 301), (205, 641)])
def test_a_large_photo_is_within_a_gray_value_of_resizing_all_of_it(tmp_path, size, orientation):
    photo = Image.fromarray(load_sample_images().images[0]).resize(size, Image.Resampling.LANCZOS)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "x.jpg", photo, quality=90, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    square = ImageOps.fit(upright, (32, 32), Image.Resampling.LANCZOS)
    difference = np.abs(
        pixels_of(tmp_path, resolution=32) - np.asarray(square).astype(int).transpose(2, 0, 1)
    )
    assert 0 < difference.mean() < 1
    assert difference.max() < 20


@pytest.mark.parametrize(("side", "resolution"), [(65, 4), (81, 5), (67, 8)])
def test_a_jpeg_far_larger_than_wanted_keeps_to_its_edges(tmp_path, side, resolution):
    gray = np.full((side, side, 3), 90, np.uint8)
    path = save(tmp_path / "x.jpg", gray, quality=95)
    pixels = ImageDecoder((3, resolution, resolution), "white", False)(path.read_bytes())
    assert np.abs(pixels.astype(int) - 90).max() <= 2


def test_a_jpeg_of_less_than_four_times_the_size_is_decoded_whole(tmp_path):
    path = save(tmp_path / "x.jpg", RNG.integers(0, 256, (31, 31, 3), dtype=np.uint8))
    square = Image.open(path).resize((8, 8), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(pixels_of(tmp_path), np.asarray(square).transpose(2, 0, 1))


def test_the_centre_is_kept_and_the_short_side_resized(tmp_path):
    wide = np.zeros((16, 50, 3), np.uint8)
    wide[:, 17:33] = [10, 200, 30]
    save(tmp_path / "x.png", wide)
    pixels = pixels_of(tmp_path)
    # Lanczos reaches three pixels of the result beyond its own: the middle must not know of the outside.
    np.testing.assert_array_equal(
        pixels[:, :, 3:5], np.broadcast_to(np.reshape([10, 200, 30], (3, 1, 1)), (3, 8, 2))
    )
    np.testing.assert_array_equal(pixels_of(tmp_path, resolution=16)[1], np.full((16, 16), 200))


def test_shrinking_averages_instead_of_skipping_pixels(tmp_path):
    checker = np.indices((64, 64)).sum(0) % 2 * 255
    save(tmp_path / "x.png", checker.astype(np.uint8))
    np.testing.assert_allclose(pixels_of(tmp_path), 127.5, atol=4)


def test_broken_files_are_counted_and_named_by_reason(tmp_path):
    write_images(tmp_path, 4)
    whole = (tmp_path / "a/0.png").read_bytes()
    (tmp_path / "a/cut.png").write_bytes(whole[: len(whole) // 2])
    for number in range(11):
        (tmp_path / f"b/bad{number:02}.jpg").write_bytes(b"nothing")
    with pytest.raises(
        ValueError,
        match=r"12 of the images.*a/cut\.png \(.*\); b/bad00\.jpg, .* and 8 more \(is not an image",
    ) as caught:
        folder(tmp_path).load("train")
    message = str(caught.value)
    assert "bad03" not in message
    assert "0.png" not in message
    assert "\n" not in message


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    path = save(tmp_path / f"x.{suffix}", RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ValueError, match=rf"x\.{suffix}"):
        folder(tmp_path).load("train")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "x.png", np.zeros((12, 12), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match=r"x\.png.*12 x 12.*limit of 80"),
    ):
        folder(tmp_path).load("train")

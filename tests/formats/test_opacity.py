"""Images with opacity."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from diffusion_cli.formats import HighDepthImage, form_of
from diffusion_cli.formats.pixel_readers import read_numbers
from helpers.formats import folder, images, saved, tiff, written

SPRITE = np.zeros((8, 8, 4), np.uint8)
SPRITE[2:6, 2:6] = [200, 20, 30, 255]
SPRITE[4:6, 4:6, 3] = 100


def deep_sprite(kind: str) -> bytes:
    """A file of 16 bits of colour and opacity."""
    numbers = SPRITE.astype(np.uint16) * 257
    if kind == "tiff":
        return tiff(numbers, photometric="rgb", extrasamples=["unassalpha"])
    rows = np.hstack([np.zeros((8, 1), np.uint8), numbers.astype(">u2").reshape(8, -1).view(np.uint8)])
    head = struct.pack(">IIBBBBB", 8, 8, 16, 6, 0, 0, 0)
    chunks = (b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "gif", "jp2"])
def test_colours_with_opacity_come_back_as_png_of_their_kind(tmp_path, suffix):
    options: dict = {"webp": {"lossless": True, "exact": True}, "jp2": {"irreversible": False}}.get(
        suffix, {}
    )
    sprite = SPRITE.copy()
    if suffix == "gif":  # its pixels are opaque or fully transparent
        sprite[..., 3] = np.where(sprite[..., 3] > 0, 255, 0)
    saved(tmp_path / "in" / f"0.{suffix}", sprite, None, **options)
    dataset = folder(tmp_path / "in", channels=4)
    form = dataset.form
    assert isinstance(form, HighDepthImage)
    assert (form.mode, form.file) == ("RGBA", "png")
    sample = images(dataset)[0]
    found = Image.open(io.BytesIO(written(form, sample, tmp_path / "x.png")))
    assert found.mode == "RGBA"
    seen = sprite[..., 3:] > 0  # what cannot be seen has no colour
    np.testing.assert_array_equal(np.asarray(found) * seen, sprite * seen)
    assert form_of(form.to_dict()) == form
    picture = form.to_rgb(sample[None])[0].permute(1, 2, 0).numpy()
    beneath = Image.alpha_composite(Image.new("RGBA", (8, 8), "white"), Image.fromarray(sprite))
    np.testing.assert_allclose(picture, np.asarray(beneath)[..., :3], atol=1)
    assert form.picture_shape((4, 8, 8)) == (3, 8, 8)


@pytest.mark.parametrize("invisible", [0, 255])
@pytest.mark.parametrize("colour", [[200, 40, 40], [120]], ids=["RGBA", "LA"])
def test_invisible_colours_leave_no_fringe_on_resized_images(tmp_path, colour, invisible):
    channels = len(colour) + 1
    pixels = np.full((24, 24, channels), invisible, np.uint8)
    pixels[..., -1] = 0
    pixels[3:17, :13] = [*colour, 255]
    saved(tmp_path / "in/0.png", pixels)
    dataset = folder(tmp_path / "in", channels=channels)
    form, sample = dataset.form, images(dataset)
    assert isinstance(form, HighDepthImage)
    numbers = form.numbers(sample)[0]
    seen = numbers[-1] > 0
    assert 0 < seen.sum() < seen.size
    assert (numbers[:-1, seen] == np.array(colour)[:, None]).all()
    shown = form.to_rgb(sample)[0].numpy().astype(int)
    assert (shown >= np.array(colour)[:, None, None]).all()
    opacity = Image.fromarray(pixels[..., -1].astype(np.float32)).resize((8, 8), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(numbers[-1], np.asarray(opacity).clip(0, 255), rtol=0, atol=1)


def test_a_palette_and_opaque_files_among_sprites_are_colours(tmp_path):
    for place in ("palette", "mixed"):
        (tmp_path / place).mkdir()
    Image.fromarray(SPRITE).quantize(16).save(tmp_path / "palette/0.png")
    np.testing.assert_allclose(folder_numbers(tmp_path / "palette")[0], SPRITE, atol=8)
    saved(tmp_path / "mixed/0.png", SPRITE[..., :3])
    saved(tmp_path / "mixed/1.png", SPRITE)
    saved(tmp_path / "mixed/2.png", SPRITE[..., 0])
    opaque, sprite, gray = folder_numbers(tmp_path / "mixed")
    np.testing.assert_array_equal(sprite, SPRITE)
    np.testing.assert_array_equal(opaque, np.dstack([SPRITE[..., :3], np.full((8, 8), 255)]))
    np.testing.assert_array_equal(gray, np.dstack([SPRITE[..., [0, 0, 0]], np.full((8, 8), 255)]))


def folder_numbers(path: Path) -> np.ndarray:
    dataset = folder(path, channels=4)
    assert isinstance(dataset.form, HighDepthImage)
    return dataset.form.numbers(images(dataset)).transpose(0, 2, 3, 1)


def test_ink_is_not_taken_for_colours_with_opacity(tmp_path):
    ink = saved(tmp_path / "data/0.jpg", SPRITE[..., :3], "CMYK")
    with pytest.raises(ValueError, match=r"dataset\.channels=4: the first image is CMYK; convert it to RGBA"):
        folder(ink.parent, channels=4)
    saved(ink.with_name("1.png"), SPRITE)
    ink.rename(ink.with_name("2.jpg"))
    with pytest.raises(ValueError, match=r"2\.jpg \(is CMYK; convert it to RGBA"):
        images(folder(ink.parent, channels=4))
    assert images(folder(ink.parent, channels=3)).shape == (2, 3, 8, 8)


def test_gray_with_opacity_comes_back_as_png(tmp_path):
    sprite = SPRITE[..., [0, 3]]
    saved(tmp_path / "data/0.png", sprite)
    dataset = folder(tmp_path / "data", channels=2)
    data = written(dataset.form, images(dataset)[0], tmp_path / "x.png")
    assert Image.open(io.BytesIO(data)).mode == "LA"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), sprite)
    assert dataset.form.picture_shape((2, 8, 8)) == (1, 8, 8)
    saved(tmp_path / "data/1.png", SPRITE)
    with pytest.raises(ValueError, match=r"1\.png \(is in colour, not gray"):
        images(folder(tmp_path / "data", channels=2))


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_deep_colours_with_opacity_come_back_as_a_tiff_that_states_it(tmp_path, kind):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"0.{kind}").write_bytes(deep_sprite(kind))
    dataset = folder(tmp_path / "data", channels=4)
    data = written(dataset.form, images(dataset)[0], tmp_path / "x.tif")
    np.testing.assert_array_equal(read_numbers(data).transpose(1, 2, 0), SPRITE * np.uint16(257))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        assert (file.pages.first.photometric, tuple(file.pages.first.extrasamples)) == (2, (2,))
    assert dataset.form.picture_shape((4, 8, 8)) == (3, 8, 8)


def test_four_channels_of_any_kind_and_older_runs_stay_channels(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/0.tif").write_bytes(tiff(SPRITE, photometric="minisblack", planarconfig="contig"))
    form = folder(tmp_path / "data", channels=4).form
    assert form.to_dict() == {"kind": "raster", "dtype": "uint8", "low": [0], "high": [255], "file": "tiff"}
    assert form.picture_shape((4, 8, 8)) == (1, 8, 32)
    saved(tmp_path / "sprites/0.png", SPRITE)
    assert folder(tmp_path / "sprites", channels=4, rules=1).form == form == form_of(form.to_dict())

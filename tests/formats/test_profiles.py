"""Colour profiles: files of one colour have the same numbers, whatever profile they are written in."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.commands.masks import read_mask
from diffusion_cli.data import Folder, given_images
from diffusion_cli.data.decoding import ImageDecoder
from diffusion_cli.formats import Uint8Image
from diffusion_cli.formats.profiles import conversion, to_srgb
from helpers import SRGB, WIDE

COLOURS = {
    (200, 80, 60): (216, 69, 50),
    (90, 90, 90): (90, 90, 90),
    (0, 0, 0): (0, 0, 0),
    (255, 255, 255): (255,) * 3,
}
"""Colours in Display P3, and the same in sRGB by the published matrices."""


def gray(gamma: float) -> bytes:
    """A profile of gray by a power, as ICC.1:2001 lays it out."""
    curve = struct.pack(">4sIIH", b"curv", 0, 1, round(gamma * 256)) + bytes(2)
    white = struct.pack(">4sIiii", b"XYZ ", 0, *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    start = 128 + 4 + 2 * 12
    tags = struct.pack(">I4sII4sII", 2, b"wtpt", start, len(white), b"kTRC", start + len(white), len(curve))
    size = start + len(white) + len(curve)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + white[8:] + bytes(48)
    return header + tags + white + curve


def patches(mode: str = "RGB") -> Image.Image:
    image = Image.fromarray(np.repeat(np.array([[*COLOURS]], np.uint8), 4, 0))
    return image.quantize(4) if mode == "P" else image.convert(mode)


def read(data: bytes, **changes) -> np.ndarray:
    return ImageDecoder((3, 4, 4), "white", False, **changes)(data).transpose(1, 2, 0)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_colours_are_converted_from_their_profile(mode, kind):
    found = read(encoded(patches(mode), kind, icc_profile=WIDE))
    np.testing.assert_allclose(found[0], [*COLOURS.values()], atol=1)
    np.testing.assert_array_equal(
        read(encoded(patches(mode), kind, icc_profile=WIDE), srgb=False)[0], [*COLOURS]
    )


@pytest.mark.parametrize("profile", [None, SRGB, b"", b"broken" * 40, SRGB[:200], gray(1.0)])
def test_srgb_and_profiles_that_do_not_fit_change_no_bit(profile):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    options = {} if profile is None else {"icc_profile": profile}
    np.testing.assert_array_equal(read(encoded(noise, **options)), np.asarray(noise))
    if profile:
        assert to_srgb(noise, profile) is noise


def test_grays_are_converted_from_a_profile_of_gray():
    """Linear gray v is 255 f(v / 255) in sRGB, f the curve of IEC 61966-2-1."""
    ramp = Image.frombytes("L", (16, 16), bytes(range(256)))
    linear = np.arange(256) / 255
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    for channels in (1, 3):
        data = encoded(ramp, icc_profile=gray(1.0))
        found = ImageDecoder((channels, 16, 16), "white", False)(data)
        np.testing.assert_allclose(found.reshape(channels, 256), [255 * curve] * channels, atol=1)
    assert conversion(gray(2.2), "L").kind == "converted"  # near black it is another curve
    assert to_srgb(ramp, SRGB) is ramp  # as programs write that drop the colours of a file


def test_the_grays_of_a_mask_are_numbers_and_are_not_converted(tmp_path):
    """110 is under the threshold of a mask; converted from linear light it is 174, over it."""
    Image.new("L", (4, 4), 110).save(tmp_path / "mask.png", icc_profile=gray(1.0))
    assert not read_mask((tmp_path / "mask.png").read_bytes(), "mask.png").region.any()


def test_a_large_photo_is_converted_at_the_size_that_it_is_decoded_at():
    data = encoded(Image.new("RGB", (200, 200), (200, 80, 60)), "JPEG", quality=95, icc_profile=WIDE)
    np.testing.assert_allclose(read(data).reshape(-1, 3), [(216, 69, 50)] * 16, atol=3)


def test_opacity_stays_where_colours_are_converted(tmp_path):
    pixels = np.dstack([np.asarray(patches()), np.tile([255, 100, 0, 50], (4, 1))]).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", icc_profile=WIDE)
    found = folder(tmp_path, channels=4).load("train")[torch.tensor([0])][0]
    found = ((found + 1) * 127.5).round().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found[..., 3], pixels[..., 3])
    np.testing.assert_allclose(found[..., :3][0], [*COLOURS.values()], atol=1)


def folder(path: Path, *rules: Any, **changes) -> Folder:
    arguments = {
        "masks": None, "resolution": 4, "channels": 3, "range": None, "depth": "auto", "labels": "none",
        "background": "white", "flip": False, "val_fraction": 0.0, "in_memory": True, "num_workers": 0,
    }  # fmt: skip
    return Folder("", *rules, path=str(path), **(arguments | changes))


def test_data_and_samples_are_converted_and_runs_begun_before_are_not(tmp_path):
    patches().save(tmp_path / "x.png", icc_profile=WIDE)
    row = torch.tensor([0])
    new, old, given = (
        images[row][0, :, 0].T.tolist()
        for images in (
            folder(tmp_path).load("train"),
            folder(tmp_path, 1).load("train"),
            given_images(tmp_path, "samples", (3, 4, 4), Uint8Image()).images,
        )
    )
    assert new == given != old
    assert old == [list(colour) for colour in COLOURS]

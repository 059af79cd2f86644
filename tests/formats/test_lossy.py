"""Files with lossy compression are found."""

import io

import numpy as np
import pytest
from PIL import Image

from diffusion_cli.formats import Uint8Image
from diffusion_cli.formats.dicom import dicom_form
from helpers.formats import dicom


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("PNG", {}, None),
        ("BMP", {}, None),
        ("JPEG", {}, "JPEG"),
        ("WEBP", {}, "lossy WebP"),
        ("WEBP", {"lossless": True}, None),
        ("WEBP", {"exif": b"xVP8 x"}, "lossy WebP"),
        ("WEBP", {"exif": b"xVP8 x", "lossless": True}, None),
        ("WEBP", {"save_all": True, "append_images": True}, "lossy WebP"),
        ("WEBP", {"save_all": True, "append_images": True, "lossless": True}, None),
        ("TIFF", {}, None),
        ("TIFF", {"compression": "tiff_lzw"}, None),
        ("TIFF", {"compression": "jpeg"}, "TIFF with JPEG compression"),
        ("JPEG2000", {}, None),
        ("JPEG2000", {"irreversible": True}, "lossy JPEG 2000"),
        ("GIF", {}, "GIF of at most 256 colours"),
    ],
)
def test_lossy_files_are_those_that_change_pixels(kind, options, name):
    pixels = np.random.RandomState(0).randint(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    first, second = map(Image.fromarray, pixels)
    more = {"append_images": [second]} if options.get("append_images") else {}
    file = io.BytesIO()
    first.save(file, kind, **options | more)
    assert Uint8Image().lossy(file.getvalue()) == name
    assert (np.array(Image.open(file).convert("RGB")) != pixels[0]).any() == (name is not None)


def test_gray_gif_and_what_is_no_image_lose_nothing():
    file = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(file, "GIF")
    assert Uint8Image().lossy(file.getvalue()) is None
    assert Uint8Image().lossy(b"no image") is None


def test_scans_with_lossy_compression_are_marked_so():
    numbers = np.arange(64, dtype=np.uint16).reshape(8, 8)
    form = dicom_form(dicom(numbers), None)
    assert form.lossy(dicom(numbers)) is None
    assert form.lossy(dicom(numbers, LossyImageCompression="01")) == "DICOM with lossy compression"
    assert form.lossy(b"no scan") is None

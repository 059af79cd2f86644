"""Values, ranges and files of images of any depth: what is read is what was written."""

import io
import struct
import zlib

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffusion_cli.formats import Dicom, HighDepthImage, Uint8Image, form_of, image_form
from diffusion_cli.formats.dicom import dicom_form
from diffusion_cli.formats.dicom_reader import read_scan
from diffusion_cli.formats.pixel_readers import depth_of, read_numbers
from helpers.formats import tiff, written

RNG = np.random.default_rng(0)
CT = Dicom("int16", 12, 1.0, -1024.0, [-1000.0], [1000.0])


@pytest.mark.parametrize("dtype", ["uint16", "int16"])
def test_every_number_of_sixteen_bits_comes_back_from_the_model_s_range(tmp_path, dtype):
    numbers = np.arange(65536, dtype=np.uint16).view(dtype).reshape(1, 256, 256)
    form = image_form(dtype, 1, None)
    assert isinstance(form, HighDepthImage)
    sample = form.from_numbers(numbers)
    assert (sample.min(), sample.max()) == (-1, 1)
    assert sample.dtype == torch.float32
    assert_close(form.quantize(sample), sample, rtol=0, atol=0)
    np.testing.assert_array_equal(form.numbers(sample), numbers)
    assert_close(form.read(written(form, sample, tmp_path / "x"), (1, 256, 256)), sample, rtol=0, atol=0)


def test_every_number_of_a_scan_comes_back(tmp_path):
    form = Dicom("int16", 12, 1.5, -1000.25, [-1000.25 - 1.5 * 2048], [-1000.25 + 1.5 * 2047])
    numbers = np.arange(-2048, 2048, dtype=np.int16).reshape(1, 64, 64)
    data = written(form, form.from_numbers(numbers), tmp_path / "x.dcm")
    scan = read_scan(data)
    np.testing.assert_array_equal(scan.pixels, numbers[0])
    assert (scan.bits, scan.slope, scan.intercept) == (12, 1.5, -1000.25)
    np.testing.assert_array_equal(form.numbers(form.read(data, (1, 64, 64))), numbers)
    assert dicom_form(data, None) == form == form_of(form.to_dict())


def test_a_range_is_what_becomes_minus_one_and_one_and_beyond_is_clipped():
    form = image_form("float32", 1, [-5.0, 15.0])
    assert isinstance(form, HighDepthImage)
    values = np.array([-99, -5, 0, 5, 15, 99], np.float32).reshape(1, 1, 6)
    assert form.from_numbers(values).flatten().tolist() == [-1, -1, -0.5, 0, 1, 1]
    assert form.half_range == 10
    with pytest.raises(ValueError, match="not finite"):
        form.from_numbers(np.array([[[np.nan]]], np.float32))


def test_each_channel_may_have_a_range_of_its_own():
    form = image_form("uint16", 2, [[0, 10], [0, 1000]])
    assert isinstance(form, HighDepthImage)
    numbers = np.array([[[5]], [[500]]], np.uint16)
    assert form.from_numbers(numbers).tolist() == [[[0]], [[0]]]
    batch = form.quantize(torch.rand(3, 2, 4, 5) * 2 - 1)
    np.testing.assert_array_equal(form.numbers(form.from_numbers(form.numbers(batch))), form.numbers(batch))
    assert form.numbers(batch)[:, 0].max() <= 10 < form.numbers(batch)[:, 1].max()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_what_is_written_is_what_was_stored(tmp_path, dtype, channels):
    form = image_form(dtype, channels, [0, 200])
    sample = form.quantize(torch.rand(channels, 5, 6) * 2 - 1)
    data = written(form, sample, tmp_path / f"x{form.suffix}")
    assert_close(form.read(data, (channels, 5, 6)), sample, rtol=0, atol=0)
    assert depth_of(data) == dtype
    assert written(form, sample, tmp_path / "again") == data
    assert form_of(form.to_dict()) == form
    pictures = form.to_rgb(sample[None])
    assert pictures.dtype == torch.uint8
    assert tuple(pictures.shape[1:]) == form.picture_shape((channels, 5, 6))


def test_other_programs_read_what_is_written(tmp_path):
    form = image_form("uint16", 1, None)
    numbers = RNG.integers(0, 65536, (1, 5, 6), dtype=np.uint16)
    assert isinstance(form, HighDepthImage)
    form.write(form.from_numbers(numbers), tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), numbers[0])
    image = pydicom.dcmread(
        io.BytesIO(written(CT, CT.from_numbers(numbers % 2000 - 500), tmp_path / "x.dcm"))
    )
    np.testing.assert_array_equal(
        image.pixel_array, (numbers[0] % 2000 - 500).clip(24, None).clip(None, 2024)
    )


def test_channels_that_are_no_colours_are_seen_side_by_side():
    form = image_form("float32", 2, [0, 1])
    sample = torch.stack([torch.full((3, 4), -1.0), torch.full((3, 4), 1.0)])
    picture = form.to_rgb(sample[None])[0, 0]
    assert (picture[:, :4] == 0).all()
    assert (picture[:, 4:] == 255).all()


@pytest.mark.parametrize(
    ("dtype", "channels", "given", "form"),
    [
        ("uint8", 1, None, "picture"), ("uint8", 3, None, "picture"), ("uint8", 1, [0, 9], ".png"),
        ("uint8", 3, [0, 9], ".png"), ("uint8", 2, None, ".tif"), ("uint16", 1, None, ".png"),
        ("uint16", 3, None, ".tif"), ("int16", 1, None, ".tif"), ("float32", 1, [0, 9], ".tif"),
    ],
)  # fmt: skip
def test_bytes_stay_pictures_and_the_rest_gets_a_file_that_can_hold_it(dtype, channels, given, form):
    found = image_form(dtype, channels, given)
    assert (found.kind if isinstance(found, Uint8Image) else found.suffix) == form


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float32", 1, None), r"dataset\.range=null: floating-point images"),
        (("float64", 1, [0, 1]), "has dtype float64; supported are"),
        (("uint16", 1, [5, 5]), r"dataset\.range=\[5,5\]: must increase"),
        (
            ("uint16", 3, [[0, 5], [0, 5]]),
            r"dataset\.range=\[\[0,5\],\[0,5\]\]: has 2 pairs, but the images have 3 channels",
        ),
    ],
)
def test_ranges_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        image_form(*arguments)


@pytest.mark.parametrize(
    "change", [{"low": []}, {"low": [9.0], "high": [8.0]}, {"dtype": "int64"}, {"bits": 17}, {"x": 1}]
)
def test_forms_that_are_none_are_refused(change):
    with pytest.raises(ValueError, match="form"):
        form_of(CT.to_dict() | change)


def test_files_of_many_layouts_give_the_same_numbers():
    numbers = RNG.integers(0, 65536, (5, 6, 7), dtype=np.uint16)
    last = numbers.transpose(1, 2, 0)
    for data in [
        tiff(numbers, photometric="minisblack"),  # five pages
        tiff(numbers, photometric="minisblack", planarconfig="separate"),
        tiff(last, photometric="minisblack", planarconfig="contig"),
        tiff(numbers, imagej=True, metadata={"axes": "CYX"}),
        tiff(numbers, compression="zlib", predictor=False, photometric="minisblack"),
        tiff(last, photometric="minisblack", planarconfig="contig", tile=(16, 16)),
        tiff(last.astype(">u2"), byteorder=">", photometric="minisblack", planarconfig="contig"),
    ]:
        np.testing.assert_array_equal(read_numbers(data), numbers)
    assert read_numbers(tiff(numbers[0], photometric="miniswhite"))[0, 0, 0] == 65535 - numbers[0, 0, 0]


def test_sixteen_bits_of_colour_are_read_from_png():
    """Which Pillow would cut to eight."""
    numbers = RNG.integers(0, 65536, (4, 5, 3), dtype=np.uint16)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    above, rows = np.zeros(30, int), b""
    for kind, row in zip([3, 1, 2, 4], numbers, strict=True):  # average, left, above, Paeth
        here = np.frombuffer(row.astype(">u2").tobytes(), np.uint8).astype(int)
        left, corner = (np.concatenate([np.zeros(6, int), each[:-6]]) for each in (here, above))
        paeth = np.stack([left, above, corner])
        nearest = abs(left + above - corner - paeth).argmin(0)
        guess = {1: left, 2: above, 3: (left + above) // 2, 4: np.take_along_axis(paeth, nearest[None], 0)[0]}
        rows += bytes([kind]) + ((here - guess[kind]) % 256).astype(np.uint8).tobytes()
        above = here
    head = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    assert depth_of(data) == "uint16"
    np.testing.assert_array_equal(read_numbers(data), numbers.transpose(2, 0, 1))


def test_a_palette_gives_the_numbers_of_its_colours():
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    image = image.convert("P")
    image.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tolist())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    np.testing.assert_array_equal(read_numbers(buffer.getvalue())[0], np.arange(12).reshape(3, 4))


def entry(code: int, value: int) -> bytes:
    """A number in the header of a TIFF file."""
    return struct.pack("<HHII", code, 4, 1, value)


FLAT = tiff(np.zeros((8, 8), np.uint16))
TURNED = tiff(np.zeros((8, 8), np.uint16), extratags=[(274, 3, 1, 6, True)])
BOMB = tiff(np.zeros((64, 64), np.uint8), compression="zlib", rowsperstrip=64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (FLAT[:-20], "fewer than it declares"),
        (FLAT.replace(entry(257, 8), entry(257, 2**30)), "at most"),
        (BOMB.replace(entry(256, 64), entry(256, 8)), "inflates to more"),
        (TURNED, "has orientation 6; save it upright"),
        (
            tiff(np.zeros((2, 3, 8, 8), np.uint16), photometric="minisblack"),
            "expected height, width and optionally channels",
        ),
    ],
    ids=["cut", "huge", "bomb", "turned", "axes"],
)
def test_tiffs_that_are_damaged_or_too_large_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        read_numbers(data)

"""Images in a depth of their own: what is read is what is written, at every step from a file to a file."""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
import torch
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian
from torch.testing import assert_close

from diffusion_cli.cli import run
from diffusion_cli.commands.inputs import read_input
from diffusion_cli.data import Array, Folder, Pack, given_images
from diffusion_cli.data.decoding import ImageDecoder
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import Dicom, HighDepthImage, Uint8Image, form_of, image_form
from diffusion_cli.formats.dicom import dicom_form, read_scan
from diffusion_cli.formats.pixel_readers import depth_of, read_numbers

RNG = np.random.default_rng(0)
CT = Dicom("int16", 12, 1.0, -1024.0, [-1000.0], [1000.0])


def folder(path: Path, **changes) -> Folder:
    arguments = {
        "masks": None,
        "resolution": 8, "channels": 1, "range": None, "depth": "auto", "labels": "none", "background": "white",
        "flip": False, "val_fraction": 0.0, "in_memory": True, "num_workers": 0,
    }  # fmt: skip
    return Folder("", path=str(path), **(arguments | changes))


def images(dataset) -> torch.Tensor:
    split = dataset.load("train")
    return split[torch.arange(len(split))]


def written(form, sample: torch.Tensor, path: Path) -> bytes:
    form.write(sample, path)
    return path.read_bytes()


def tiff(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def dicom(numbers: np.ndarray, **elements) -> bytes:
    """A file as a scanner may have made it, with a patient's name, and other elements."""
    buffer = io.BytesIO()
    wide = Dicom("int16", 16, 1.0, 0.0, [-32768.0], [32767.0])
    wide.write(wide.from_numbers(numbers.astype(np.int16)[None]), buffer)  # pyright: ignore
    image = pydicom.dcmread(io.BytesIO(buffer.getvalue()))
    image.PatientName = "Doe^Jane"
    image.PixelRepresentation = int(numbers.dtype.kind == "i")
    image.BitsAllocated = 8 * numbers.itemsize
    image.BitsStored, image.HighBit = image.BitsAllocated, image.BitsAllocated - 1
    image.PixelData = numbers.tobytes()
    syntax = elements.pop("syntax", None)
    if syntax is not None:
        image.file_meta.TransferSyntaxUID = syntax
    for name, value in elements.items():
        setattr(image, name, value)
    if syntax == JPEG2000:
        image.PixelData = encapsulate([image.PixelData])
        image["PixelData"].is_undefined_length = True
    fresh = pydicom.Dataset(image)  # which remembers no order of bytes
    fresh.file_meta = image.file_meta
    out = io.BytesIO()
    fresh.save_as(out, enforce_file_format=True)
    return out.getvalue()


# Numbers


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


# Files


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


# Opacity

SPRITE = np.zeros((8, 8, 4), np.uint8)
SPRITE[2:6, 2:6] = [200, 20, 30, 255]
SPRITE[4:6, 4:6, 3] = 100


def saved(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    path.parent.mkdir(exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


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


# DICOM


def test_what_is_written_holds_nothing_of_a_patient_and_says_that_it_is_synthetic(tmp_path):
    data = dicom(np.zeros((4, 5), np.int16), RescaleSlope=2, RescaleIntercept=-7)
    assert b"Doe^Jane" in data
    form = dicom_form(data, None)
    image = pydicom.dcmread(io.BytesIO(written(form, form.decode(data), tmp_path / "x.dcm")))
    assert "Jane" not in str(image)
    assert (image.PatientName, image.ConversionType, image.ImageType) == (
        "SYNTHETIC",
        "SYN",
        ["DERIVED", "SECONDARY"],
    )
    assert (image.RescaleSlope, image.RescaleIntercept, image.BitsStored) == (2, -7, 16)
    other = pydicom.dcmread(io.BytesIO(written(form, form.decode(data) + 0.5, tmp_path / "y.dcm")))
    assert image.SOPInstanceUID != other.SOPInstanceUID
    assert image.SeriesInstanceUID == other.SeriesInstanceUID


def test_scans_are_compared_by_their_rescaled_values():
    first = dicom(np.full((4, 5), 1000, np.int16), RescaleSlope=1, RescaleIntercept=-1000)
    second = dicom(np.full((4, 5), 4000, np.uint16), RescaleSlope=0.5, RescaleIntercept=-2000)
    form = dicom_form(first, [-1000, 1000])
    assert (form.decode(first) == 0).all()
    assert (form.decode(second) == 0).all()
    with pytest.raises(ValueError, match=r"16 bits in uint16, but the first file 16 in int16.*range="):
        dicom_form(first, None).decode(second)


def test_values_beyond_what_the_first_scan_may_hold_are_not_cut_without_a_word():
    """As of PET, where each slice has a slope of its own."""
    first, second = (
        dicom(np.full((4, 5), 4000, np.uint16), BitsStored=12, HighBit=11, RescaleSlope=slope)
        for slope in (1, 2)
    )
    with pytest.raises(ValueError, match=r"0 to 8190, but the first file 0 to 4095; set .*dataset\.range="):
        dicom_form(first, None).decode(second)
    assert_close(2 * dicom_form(second, None).decode(first), dicom_form(second, None).decode(second) - 1)
    assert_close(dicom_form(first, [0, 8000]).decode(second), torch.ones(1, 4, 5))


@pytest.mark.parametrize("slope", [2 / 3, 1.23456789012345678e-5])
def test_a_scan_of_a_slope_of_many_digits_fits_itself(tmp_path, slope):
    ends = [0.0], [slope * 4095]
    form = Dicom("uint16", 12, slope, 0.0, *ends)
    numbers = np.arange(4096, dtype=np.uint16).reshape(1, 64, 64)
    data = written(form, form.from_numbers(numbers), tmp_path / "x.dcm")
    np.testing.assert_array_equal(form.numbers(form.decode(data)), numbers)


def test_the_window_is_that_of_the_standard():
    data = dicom(np.zeros((4, 5), np.int16), WindowCenter=[40, 300], WindowWidth=[400, 1500])
    form = dicom_form(data, "window")
    assert (form.low, form.high) == ([-160], [239])
    again = pydicom.dcmread(io.BytesIO(data))
    del again.WindowCenter
    out = io.BytesIO()
    again.save_as(out, enforce_file_format=True)
    with pytest.raises(ValueError, match=r"dataset\.range=window: the first file has no window"):
        dicom_form(out.getvalue(), "window")


def test_where_white_is_low_it_is_turned_round():
    numbers = np.arange(20, dtype=np.uint16).reshape(4, 5)
    scan = read_scan(dicom(numbers, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(scan.pixels, 4095 - numbers)


def test_what_lies_above_the_stored_bits_does_not_count():
    numbers = np.arange(-10, 10, dtype=np.int16).reshape(4, 5)
    scan = read_scan(dicom((numbers & 0x0FFF) | 0x5000, BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(scan.pixels, numbers)


TABLE = pydicom.Dataset()
TABLE.LUTDescriptor, TABLE.ModalityLUTType = [4096, 0, 16], "HU"


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"syntax": JPEG2000}, "is compressed"),
        ({"syntax": DeflatedExplicitVRLittleEndian}, "is compressed"),
        ({"NumberOfFrames": 3}, "has 3 frames"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "is RGB"),
        ({"Rows": 60_000, "Columns": 60_000}, "too few for 60000 x 60000"),
        ({"HighBit": 14}, "highest bit"),
        ({"BitsStored": 40}, "40 of 16 bits"),
        ({"RescaleSlope": 0}, "slope 0"),
        ({"ModalityLUTSequence": [TABLE]}, "has a lookup table of values"),
    ],
)
def test_scans_that_are_not_read_are_refused_in_a_line(elements, message):
    with pytest.raises(ValueError, match=message):
        read_scan(dicom(np.zeros((4, 5), np.int16), **elements))


def test_big_endian_scans_are_read():
    numbers = np.arange(20, dtype=np.int16).reshape(4, 5)
    data = dicom(numbers, syntax=ExplicitVRBigEndian, PixelData=numbers.astype(">i2").tobytes())
    np.testing.assert_array_equal(read_scan(data).pixels, numbers)


def test_without_pydicom_the_remedy_is_named(monkeypatch):
    data = dicom(np.zeros((4, 5), np.int16))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"pip install 'diffuse-cli\[medical\]'"):
        read_scan(data)


# Datasets


def fill(path: Path, count: int = 6, size: tuple[int, int] = (10, 15), dtype: type = np.uint16) -> np.ndarray:
    """Images of one size as PNG, their numbers."""
    path.mkdir(parents=True, exist_ok=True)
    numbers = RNG.integers(0, np.iinfo(dtype).max, (count, *size), dtype=dtype)
    for number, pixels in enumerate(numbers):
        Image.fromarray(pixels).save(path / f"{number}.png")
    return numbers


def test_a_folder_of_sixteen_bits_that_are_not_square_is_held_as_it_is(tmp_path):
    numbers = fill(tmp_path)
    dataset = folder(tmp_path, resolution=[10, 15])
    assert isinstance(dataset.form, HighDepthImage)
    np.testing.assert_array_equal(dataset.form.numbers(images(dataset))[:, 0], numbers)


def test_images_are_mirrored_and_scans_of_patients_are_not(tmp_path):
    fill(tmp_path / "png", 1)
    (tmp_path / "a.dcm").write_bytes(dicom(np.zeros((8, 8), np.int16)))
    assert folder(tmp_path / "png", flip=None).flip
    scans = folder(tmp_path, flip=None)  # by the first file
    assert isinstance(scans.form, Dicom)
    assert not scans.flip
    assert folder(tmp_path, flip=True).flip


def test_resizing_is_that_of_bytes(tmp_path):
    """To one of their 255 values, for the numbers 257 times theirs."""
    numbers = fill(tmp_path / "bytes", size=(20, 31), dtype=np.uint8)
    for number, pixels in enumerate(numbers):
        (tmp_path / "deep").mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "deep" / f"{number}.png")
    bytes_ = images(folder(tmp_path / "bytes", resolution=[8, 12])).float()
    assert bytes_.shape[1:] == (1, 8, 12)
    deep = (images(folder(tmp_path / "deep", resolution=[8, 12])) + 1) * 127.5
    assert_close(deep, bytes_, rtol=0, atol=1.01)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("side", [48, 400])
def test_an_image_that_is_not_square_is_cropped_to_the_aspect_around_the_centre(turned, side):
    """What is cut away is white; also of a JPEG that is decoded at a part of its size."""
    pixels = np.full((side, side), 255, np.uint8)
    pixels[side // 4 : -side // 4] = np.linspace(20, 200, side, dtype=np.uint8)
    image, options = Image.fromarray(pixels), {}
    if turned:
        image = image.transpose(Image.Transpose.ROTATE_90)
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    found = ImageDecoder((1, 8, 16), "white", False)(buffer.getvalue())[0].astype(float)
    inner = np.linspace(20, 200, side).reshape(16, -1).mean(1)
    assert abs(found[2:-2] - inner).max() < 8


@pytest.mark.parametrize("first", ["deep", "bytes"])
def test_files_of_several_depths_are_refused_by_name(tmp_path, first):
    for name, dtype in (("a", np.uint16), ("b", np.uint8)):
        other = dtype if first == "deep" else {np.uint16: np.uint8, np.uint8: np.uint16}[dtype]
        fill(tmp_path / name, 1, dtype=other)
    with pytest.raises(ValueError, match=r"cannot use 1 of the images.*b/0\.png \(has"):
        folder(tmp_path).load("train")
    assert images(folder(tmp_path, depth=8)).dtype == torch.uint8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 3}, r"dataset\.channels=3: the images have 1; set dataset\.channels=1"),
        ({"range": "window"}, r"dataset\.range=window: applies to DICOM"),
        ({"depth": 8, "range": [0, 5]}, r"dataset\.depth=8: .*without dataset\.range"),
    ],
)
def test_what_the_files_are_not_is_told_before_they_are_read(tmp_path, changes, message):
    fill(tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, **changes)


def test_real_numbers_that_are_none_are_told_by_file(tmp_path):
    for name, value in (("a", 0.0), ("b", np.nan), ("c", np.inf)):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.full((8, 8), value, np.float32))
    with pytest.raises(
        ValueError, match=r"cannot use 2 of.*b\.tif \(has values that are not finite\); c\.tif"
    ):
        folder(tmp_path, range=[0, 1]).load("train")


def test_a_broken_scan_is_told_by_file(tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom(np.zeros((4, 5), np.int16))[:200])
    with pytest.raises(ValueError, match=r"dataset\.path=.*: cannot use a\.dcm \("):
        folder(tmp_path)


@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize(("dtype", "given"), [("uint16", None), ("int16", None), ("float32", [0, 1])])
def test_arrays_of_any_depth_and_channels(tmp_path, layout, dtype, given):
    numbers = (RNG.random((6, 5, 8, 9)) * (1 if given else 30_000)).astype(dtype)
    np.save(tmp_path / "x.npy", numbers if layout == "first" else numbers.transpose(0, 2, 3, 1))
    dataset = Array("", path=f"{tmp_path}/x.npy", range=given, flip=False, val_fraction=0.0, in_memory=None)
    assert dataset.shape == (5, 8, 9)
    assert isinstance(dataset.form, HighDepthImage)
    np.testing.assert_allclose(dataset.form.numbers(images(dataset)), numbers, atol=1e-7 if given else 0)


@pytest.mark.parametrize("kind", ["png", "dicom"])
def test_a_packed_dataset_keeps_its_numbers_and_its_form(tmp_path, kind):
    if kind == "png":
        fill(tmp_path / "x")
    else:
        (tmp_path / "x").mkdir()
        for number in range(4):
            data = dicom(RNG.integers(0, 2000, (10, 15), dtype=np.int16), RescaleIntercept=-1000)
            (tmp_path / "x" / f"{number}.dcm").write_bytes(data)
    dataset = folder(tmp_path / "x", resolution=[10, 15], range=None if kind == "png" else [-1000, 1000])
    Pack(processes=0)(dataset, tmp_path / "x.npz")
    packed = Array("", path=f"{tmp_path}/x.npz", range=None, flip=False, val_fraction=None, in_memory=None)
    assert packed.form == dataset.form
    assert np.load(tmp_path / "x.npz")["images"].dtype == (np.uint16 if kind == "png" else np.int16)
    assert_close(images(packed), images(dataset), rtol=0, atol=0)
    assert packed.load("train").digest() == dataset.load("train").digest()


def test_files_of_another_form_are_no_samples(tmp_path):
    fill(tmp_path, 2)
    deep = image_form("uint16", 1, None)
    found = given_images(tmp_path, "samples", (1, 10, 15), deep)
    assert len(found.images) == 2
    with pytest.raises(ValueError, match=r"0\.png \(has dtype uint16; expected int16"):
        given_images(tmp_path, "samples", (1, 10, 15), image_form("int16", 1, None)).images[torch.tensor([0])]


def test_inputs_of_an_edit_are_read_in_their_depth(tmp_path):
    numbers = fill(tmp_path, 1)
    form = image_form("uint16", 1, None)
    assert isinstance(form, HighDepthImage)
    (found,) = read_input(str(tmp_path), [(1, 10, 15)], False, None, form)
    np.testing.assert_array_equal(form.numbers(found.pixels)[0], numbers[0])
    with pytest.raises(UsageError, match=r"is 15 x 10 gray, but must be 6 x 4 gray.*crop and resize"):
        read_input(str(tmp_path), [(1, 4, 6)], False, None, form)
    (found,) = read_input(str(tmp_path), [(1, 4, 6)], True, None, form)
    assert_close(form.quantize(found.pixels), found.pixels, rtol=0, atol=0)


# Commands


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "dicom"])
def test_a_folder_goes_through_every_command_and_comes_back_in_its_depth(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for name in ("x/a", "x/b"):
        Path(name).mkdir(parents=True)
        for number in range(6) if kind == "dicom" else ():
            scan = dicom(RNG.integers(0, 2000, (10, 15), dtype=np.int16), RescaleIntercept=-1000)
            Path(name, f"{number}.dcm").write_bytes(scan)
        if kind == "png":
            fill(Path(name))
    data = ["dataset=folder", "dataset.path=x", "dataset.resolution=[10,15]", "dataset.channels=1",
            "dataset.in_memory=true", "dataset.val_fraction=0.3"]  # fmt: skip
    data += [] if kind == "png" else ["dataset.range=[-1000,1000]"]
    model = ["model=unet_tiny", "model.channels=32", "model.channel_mult=[1]", "model.num_res_blocks=1",
             "model.attention_resolutions=[]", "max_steps=2", "batch_size=4"]  # fmt: skip
    short = ["run=r", "sampler=ddim", "steps=2", "device=cpu"]
    measured = [
        "metric=fid",
        "features=classifier",
        "features.steps=2",
        "features.batch_size=4",
        "cache_dir=c",
    ]
    suffix = ".png" if kind == "png" else ".dcm"
    assert run(["train", *data, *model, "name=r", "logger=csv", "trainer=cpu"]) == 0
    assert run(["sample", *short, "num_samples=3", "output=s"]) == 0
    assert (
        run(["edit", *short, "edit=inpaint", "restoration=replacement", f"input=x/a/0{suffix}", "output=e"])
        == 0
    )
    assert run(["eval", *short, "num_samples=6", *measured, "force=true"]) == 0
    assert run(["eval", "samples=s", *data, *measured, "device=cpu", "force=true"]) == 0
    before, *made = (
        Path(name).read_bytes() for name in (f"x/a/0{suffix}", f"s/000000{suffix}", f"e/0{suffix}")
    )
    if kind == "png":
        assert [depth_of(each) for each in made] == ["uint16"] * 2
        known = read_numbers(before)[0], read_numbers(made[1])[0]
    else:
        scans = [read_scan(each) for each in made]
        assert {(scan.pixels.dtype.name, scan.bits, scan.intercept) for scan in scans} == {
            ("int16", 16, -1000)
        }
        known = read_scan(before).pixels, scans[1].pixels
    np.testing.assert_array_equal(known[0][:2], known[1][:2])  # above what was painted anew


@pytest.mark.parametrize(
    ("numbers", "given", "said"),
    [
        (np.linspace(3000, 4095, 64, dtype=np.uint16), [0, 1], "dataset.range=[0,1]: clips 100% of the values of the "
         "first image, 3000 to 4095; give dataset.range=[low,high]"),
        (np.linspace(0, 4095, 64, dtype=np.uint16), None, "dataset.range=[0,65535]: only 6.2% of it is used by the "
         "values of the first image, 0 to 4095"),
        (np.linspace(-1, 1, 64, dtype=np.float32), [-1, 1], ""),
        (np.linspace(-32768, 32767, 64).astype(np.int16), None, ""),
        (np.linspace(0, 9000, 64, dtype=np.uint16), None, ""),
        (np.linspace(0, 9, 64, dtype=np.uint8), [0, 255], "dataset.range=[0,255]: only 3.5% of it is used"),
        (np.linspace(0, 9, 64, dtype=np.uint8), [0, 9], ""),
        (np.linspace(0, 32, 64, dtype=np.uint8), None, ""),
        (np.zeros(64, np.uint8), None, "dataset.range=null: bytes have the range [0,255], and only 0.0% of it is used "
         "by the values of the first image, 0 to 0; give dataset.range=[low,high] of all images"),
    ],
)  # fmt: skip
def test_a_range_that_images_do_not_have_is_remarked_on(tmp_path, numbers, given, said):
    image = numbers.reshape(8, 8)
    np.save(tmp_path / "a.npy", image[None])
    np.savez_compressed(tmp_path / "a.npz", images=image[None])
    (tmp_path / "files").mkdir()
    tifffile.imwrite(tmp_path / "files" / "a.tif", image)
    options = {"range": given, "flip": False, "val_fraction": 0.0, "in_memory": None}
    stacked = [Array("", path=f"{tmp_path}/a.{suffix}", **options) for suffix in ("npy", "npz")]
    for dataset in (folder(tmp_path / "files", range=given), *stacked):
        remarks = dataset.remarks()
        assert len(remarks) == bool(said)
        assert all(remark.startswith(said) for remark in remarks)


def test_the_values_of_some_images_count_together(tmp_path):
    """A label or a night is dark by itself; all of a data set are not."""
    dark = np.zeros((20, 8, 8, 3), np.uint8)
    dark[::2] = RNG.integers(0, 2, (10, 8, 8, 3))
    for number, pixels in enumerate(dark):
        saved(tmp_path / "dark" / f"{number:02d}.png", pixels)
    np.savez_compressed(tmp_path / "dark.npz", images=dark.astype(np.uint8))
    np.save(tmp_path / "turned.npy", np.asfortranarray(dark))
    line = (
        "bytes have the range [0,255], and only 0.4% of it is used by the values of 8 images examined, 0 to 1"
    )
    for path in (tmp_path / "dark.npz", tmp_path / "turned.npy", tmp_path / "dark"):
        options = {"range": None, "flip": False, "val_fraction": 0.0, "in_memory": None}
        array = path.is_file()
        dataset = Array("", path=str(path), **options) if array else folder(path, channels=3)
        (found,) = dataset.remarks()
        assert found.startswith(f"dataset.range=null: {line}")
        (given,) = given_images(path, "samples").remarks
        assert given == f"samples={path}: {line}; rescale them if this is not intended"
    saved(tmp_path / "dark/19.png", np.full((8, 8, 3), 200, np.uint8))
    assert folder(tmp_path / "dark", channels=3, range=[0, 1]).remarks() == []


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((24, 24, 3), "[24,24,3] is read as 24 gray images of height 24 and width 3;"),
        ((16, 16, 40), "[16,16,40] is read as 16 gray images of height 16 and width 40;"),
        ((28, 20, 300), "[28,20,300] is read as 28 gray images of height 20 and width 300;"),
        ((32, 32, 3, 40), "[32,32,3,40] is read as 32 images of 32 channels of height 3 and width 40;"),
        ((3, 32, 32, 40), "[3,32,32,40] is read as 3 images of 32 channels of height 32 and width 40;"),
        ((5, 16, 16), ""), ((16, 16, 16), ""), ((5, 16, 24, 3), ""), ((3, 3, 16, 24), ""), ((9, 16, 20, 7), ""),
    ],
)  # fmt: skip
def test_an_array_of_unlikely_axes_is_described_as_it_is_read(tmp_path, shape, said):
    np.save(tmp_path / "x.npy", RNG.integers(0, 256, shape, dtype=np.uint8))
    dataset = Array("", path=f"{tmp_path}/x.npy", range=None, flip=False, val_fraction=0.0, in_memory=None)
    found = dataset.remarks()
    assert len(found) == bool(said)
    assert all(line.startswith(f"dataset.path={tmp_path}/x.npy: the array {said}") for line in found)
    assert [
        line.replace("samples=", "dataset.path=")
        for line in given_images(tmp_path / "x.npy", "samples").remarks
    ] == found


def test_a_training_begins_with_the_remark(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.full((20, 8, 8), 3000, np.uint16))
    words = [
        "dataset=array",
        f"dataset.path={tmp_path}/a.npy",
        "dataset.range=[0,1]",
        "max_steps=1",
        "batch_size=4",
    ]
    network = ["model=dit_tiny", "model.hidden_size=16", "model.num_heads=1", "model.depth=1"]
    rest = ["trainer=cpu", "logger=csv", "name=r", f"output_dir={tmp_path}", "preview_steps=1"]
    assert run(["train", *words, *network, *rest]) == 0
    assert (
        "diffuse: dataset.range=[0,1]: clips 100% of the values of 8 images examined"
        in capsys.readouterr().err
    )


# --- Lossy files ---------------------------------------------------------


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

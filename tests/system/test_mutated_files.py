"""Files with random changes are read, or refused in one line; HYPOTHESIS_PROFILE=many tries 10,000 a test."""

import io
import struct
import warnings
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from diffusion_cli.data import given_images
from diffusion_cli.data.decoding import ImageDecoder, form_of_files
from diffusion_cli.formats import Dicom
from diffusion_cli.formats.dicom_reader import colour_image, read_scan
from diffusion_cli.formats.pixel_readers import depth_of, mode_with_opacity, read_numbers, read_with_opacity
from diffusion_cli.formats.volume import read_volume
from helpers.foreign import (
    COLOUR,
    FUZZ,
    PNG,
    array,
    clean,
    described,
    encoded,
    folder,
    mutated,
    npy_file,
    png,
)
from helpers.formats import compressed, dicom

pytestmark = pytest.mark.usefixtures("memory")


def with_sums(data: bytes) -> bytes:
    """A PNG with the checksums of its chunks made right, so that what they hold is looked at."""
    fixed, place = bytearray(data), 8
    while place + 12 <= len(fixed):
        (length,) = struct.unpack_from(">I", fixed, place)
        end = place + 8 + length
        if end + 4 > len(fixed):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[place + 4 : end]))
        place = end + 4
    return bytes(fixed)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


IMAGES = [
    PNG,
    encoded(COLOUR.convert("L"), "PNG"),
    encoded(COLOUR.convert("RGBA"), "PNG", exif=turned()),
    encoded(COLOUR.quantize(16), "PNG", transparency=1),
    encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "PNG"),
    encoded(COLOUR, "PNG", pnginfo=None, icc_profile=b"profile" * 9),
    encoded(COLOUR, "JPEG", exif=turned()),
    encoded(COLOUR.convert("CMYK"), "JPEG", progressive=True),
    encoded(COLOUR, "WEBP", exif=turned()),
    encoded(COLOUR.convert("RGBA"), "WEBP", lossless=True),
    encoded(COLOUR, "WEBP", save_all=True, append_images=[COLOUR.rotate(90)]),
    encoded(COLOUR, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    encoded(COLOUR, "BMP"),
    encoded(COLOUR.quantize(16), "BMP"),
    encoded(COLOUR, "GIF", save_all=True, append_images=[COLOUR.rotate(90)], transparency=1),
    encoded(COLOUR, "PPM"),
    b"P2 # as text\n8 8 15\n" + b" ".join(b"%d" % (number % 16) for number in range(64)),
    encoded(COLOUR.convert("RGBA"), "JPEG2000"),
    encoded(COLOUR, "JPEG2000", tile_size=(4, 4), no_jp2=True),
    encoded(COLOUR, "TIFF"),
    encoded(COLOUR, "TIFF", compression="tiff_lzw", exif=turned()),
    encoded(COLOUR, "TIFF", compression="tiff_deflate", save_all=True, append_images=[COLOUR]),
    encoded(COLOUR.convert("1"), "TIFF", compression="group4"),
    encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "TIFF"),
    encoded(COLOUR.convert("LAB"), "TIFF"),
]


@pytest.mark.slow
@FUZZ
@given(mutated(IMAGES), st.booleans(), st.sampled_from([1, 3]))
def test_mutated_images(data, fix, channels):
    clean(ImageDecoder((channels, 8, 8), "white", True), with_sums(data) if fix else data)


def tiff(numbers: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, numbers, **options)
    return buffer.getvalue()


def scan() -> bytes:
    buffer = io.BytesIO()
    numbers = np.arange(64, dtype=np.int16).reshape(1, 8, 8)
    SCAN.write(SCAN.from_numbers(numbers), buffer)  # pyright: ignore[reportArgumentType]  # pydicom takes both
    return buffer.getvalue()


SCAN = Dicom("int16", 16, 1.0, 0.0, [-100.0], [100.0])
DEEP = [
    tiff(np.arange(64, dtype=np.uint16).reshape(8, 8)),
    tiff(np.arange(192, dtype=np.float32).reshape(8, 8, 3), photometric="rgb"),
    tiff(np.arange(320, dtype=np.int16).reshape(5, 8, 8), photometric="minisblack", compression="zlib"),
    tiff(np.zeros((32, 32), np.uint16), tile=(16, 16), bigtiff=True),
    png(8, 8, (b"IDAT", zlib.compress(bytes(8 * 49)))).replace(b"\x08\x02\0\0\0", b"\x10\x02\0\0\0"),
    *IMAGES[-3:],
    *IMAGES[2:4],
    encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "JPEG2000"),
    b"P5 8 8 4095\n" + bytes(128),
]


@FUZZ
@given(mutated(DEEP), st.booleans(), st.sampled_from([1, 3, 4]))
def test_mutated_deep_images(data, fix, channels):
    data = with_sums(data) if fix else data
    clean(depth_of, data)
    clean(read_numbers, data)
    clean(read_with_opacity, data, "RGBA")
    clean(mode_with_opacity, data, channels)
    clean(form_of_files, data, channels, [0, 100], "auto", 2)


WIDE = dicom(np.arange(32 * 32, dtype=np.int16).reshape(32, 32))
SCANS = [scan(), *(compressed(WIDE, syntax) for syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless))]


@FUZZ
@given(mutated(SCANS))
def test_mutated_scans(data):
    clean(read_scan, data)
    clean(SCAN.decode, data)
    clean(form_of_files, data, 1, "window", "auto", 2)
    clean(form_of_files, data, 3, None, "auto", 2)
    clean(colour_image, data)
    clean(read_volume, data, scan())


def archive(*entries: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in entries:
            file.writestr(name, data)
    return buffer.getvalue()


TABLE = ("labels.csv", b"file,label\na/x.png,1\nb/y.png,2\n")
ARCHIVES = [
    archive(("a/x.png", PNG), ("b/y.png", PNG)),
    archive(("a/x.png", PNG), ("b/y.png", PNG), TABLE, method=zipfile.ZIP_STORED),
    archive(("x.png", PNG), ("../y.png", b""), method=zipfile.ZIP_LZMA),
]
NAMES = st.one_of(
    st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=8),
    st.sampled_from(["a/x.png", "../x.png", "/x.png", "a/labels.csv", "a//b.png"]),
)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """An archive of any names and contents, some of them mutated images and tables."""
    content = st.one_of(mutated([PNG, TABLE[1]]), st.just(PNG))
    entries = draw(st.lists(st.tuples(NAMES, content), max_size=4))
    method = draw(
        st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    )
    with warnings.catch_warnings(action="ignore"):
        return archive(
            *((name.encode(errors="replace").decode(), data) for name, data in entries), method=method
        )


@FUZZ
@given(st.one_of(mutated(ARCHIVES), archives()))
def test_mutated_archives(place, data):
    path = place / "x.zip"
    path.write_bytes(data)
    clean(lambda: folder(path).load("train"))
    clean(lambda: given_images(path, "samples").images[torch.tensor([0])])


def arrays(**content: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **content)
    return buffer.getvalue()


def stored(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


ARRAYS = [
    stored(np.zeros((3, 8, 8), np.uint8)),
    stored(np.asfortranarray(np.zeros((3, 8, 8, 3), np.uint8))),
    arrays(images=np.zeros((3, 8, 8), np.uint8), labels=np.arange(3)),
    archive(("arr_0.npy", stored(np.zeros((3, 8, 8), np.uint8))), method=zipfile.ZIP_STORED),
]
LENGTH = st.one_of(
    st.integers(-2, 9), st.integers(), st.sampled_from([2**31, 2**62, 2**63, 2**64]), st.booleans()
)
DTYPES = st.sampled_from(
    ["|u1", "|O", "<f8", "<i8", "|V8", "<M8[ns]", "|S0", ">u2", "x", 3, [("a", "|u1")], "|b1", ""]
)
HEADERS = st.builds(
    lambda shape, dtype, order, data: npy_file(described(tuple(shape), dtype, order)[:107], data),
    st.lists(LENGTH, max_size=4), DTYPES, st.sampled_from([True, False, None, 1]), st.binary(max_size=600),
)  # fmt: skip


@FUZZ
@given(
    st.one_of(mutated(ARRAYS), HEADERS, HEADERS.map(lambda data: archive(("x.npy", data), ("y.npy", data))))
)
def test_mutated_arrays(place, data):
    path = place / ("x.npz" if data[:2] == b"PK" else "x.npy")
    path.write_bytes(data)
    clean(array, path)
    clean(lambda: given_images(path, "samples").images[torch.tensor([0])])

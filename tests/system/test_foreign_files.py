"""Untrusted archives, images, folders and arrays: none runs code, leaves its folder or exhausts memory."""

import os
import resource
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.commands.inputs import read_input
from diffusion_cli.data import given_images
from diffusion_cli.data.decoding import ImageDecoder
from diffusion_cli.formats import Uint8Image
from diffusion_cli.formats.files import opened
from diffusion_cli.images import read_images
from diffusion_cli.runs.checkpoint import read
from diffusion_cli.system import untrusted as foreign
from helpers.foreign import (
    COLOUR,
    PIXELS,
    PNG,
    array,
    clean,
    described,
    encoded,
    folder,
    npy_file,
    png,
    zipped,
)

pytestmark = pytest.mark.usefixtures("memory")

# --- Archives ------------------------------------------------------------


def declared(data: bytes, name: str, size: int) -> bytes:
    """A ZIP with an entry `name` that claims to inflate to `size` bytes, in both of its headers."""
    changed = bytearray(data)
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = changed.find(signature)
        assert name.encode() in changed[at : at + 80]
        changed[at + place : at + place + 4] = struct.pack("<I", size)
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "message"), [(2**31, "larger than"), (1000, "CRC")])
def test_an_entry_that_inflates_to_more_than_may_be_is_not_inflated(tmp_path, size, message):
    """Not beyond what it declares either: 2^30 zeros are a megabyte."""
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = b"".join([*(bomb.compress(bytes(2**20)) for _ in range(2**10)), bomb.flush()])
    path = zipped(tmp_path / "x.zip", ("x.png", zeros), method=zipfile.ZIP_STORED)
    data = bytearray(declared(path.read_bytes(), "x.png", size))
    data[8:10] = struct.pack("<H", zipfile.ZIP_DEFLATED)
    central = data.rfind(b"PK\x01\x02")
    data[central + 10 : central + 12] = struct.pack("<H", zipfile.ZIP_DEFLATED)
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"x\.png \(.*{message}"):
        folder(path).load("train")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_inflate_without_bounds_are_refused(tmp_path, method):
    path = zipped(tmp_path / "x.zip", ("x.png", PNG), method=method)
    with pytest.raises(ValueError, match="a compression other than deflate"):
        folder(path).load("train")


def test_names_that_leave_the_archive_name_nothing_outside_it(tmp_path):
    (tmp_path / "inner").mkdir()
    names = ["../escaped.png", f"{tmp_path}/absolute.png", "a/../../b.png"]
    path = zipped(tmp_path / "inner" / "x.zip", *((name, PNG) for name in names))
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/hostname")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"1 of the images.*link\.png \(is not an image"):
        folder(path).load("train")
    assert sorted(tmp_path.rglob("*")) == before


def test_two_entries_of_one_name_are_refused(tmp_path):
    path = zipped(tmp_path / "x.zip", ("x.png", PNG), ("x.png", PNG))
    with pytest.raises(ValueError, match="two entries with the same name"):
        folder(path)


def test_encrypted_entries_and_names_that_are_no_unicode_are_said(tmp_path):
    path = zipped(tmp_path / "x.zip", ("x.png", PNG))
    data = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(signature) + place] |= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.png \(.*encrypted"):
        folder(path).load("train")
    path = zipped(tmp_path / "y.zip", ("é.png", PNG))
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(ValueError, match="neither a folder nor a readable"):
        folder(path)


@pytest.mark.slow
def test_a_million_entries_are_listed_in_bounded_memory(tmp_path):
    names = [(f"{number}.png", b"") for number in range(100_000)]
    path = zipped(tmp_path / "x.zip", *names, method=zipfile.ZIP_STORED)
    with pytest.raises(ValueError, match="cannot use 100000 of the images"):
        folder(path, labels="none").load("train")


# --- Images ------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        png(2**31 - 1, 2**31 - 1, (b"IDAT", zlib.compress(bytes(100)))),
        png(50_000, 50_000, (b"IDAT", zlib.compress(bytes(100)))),
        png(0, 8, (b"IDAT", zlib.compress(b""))),
        png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28))), (b"IDAT", zlib.compress(bytes(200)))),
        png(8, 8, (b"iCCP", b"a\0\0" + zlib.compress(bytes(2**28))), (b"IDAT", zlib.compress(bytes(100)))),
        encoded(COLOUR, "PNG")[:60],
        encoded(COLOUR, "JPEG")[:300],
        encoded(COLOUR, "TIFF").replace(struct.pack("<HHIHH", 256, 4, 1, 8, 0), struct.pack("<HHII", 256, 4, 1, 2**31)),
        encoded(Image.new("F", (8, 8)), "TIFF"),
        encoded(Image.new("LAB", (8, 8)), "TIFF"),
    ],
    ids=["huge", "large", "empty", "text", "profile", "cut png", "cut jpeg", "tiff", "float", "lab"],
)  # fmt: skip
def test_a_bad_image_is_one_line_of_ours(data):
    assert clean(ImageDecoder((1, 8, 8), "white", True), data)


def test_only_the_first_frame_of_many_is_read():
    frames = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(50)]
    for kind in ("TIFF", "WEBP", "PNG"):
        image = opened(encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True))
        assert image.convert("RGB").getpixel((0, 0)) == (0, 0, 0)


def test_saved_pictures_that_are_none_are_named(tmp_path):
    (tmp_path / "x.png").write_bytes(PNG)
    (tmp_path / "y.png").write_bytes(encoded(Image.new("L", (9, 8)), "PNG"))
    (tmp_path / "z.png").write_bytes(PNG[:50])
    np.testing.assert_array_equal(read_images([tmp_path / "x.png"])[0].permute(1, 2, 0), PIXELS)
    for name, message in (("y.png", "has 9 x 8 pixels; expected 8 x 8"), ("z.png", "truncated|broken")):
        with pytest.raises(ValueError, match=rf"{name}: .*({message}).*move it away"):
            read_images([tmp_path / "x.png", tmp_path / name])


# --- Folders ------------------------------------------------------------


def test_links_that_go_round_are_followed_once(tmp_path):
    inner, outside = tmp_path / "data" / "a", tmp_path / "elsewhere"
    for place in (inner, outside):
        place.mkdir(parents=True)
        (place / f"{place.name}.png").write_bytes(PNG)
    (inner / "up").symlink_to(tmp_path / "data")
    (inner / "self").symlink_to(inner)
    (tmp_path / "data" / "b").symlink_to(outside)
    (tmp_path / "data" / "c").symlink_to(outside)
    assert folder(tmp_path / "data").files == ["a/a.png", "b/elsewhere.png"]


@pytest.mark.parametrize("kind", ["pipe", "device", "dangling", "loop"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "x.png"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "dangling": "nowhere", "loop": path}[kind])
    assert clean(folder(tmp_path).load, "train")
    assert clean(given_images, tmp_path, "samples")
    assert clean(read_input, str(path), [(3, 8, 8)], False, None, Uint8Image())
    assert clean(read_images, [path])
    assert clean(foreign.read_json, path)
    assert clean(read, path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path):
    (tmp_path / "x.png").write_bytes(PNG)
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(PermissionError, match="closed"):
        folder(tmp_path)


def test_a_table_of_labels_is_no_longer_than_its_images_allow(tmp_path):
    (tmp_path / "x.png").write_bytes(PNG)
    (tmp_path / "labels.csv").write_text("file,label\n" + "x.png,1\n" * 10_000)
    with pytest.raises(ValueError, match=r"labels\.csv cannot be read \(is larger than"):
        folder(tmp_path)


# --- NumPy files ------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        described((2**62, 8, 8)), described((2**31, 2**31, 8)), described((-1, 8, 8)), described((5, 0, 8)),
        described((10**30, 8, 8)), described((5, 8, 8), "|O"), described((5, 8, 8), [("a", "|u1")]),
        described((5, 8, 8), "|u1", "x"), described(()), described((5, 8, 8), "<U9999999"),
        "{" * 100, "[" * 100, "__import__('os').abort()",
    ],
)  # fmt: skip
@pytest.mark.parametrize("compressed", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_array_is_no_larger_than_its_file(tmp_path, header, compressed):
    data = npy_file(header, bytes(100))
    path = tmp_path / ("x.npy" if compressed is None else "x.npz")
    if compressed is None:
        path.write_bytes(data)
    else:
        zipped(path, ("images.npy", data), method=compressed)
    assert clean(array, path)
    assert clean(given_images, path, "samples")


def test_labels_up_to_absurd_numbers_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0, 2**62]))
    with pytest.raises(ValueError, match=r"labels up to 4611686018427387904; the largest supported label"):
        array(tmp_path / "x.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_either_order_are_read_as_numpy_does(tmp_path, save, order):
    images = np.asarray(np.random.default_rng(1).integers(0, 256, (5, 6, 7), dtype=np.uint8), order=order)
    save(tmp_path / "x.npz", images=images)
    given = given_images(tmp_path / "x.npz", "samples").images
    np.testing.assert_array_equal(given[torch.arange(5)][:, 0].numpy(), images)

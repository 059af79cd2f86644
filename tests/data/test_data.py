"""Sources, decoding, order and augmentation of the training data."""

import hashlib
import math
import os
import pickle
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Generator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.testing import assert_close

from diffusion_cli.cli import run
from diffusion_cli.data import (
    CIFAR10,
    MNIST,
    Array,
    Batches,
    Dataset,
    Digits,
    FashionMNIST,
    Folder,
    GaussianMixture,
    Images,
    Pack,
    UnreadableError,
    given_images,
    member_check,
    packing,
    to_device,
    to_model_range,
)
from diffusion_cli.data.decoding import ImageDecoder
from diffusion_cli.data.folder import FileImages
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.errors import UsageError
from diffusion_cli.system.seeding import mix

RNG = np.random.default_rng(0)


def numbered(count: int) -> MemoryImages:
    """Images that say which row they are, and whether they were mirrored."""
    rows = torch.arange(count, dtype=torch.uint8)
    pixels = torch.stack([rows, torch.full_like(rows, 255)], -1).reshape(count, 1, 1, 2)
    return MemoryImages(pixels, torch.arange(count) % 3)


def test_images_keep_the_fingerprint_of_their_source_on_another_device():
    images = numbered(5)
    images.known_as("files")
    assert images.to(torch.device("meta")).fingerprint() == "files"


def rows_and_flips(batch) -> tuple[torch.Tensor, torch.Tensor]:
    values = ((batch.images + 1) * 127.5).round().long().reshape(-1, 2)
    flipped = values[:, 0] == 255
    return torch.where(flipped, values[:, 1], values[:, 0]), flipped


def labels_of(images: Images) -> torch.Tensor:
    assert images.labels is not None
    return images.labels


def take(batches: Batches, count: int) -> list:
    return list(islice(batches, count))


def assert_same(first: list, second: list) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.number == other.number
        for name in ("images", "labels", "index"):
            assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)


# Seeds


def test_mix_is_one_fixed_hash():
    # Frozen on purpose: other numbers would silently change what every seed stands for.
    assert (mix(0), mix(1, "order", 2)) == (6197007067532723406, 134742103060896294)
    different = [mix(), mix(0), mix("0"), mix(0, 1), mix(1, 0), mix("ab"), mix("a", "b")]
    assert len(set(different)) == len(different)
    assert all(0 <= mix(seed) < 2**63 for seed in range(100))


# Batches


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (10, 4), (4, 10), (1, 3)])
def test_every_epoch_is_a_permutation(size, batch_size):
    epochs = 6
    batches = Batches(numbered(size), batch_size, seed=0, flip=False)
    stream = torch.cat([batch.index for batch in take(batches, math.ceil(epochs * size / batch_size))])
    orders = stream[: epochs * size].reshape(epochs, size)
    assert (orders.sort().values == torch.arange(size)).all()
    if size > 4:
        assert len({tuple(order.tolist()) for order in orders}) == epochs


def test_order_is_a_function_of_seed_and_epoch_alone():
    def stream(batch_size, seed=0):
        return torch.cat(
            [b.index for b in take(Batches(numbered(20), batch_size, seed, False), 60 // batch_size)]
        )

    assert_close(stream(5), stream(6))
    assert (stream(5) != stream(5, seed=1)).any()


def test_images_and_labels_are_those_of_the_rows():
    for batch in take(Batches(numbered(30), 8, seed=0, flip=True), 10):
        assert_close(rows_and_flips(batch)[0], batch.index)
        assert_close(batch.labels, batch.index % 3)


def test_starting_at_a_batch_equals_skipping_those_before():
    whole = take(Batches(numbered(10), 4, seed=3, flip=True), 12)
    assert_same(whole[7:], take(Batches(numbered(10), 4, seed=3, flip=True, start=7), 5))


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batch_of_a_single_one(world_size):
    whole = take(Batches(numbered(10), 8, 0, True), 6)
    ranks = [
        take(Batches(numbered(10), 8, 0, True, rank=r, world_size=world_size), 6) for r in range(world_size)
    ]
    shares = list(zip(*ranks, strict=True))
    joined = [
        batches[0]._replace(
            **{name: torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels", "index")}
        )
        for batches in shares
    ]
    assert_same(whole, joined)
    assert all(len(batch.images) == 8 // world_size for batches in shares for batch in batches)


def test_half_of_the_images_are_mirrored_independently_of_the_row():
    batches = take(Batches(numbered(4), 100, seed=0, flip=True), 40)
    flips = torch.cat([rows_and_flips(batch)[1] for batch in batches])
    rows = torch.cat([batch.index for batch in batches])
    assert len({tuple(row.tolist()) for row in flips.reshape(40, 100)}) == 40
    for row in range(4):
        assert abs(flips[rows == row].float().mean() - 0.5) < 4 * 0.5 / math.sqrt(1000)
    assert not torch.cat(
        [rows_and_flips(b)[1] for b in take(Batches(numbered(4), 100, 0, flip=False), 4)]
    ).any()


def test_global_random_state_has_no_part_in_batches(tmp_path):
    write_images(tmp_path, 6)
    images = folder(tmp_path, in_memory=False).load("train")
    before = torch.get_rng_state()
    first = take(Batches(images, 4, 0, True, num_workers=1), 3)
    assert (torch.get_rng_state() == before).all()
    torch.manual_seed(123)
    assert_same(first, take(Batches(images, 4, 0, True), 3))


def test_bytes_fill_the_range_exactly_and_come_back():
    values = torch.arange(256, dtype=torch.uint8)
    x = to_model_range(values)
    assert x.dtype == torch.float32
    assert (x[0], x[-1]) == (-1, 1)
    assert_close(((x + 1) * 127.5).round().to(torch.uint8), values)
    assert_close(to_model_range(torch.tensor([3.5])), torch.tensor([3.5]))


def test_batches_refuse_what_they_cannot_share_out():
    with pytest.raises(ValueError, match=r"batch_size=10.*multiple.*4"):
        Batches(numbered(20), 10, 0, False, world_size=4)
    with pytest.raises(ValueError, match="no images"):
        Batches(numbered(0), 10, 0, False)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_give_the_batches_of_memory(tmp_path, method):
    archive = zipped(write_images(tmp_path / "images", 12), tmp_path / "images.zip")
    dataset = {held: folder(archive, in_memory=held, resolution=6) for held in (True, False)}
    memory, disk = dataset[True].load("train"), dataset[False].load("train")
    assert isinstance(memory, MemoryImages)
    assert not isinstance(disk, MemoryImages)
    disk[torch.tensor([0])]  # opens the archive here, which must not disturb the workers
    torch.multiprocessing.set_start_method(method, force=True)
    try:
        workers = 1 if method == "spawn" else 2
        loaded = take(Batches(disk, 5, seed=1, flip=True, start=2, num_workers=workers), 8)
    finally:
        torch.multiprocessing.set_start_method(None, force=True)
    assert_same(take(Batches(memory, 5, seed=1, flip=True, start=2), 8), loaded)


def test_what_is_not_in_memory_is_read_ahead_by_a_thread_that_ends_with_the_batches(tmp_path, monkeypatch):
    images = folder(write_images(tmp_path, 8), in_memory=False).load("train")
    kind, read_ahead, readers = type(images), threading.Event(), []
    read = kind.__getitem__

    def counted(images, index):
        readers.append(threading.current_thread())
        if len(readers) > 1:
            read_ahead.set()
        return read(images, index)

    monkeypatch.setattr(kind, "__getitem__", counted)
    stream = iter(Batches(images, 4, seed=0, flip=False))
    next(stream)
    assert read_ahead.wait(60), "while the first batch is worked on"
    cast(Generator, stream).close()
    assert not readers[0].is_alive()


def test_a_process_does_not_share_its_handle_of_an_archive(tmp_path, monkeypatch):
    images = folder(zipped(write_images(tmp_path / "x", 2), tmp_path / "x.zip"), in_memory=False).load(
        "train"
    )
    assert isinstance(images, FileImages)
    handle = images._open()
    assert images._open() is handle
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a fork, where both would move one file position
    assert images._open() is not handle


def test_an_archive_that_gave_way_to_another_file_is_said(tmp_path):
    path = zipped(write_images(tmp_path / "x", 2), tmp_path / "x.zip")
    images = folder(path, in_memory=False).load("train")
    content = path.read_bytes()
    path.write_bytes(b"nothing")
    with pytest.raises(
        ValueError, match=r"dataset\.path=.*x\.zip: is no longer a readable \.zip .*; restore it"
    ):
        images[torch.tensor([0])]
    path.unlink()
    zipped(write_images(tmp_path / "x" / "y", 1), path)
    with pytest.raises(ValueError, match=r"cannot use 1 of the images; .* \(is not in the archive\)"):
        images[torch.tensor([1])]
    path.write_bytes(content)
    assert len(folder(path, in_memory=False).load("train")[torch.tensor([0, 1])]) == 2


def test_worker_processes_name_a_broken_file_in_one_line(tmp_path):
    write_images(tmp_path, 3)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    images = folder(tmp_path, in_memory=False).load("train")
    with pytest.raises(UnreadableError, match=r"1 of the images.*bad\.png") as caught:
        take(Batches(images, 4, 0, False, num_workers=1), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_of_the_cpu():
    images = MemoryImages(
        torch.from_numpy(RNG.integers(0, 256, (50, 3, 8, 8), dtype=np.uint8)), torch.arange(50)
    )
    held = to_device(images, "cuda")
    assert held.device.type == "cuda"
    assert held.digest() == images.digest()
    on_cpu, on_gpu = (take(Batches(images, 16, 0, True, device=device), 5) for device in ("cpu", "cuda"))
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert gpu.images.is_cuda
        assert_close(cpu.images, gpu.images.cpu(), rtol=0, atol=1e-6)
        assert_close(cpu.labels, gpu.labels.cpu())


def test_hold_moves_only_what_is_in_memory(tmp_path):
    images = numbered(3)
    assert to_device(images, "cpu") is images
    moved = to_device(images, "meta")
    assert (moved.device.type, labels_of(moved).device.type) == ("meta", "meta")
    write_images(tmp_path, 2)
    disk = folder(tmp_path, in_memory=False).load("train")
    assert to_device(disk, "meta") is disk


# Folders of files


def folder(path: Path, **changes) -> Folder:
    arguments = {
        "masks": None,
        "resolution": 8,
        "channels": 3,
        "range": None,
        "depth": "auto",
        "labels": "auto",
        "background": "white",
        "flip": False,
        "val_fraction": 0.0,
        "in_memory": True,
        "num_workers": 0,
    }
    return Folder("", path=str(path), **(arguments | changes))


def save(path: Path, image: np.ndarray | Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def write_images(path: Path, count: int, size: int = 8) -> Path:
    for number in range(count):
        save(path / f"{'ab'[number % 2]}/{number}.png", RNG.integers(0, 256, (size, size, 3), dtype=np.uint8))
    return path


def zipped(source: Path, archive: Path) -> Path:
    with ZipFile(archive, "w") as file:
        for path in sorted(source.rglob("*")):
            file.write(path, path.relative_to(source))
    return archive


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


def test_class_folders_become_labels(tmp_path):
    for name in ("dog/1.png", "cat/deep/1.png", "dog/2.png", "bee/1.png"):
        save(tmp_path / "wrapped" / name, np.zeros((8, 8), np.uint8))
    for path in (tmp_path, tmp_path / "wrapped"):
        dataset = folder(path)
        assert dataset.class_names == ("bee", "cat", "dog")
        assert dataset.num_classes == 3
        assert_close(dataset.load("train").labels, torch.tensor([0, 1, 2, 2]))
    assert folder(tmp_path, labels="none").class_names is None
    assert folder(tmp_path, labels="none").load("train").labels is None
    assert folder(tmp_path / "wrapped/dog").class_names is None
    save(tmp_path / "wrapped/loose.png", np.zeros((8, 8), np.uint8))
    assert folder(tmp_path).class_names is None


def write_labelled(path: Path, table: str | bytes, name: str = "labels.csv") -> Path:
    """The images a/0.png, a/1.png and b.png, and a table of labels."""
    for number, image in enumerate(("a/0.png", "a/1.png", "b.png")):
        save(path / image, np.full((8, 8), number, np.uint8))
    (path / name).write_bytes(table if isinstance(table, bytes) else table.encode())
    return path


@pytest.fixture(params=["folder", "zip"])
def as_source(request, tmp_path):
    """A folder as it is, or zipped: both must be the same dataset."""
    return lambda path: path if request.param == "folder" else zipped(path, tmp_path / "source.zip")


def test_a_table_gives_labels(tmp_path, as_source):
    table = 'note, label ,file\r\n1,"red, dark",b.png\r\n\r\n2, blue , a/1.png\r\n,,\r\n3,blue,a/0.png\r\n'
    source = as_source(write_labelled(tmp_path / "images", b"\xef\xbb\xbf" + table.encode()))
    for labels in ("auto", "csv"):
        dataset = folder(source, labels=labels)
        assert dataset.class_names == ("blue", "red, dark")
        images = dataset.load("train")
        assert_close(images.labels, torch.tensor([0, 0, 1]))
        assert labels_of(images).dtype == torch.int64
    assert folder(source, labels="none").class_names is None


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (("10", "9", "-1"), ("-1", "9", "10"), [2, 1, 0]),
        (("10", "9", "x"), ("10", "9", "x"), [0, 1, 2]),
        (("07", "7", "6"), ("6", "07", "7"), [1, 2, 0]),
        (("one", "one", "one"), ("one",), [0, 0, 0]),
    ],
)
def test_classes_are_in_numeric_order_if_all_are_numbers(tmp_path, labels, names, expected):
    table = "file,label\na/0.png,{}\na/1.png,{}\nb.png,{}\n".format(*labels)
    dataset = folder(write_labelled(tmp_path, table))
    assert dataset.class_names == names
    assert_close(dataset.load("train").labels, torch.tensor(expected))


@pytest.mark.parametrize(
    ("place", "prefix"), [("", "outer/wrapped/"), ("outer/", "wrapped/"), ("outer/wrapped/", "")]
)
def test_a_table_lies_in_any_folder_that_holds_all_images(tmp_path, as_source, place, prefix):
    table = "file,label\n" + "".join(f"{prefix}{name},{name}\n" for name in ("a/0.png", "a/1.png", "b.png"))
    write_labelled(tmp_path / "images/outer/wrapped", table, "x")
    (tmp_path / "images/outer/wrapped/x").rename(tmp_path / f"images/{place}labels.csv")
    for below in ("a/labels.csv", "../labels.csv" if place == "" else "x.csv"):  # of these, none counts
        (tmp_path / "images/outer/wrapped" / below).write_text("junk")
    dataset = folder(as_source(tmp_path / "images"), labels="csv")
    assert dataset.class_names == ("a/0.png", "a/1.png", "b.png")
    assert_close(dataset.load("train").labels, torch.tensor([0, 1, 2]))


def test_auto_takes_the_table_then_the_folders(tmp_path, as_source):
    source = write_images(tmp_path / "images", 2)
    table = source / "labels.csv"
    assert folder(as_source(source)).class_names == ("a", "b")
    table.write_text("file,label\na/0.png,second\nb/1.png,first\n")
    dataset = folder(as_source(source))
    assert dataset.class_names == ("first", "second")
    assert_close(dataset.load("train").labels, torch.tensor([1, 0]))
    assert folder(as_source(source), labels="folders").class_names == ("a", "b")
    table.write_text("junk")
    with pytest.raises(ValueError, match=r"labels\.csv needs a header"):
        folder(as_source(source))
    assert folder(as_source(source), labels="folders").class_names == ("a", "b")
    assert folder(as_source(source), labels="none").class_names is None


def test_labels_asked_for_must_be_there(tmp_path, as_source):
    source = as_source(write_labelled(tmp_path / "images", "file,label\n", "other.csv"))
    with pytest.raises(ValueError, match=r"^dataset\.labels=csv: no labels\.csv.*; create it"):
        folder(source, labels="csv")
    with pytest.raises(ValueError, match=r"^dataset\.labels=folders: .* two or more class folders; sort"):
        folder(source, labels="folders")
    assert folder(source).class_names is None


ROWS = "a/0.png,x\na/1.png,x\nb.png,y\n"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "needs a header line .* begins with ''; add 'file,label'"),
        (ROWS, r"needs a header line .* begins with 'a/0\.png,x'; add"),
        ("file,class\n" + ROWS, "needs a header line .* begins with 'file,class'; add"),
        ("file;label\na/0.png;x\n", "needs a header line .* begins with 'file;label'; add"),
        ("file,label,label\n" + ROWS, "one column label, .*'file,label,label'; add"),
        ("file,label\n", r"has no row for 'a/0\.png', 'a/1\.png', 'b\.png'; add"),
        ("file,label\nb.png,y\n", r"has no row for 'a/0\.png', 'a/1\.png'; add"),
        ("file,label\n" + ROWS + "c.png,x\n,x\n", r"names files that do not exist: 'c\.png', ''; remove"),
        (
            "file,label\n" + ROWS.replace("/", "\\") + "1,x\n2,x\n3,x\n",
            r"names files that do not exist: 'a\\\\0\.png', 'a\\\\1\.png', '1' and 2 more; .* with /",
        ),
        ('file,label\n"c\n.png",x\n' + ROWS, r"names files that do not exist: 'c\\n\.png'; remove"),
        ("file,label\n" + ROWS + "b.png,y\n", r"has more than one row for 'b\.png'; keep"),
        ("file,label\na/0.png, \na/1.png\nb.png,y\n", r"has no label for 'a/0\.png', 'a/1\.png'; complete"),
        ("file,label\n" + ROWS.replace("y", "y,z"), r"more fields than its header in 'b\.png,y,z'; quote"),
        ('file,label\n"a/0.png,x\n', r"is not valid CSV \(line 2: .*\); repair"),
        (
            ("file,label\n" + ROWS.replace("y", "é")).encode("latin-1"),
            r"is not UTF-8 \(line 4: .*\); save it",
        ),
        (b"\xef\xbb\xbf\n\n\n\xff", r"is not UTF-8 \(line 4: .*\); save it"),
        (("file,label\n" + ROWS).encode("utf-16"), r"is not UTF-8 \(line 1: .*\); save it"),
    ],
)
def test_a_table_that_does_not_match_the_images_is_refused(tmp_path, as_source, table, message):
    source = as_source(write_labelled(tmp_path / "images", table))
    for labels in ("auto", "csv"):
        with pytest.raises(ValueError, match=rf"^dataset\.path=.*: labels\.csv .*{message}") as caught:
            folder(source, labels=labels)
        assert "\n" not in str(caught.value)
    assert folder(source, labels="none").class_names is None


def test_a_damaged_table_in_an_archive_is_refused(tmp_path):
    archive = zipped(write_labelled(tmp_path / "images", "file,label\n" + ROWS), tmp_path / "x.zip")
    archive.write_bytes(archive.read_bytes().replace(b"b.png,y", b"b.png,z"))
    with pytest.raises(ValueError, match=r"x\.zip: labels\.csv cannot be read \(.*CRC.*\); repair"):
        folder(archive)


def test_labels_of_a_table_stay_with_their_images_in_both_splits(tmp_path, as_source):
    for number in range(40):
        save(tmp_path / f"images/{number}.png", np.full((8, 8), number, np.uint8))
    rows = "".join(f"{number}.png,{number}\n" for number in reversed(range(40)))
    (tmp_path / "images/labels.csv").write_text("file,label\n" + rows)
    dataset = folder(as_source(tmp_path / "images"), val_fraction=0.5)
    assert dataset.class_names == tuple(map(str, range(40)))
    seen = []
    for split in ("train", "val"):
        images = dataset.load(split)
        assert len(images) > 0
        pixels = images[torch.arange(len(images))]
        assert_close(labels_of(images), pixels[:, 0, 0, 0].long())
        seen += labels_of(images).tolist()
    assert sorted(seen) == list(range(40))


def test_what_systems_leave_behind_is_ignored(tmp_path):
    write_images(tmp_path, 2)
    for name in ("a/.DS_Store", "a/._0.png", "__MACOSX/a/0.png", ".cache/1.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"junk")
    assert folder(tmp_path).files == ["a/0.png", "b/1.png"]
    assert folder(zipped(tmp_path, tmp_path.with_suffix(".zip"))).files == ["a/0.png", "b/1.png"]


def test_an_archive_is_the_folder_it_was_made_of(tmp_path):
    source = write_images(tmp_path / "images", 7, size=20)
    archive = zipped(source, tmp_path / "images.zip")
    for split in ("train", "val"):
        from_folder, from_zip = (folder(path, val_fraction=0.5).load(split) for path in (source, archive))
        assert len(from_folder) > 0
        assert from_folder.digest() == from_zip.digest()


def test_all_broken_files_are_counted_and_ten_named(tmp_path):
    write_images(tmp_path, 4)
    whole = (tmp_path / "a/0.png").read_bytes()
    (tmp_path / "a/cut.png").write_bytes(whole[: len(whole) // 2])
    for number in range(11):
        (tmp_path / f"b/bad{number:02}.jpg").write_bytes(b"nothing")
    with pytest.raises(
        ValueError, match=r"12 of the images.*a/cut\.png.*bad00\.jpg \(is not an image.*bad08"
    ) as caught:
        folder(tmp_path).load("train")
    message = str(caught.value)
    assert "bad09" not in message
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


def test_paths_without_images_are_refused_at_once(tmp_path):
    with pytest.raises(UsageError, match=r"dataset\.path=.*missing: does not exist"):
        folder(tmp_path / "missing")
    with pytest.raises(ValueError, match="has no images"):
        folder(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="neither a folder nor a readable"):
        folder(tmp_path / "x.zip")


def test_adding_files_moves_none_between_the_splits(tmp_path):
    def names(split) -> set[str]:
        images = folder(tmp_path, val_fraction=0.25, in_memory=False, labels="none").load(split)
        assert isinstance(images, FileImages)
        return set(images.names)

    write_images(tmp_path, 200, size=1)
    train, val = names("train"), names("val")
    assert not train & val
    assert len(train | val) == 200
    assert abs(len(val) - 50) < 4 * math.sqrt(200 * 0.25 * 0.75)
    for number in range(20):
        save(tmp_path / f"a/{number}_new.png", np.zeros((1, 1), np.uint8))
    assert train < names("train")
    assert val <= names("val")


def test_a_few_images_are_divided_or_all_trained_on_with_a_line(tmp_path):
    for count in range(1, 14):
        save(tmp_path / f"{count}.png", np.zeros((8, 8), np.uint8))
        for val in (0.0, 0.001, 0.1, 0.5, 0.99):
            images = folder(tmp_path, val_fraction=val)
            trained, kept = (len(images.load(split)) for split in ("train", "val"))
            assert trained > 0
            assert trained + kept == count
            assert kept > 0 or min(round(val * count), count - 1) <= 0
            assert ("too few" in " ".join(images.remarks())) == (val > 0 and kept == 0)


def test_a_few_rows_are_divided_or_all_trained_on_with_a_line(tmp_path):
    for count in (1, 3, 9):
        np.save(tmp_path / "x.npy", np.zeros((count, 8, 8), np.uint8))
        images = array(tmp_path / "x.npy", val_fraction=0.1)
        assert [len(images.load(split)) for split in ("train", "val")] == [
            count - (count > 4),
            int(count > 4),
        ]
        assert ("too few" in " ".join(images.remarks())) == (count < 5)


def test_a_folder_has_its_whole_name(tmp_path, monkeypatch):
    for name in ("faces.v1", "faces.v2"):
        write_images(tmp_path / name, 3)
        assert folder(tmp_path / name).name == name
    assert folder(zipped(tmp_path / "faces.v1", tmp_path / "faces.v1.zip")).name == "faces.v1"
    monkeypatch.chdir(tmp_path / "faces.v2")
    assert folder(Path()).name == "faces.v2"


# Arrays


def array(path: Path, **changes) -> Array:
    return Array(
        "",
        **(
            {"path": str(path), "range": None, "flip": False, "val_fraction": 0.0, "in_memory": True}
            | changes
        ),
    )


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("axes", ["NHW", "NHWC", "NCHW"])
def test_arrays_of_every_layout_hold_the_same_images(tmp_path, axes, in_memory):
    channels = 1 if axes == "NHW" else 3
    expected = RNG.integers(0, 256, (9, channels, 4, 5), dtype=np.uint8)
    stored = {"NHW": expected[:, 0], "NHWC": expected.transpose(0, 2, 3, 1), "NCHW": expected}[axes]
    np.save(tmp_path / "x.npy", stored)
    dataset = array(tmp_path / "x.npy", in_memory=in_memory)
    assert dataset.shape == (channels, 4, 5)
    images = dataset.load("train")
    assert isinstance(images, MemoryImages) == in_memory
    assert_close(images[torch.tensor([3, 0])], torch.from_numpy(expected[[3, 0]]))
    assert_same_digest(images, expected)


def assert_same_digest(images, expected: np.ndarray) -> None:
    assert images.digest() == MemoryImages(torch.from_numpy(expected), images.labels).digest()


@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), ("arr_0", "arr_1"), ("x", "y")])
def test_archives_of_arrays_have_labels(tmp_path, images, labels):
    pixels = RNG.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    np.savez_compressed(
        tmp_path / "x.npz", **{images: pixels, labels: np.array([0, 2, 1, 2, 0, 0], np.int16)}
    )
    dataset = array(tmp_path / "x.npz", val_fraction=0.5, in_memory=None)
    assert dataset.class_names == ("0", "1", "2")
    train, val = dataset.load("train"), dataset.load("val")
    assert (len(train), len(val)) == (3, 3)
    found = {}
    for split in (train, val):
        for image, label in zip(split[torch.arange(3)], labels_of(split), strict=True):
            found[image.numpy().tobytes()] = int(label)
    expected = {p.transpose(2, 0, 1).tobytes(): k for p, k in zip(pixels, [0, 2, 1, 2, 0, 0], strict=True)}
    assert found == expected


def test_arrays_that_are_no_images_are_refused(tmp_path):
    images = np.zeros((4, 8, 8, 3), np.uint8)

    def refusal(**arrays) -> str:
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(ValueError, match=r"^dataset\.path=.*x\.npz: [^\n]*$") as caught:
            array(tmp_path / "x.npz")
        return str(caught.value)

    assert "float64" in refusal(images=images / 255)
    assert "(4, 8, 8, 8)" in refusal(images=np.zeros((4, 8, 8, 8), np.uint8))
    assert "(4, 8)" in refusal(images=images[:, :, 0, 0])
    assert "no image" in refusal(images=images[:0])
    assert "pictures" in refusal(pictures=images)
    assert "(3,)" in refusal(images=images, labels=np.arange(3))
    assert "minimum -1" in refusal(images=images, labels=np.array([0, 1, -1, 0]))
    assert "float32" in refusal(images=images, labels=np.zeros(4, np.float32))


def test_array_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no such \.npy"):
        array(tmp_path / "missing.npy")
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8), np.uint8))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-5])
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    for name in ("cut.npy", "bad.npz", "objects.npy"):
        with pytest.raises(ValueError, match=rf"^dataset\.path=.*{name}: "):
            array(tmp_path / name)
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"in_memory=False.*\.npy"):
        array(tmp_path / "x.npz", in_memory=False)


def test_a_mapped_array_travels_without_its_pixels(tmp_path):
    np.save(tmp_path / "x.npy", RNG.integers(0, 256, (50, 32, 32), dtype=np.uint8))
    images = array(tmp_path / "x.npy", in_memory=False).load("train")
    before = images[torch.arange(50)]
    parcel = pickle.dumps(images)
    assert len(parcel) < 5000
    assert_close(pickle.loads(parcel)[torch.arange(50)], before)


def pack(dataset: Dataset, path: Path, processes: int = 0) -> Path:
    Pack(processes=processes)(dataset, path)
    return path


def packed(path: Path, **changes) -> Array:
    return array(path, val_fraction=None, **changes)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", ["folder", "plain", "digits"])
def test_a_packed_dataset_is_the_dataset(tmp_path, kind, in_memory):
    source = write_images(tmp_path / ("x" if kind == "folder" else "x/y"), 40)
    dataset = {
        "folder": lambda: folder(zipped(source, tmp_path / "x.zip"), val_fraction=0.3),
        "plain": lambda: folder(source, val_fraction=0.3, labels="none", channels=1),
        "digits": lambda: Digits("", val_fraction=0.2, flip=False),
    }[kind]()
    again = packed(pack(dataset, tmp_path / "x.npz"), in_memory=in_memory)
    assert (again.shape, again.class_names) == (dataset.shape, dataset.class_names)
    for split in ("train", "val"):
        images = again.load(split)
        assert isinstance(images, MemoryImages) == in_memory
        assert images.digest() == dataset.load(split).digest()
    batches = [take(Batches(d.load("train"), 4, seed=1, flip=True), 20) for d in (dataset, again)]
    if kind != "plain":
        assert_same(*batches)
    given = given_images(tmp_path / "x.npz", "samples")
    assert given.class_names == dataset.class_names
    assert len(given.images) == sum(len(dataset.load(split)) for split in ("train", "val"))


def test_another_share_of_a_packed_dataset_may_be_validation(tmp_path):
    path = pack(Digits("", val_fraction=0.0, flip=False), tmp_path / "x.npz")
    assert len(packed(path).load("val")) == 0
    assert len(array(path, val_fraction=0.5).load("val")) == round(1797 / 2)


def test_a_packed_file_is_the_same_from_any_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 2000)
    dataset = folder(write_images(tmp_path / "x", 60), val_fraction=0.3, in_memory=None)
    files = [pack(dataset, tmp_path / f"{n}.npz", n).read_bytes() for n in (0, 1, 2)]
    assert files[0] == files[1] == files[2]


def test_what_cannot_be_packed_is_refused(tmp_path):
    source = write_images(tmp_path / "x", 4)
    (source / "a/0.png").write_bytes(b"nothing")
    for processes in (0, 1):
        with pytest.raises((UsageError, UnreadableError), match=r"^dataset\.path=.*a/0\.png"):
            pack(folder(source, in_memory=False), tmp_path / "x.npz", processes)
    points = {
        "means": [[0.0, 0.0]],
        "stds": [1.0],
        "weights": [1.0],
        "shape": [1, 1, 2],
        "size": 4,
        "seed": 0,
    }
    with pytest.raises(ValueError, match="gaussian_mixture does not consist of 8-bit images"):
        pack(GaussianMixture("", **points), tmp_path / "x.npz")
    with pytest.raises(ValueError, match="channels last"):
        pack(folder(source, resolution=3), tmp_path / "x.npz")


def test_marks_and_names_that_do_not_fit_the_images_are_refused(tmp_path):
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 2, 0])

    def refusal(**arrays) -> str:
        np.savez(tmp_path / "x.npz", images=images, labels=labels, **arrays)
        with pytest.raises(ValueError, match=r"^dataset\.path=.*x\.npz: [^\n]*$") as caught:
            array(tmp_path / "x.npz")
        return str(caught.value)

    assert "expected (4,)" in refusal(val=np.zeros(3, bool))
    assert "2 distinct class names" in refusal(class_names=np.array(["a", "b"]))
    assert "2 distinct class names" in refusal(class_names=np.array(["a", "b", "a"]))


@pytest.mark.parametrize("names", [np.array([b"a", b"b", b"c"]), np.array(["a", "b", "c"], dtype=object)])
def test_what_others_call_marks_and_names_is_passed_over(tmp_path, names):
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 2, 0])
    others = {"class_names": names, "val": np.zeros(4, np.uint8)}
    np.savez(tmp_path / "x.npz", allow_pickle=True, images=images, labels=labels, **others)
    dataset = array(tmp_path / "x.npz", val_fraction=None)
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.val_fraction == 0.1


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_packed_file_with_a_lost_page_is_refused(tmp_path, monkeypatch, in_memory, at_once):
    path = tmp_path / "x.npz"
    images = np.random.RandomState(0).randint(1, 256, (40, 8, 8, 3)).astype(np.uint8)
    np.savez(path, images=images, labels=np.arange(40) % 4)
    content = bytearray(path.read_bytes())
    content[1000:5000] = bytes(4000)
    (tmp_path / "damaged.npz").write_bytes(content)
    if not at_once:
        monkeypatch.setattr(member_check, "AT_ONCE", 0)
        monkeypatch.setattr(member_check, "Thread", lambda target, **_: SimpleNamespace(start=target))
    assert len(array(path, in_memory=in_memory).load("train")[torch.arange(40)]) == 40
    with pytest.raises(
        ValueError, match=r"damaged\.npz: its images are damaged \(Bad CRC-32 for file 'images"
    ):
        array(tmp_path / "damaged.npz", in_memory=in_memory).load("train")[torch.tensor([0])]


@pytest.mark.parametrize("key", ["labels", "val"])
def test_a_packed_file_with_damaged_labels_or_marks_is_refused(tmp_path, key):
    path = tmp_path / "x.npz"
    arrays = {
        "images": np.ones((40, 8, 8), np.uint8),
        "labels": np.arange(40) % 4,
        "val": np.arange(40) < 4,
    }
    np.savez(path, **arrays)
    content = bytearray(path.read_bytes())
    content[content.index(arrays[key].tobytes()) + 9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"Bad CRC-32 for file '{key}.npy'"):
        array(path)


def test_a_compressed_array_is_unpacked_once_to_be_packed(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((4, 8, 8), np.uint8))
    assert isinstance(array(tmp_path / "x.npz", in_memory=None).stream("train"), MemoryImages)


def data(tmp_path: Path, *words: str) -> int:
    return run(["data", "pack", *words, f"output_dir={tmp_path}"])


def test_the_command_writes_a_file_whole_or_not_at_all(tmp_path, capsys):
    source = write_images(tmp_path / "x", 4)
    words = ["dataset=folder", f"dataset.path={source}", "dataset.resolution=8", "dataset.val_fraction=0"]
    assert data(tmp_path, *words) == 0
    output = tmp_path / "packed/x-8x8.npz"
    assert f"dataset.path={output} dataset.flip=true" in capsys.readouterr().out
    before = output.read_bytes()
    assert data(tmp_path, *words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"diffuse: output={output}: already exists; ")
    assert output.read_bytes() == before
    (source / "a/0.png").write_bytes(b"nothing")
    assert data(tmp_path, *words, f"output={tmp_path}/new/x") == 2
    assert list((tmp_path / "new").iterdir()) == []
    assert data(tmp_path, *words, f"output={tmp_path}/x.npy") == 2
    assert data(tmp_path) == 2
    assert "choose one" in capsys.readouterr().err.splitlines()[-1]


# Digests


def test_the_digest_is_that_of_the_content():
    pixels, labels = torch.from_numpy(RNG.integers(0, 256, (300, 1, 4, 4), dtype=np.uint8)), torch.arange(300)
    changed = pixels.clone()
    changed[299, 0, 3, 3] ^= 1
    sets = [
        MemoryImages(pixels, labels),
        MemoryImages(changed, labels),
        MemoryImages(pixels, labels.flip(0)),
        MemoryImages(pixels, None),
        MemoryImages(pixels.flip(0), None),
        MemoryImages(pixels.reshape(300, 1, 2, 8), None),
    ]
    digests = {images.digest() for images in sets}
    assert len(digests) == len(sets)
    assert MemoryImages(pixels.clone(), labels.clone()).digest() in digests


# Published sets


def test_digits_are_those_of_scikit_learn_split_once():
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    dataset = Digits("", val_fraction=0.2, flip=False)
    splits = [dataset.load("train"), dataset.load("val")]
    assert [len(images) for images in splits] == [1438, 359]
    found = sorted(
        (int(label), image.tobytes())
        for images in splits
        for label, image in zip(labels_of(images), images[torch.arange(len(images))].numpy(), strict=True)
    )
    expected = np.rint(255 * values / 16).astype(np.uint8)
    assert found == sorted(
        (int(label), image.tobytes()) for label, image in zip(labels, expected, strict=True)
    )
    # Frozen on purpose: another split would put validation images of older runs into training.
    assert splits[1].digest()[:16] == "83493fb0b8bf54ef"


def write_idx(path: Path, values: np.ndarray) -> None:
    """The format of MNIST: two zero bytes, type 8 (unsigned byte), rank, the sizes big-endian, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()
    )


@pytest.mark.parametrize(("kind", "name"), [(MNIST, "MNIST"), (FashionMNIST, "FashionMNIST")])
def test_mnist_files_are_read_and_padded(tmp_path, kind, name):
    from torchvision import datasets

    images, labels = {}, {}
    for split, prefix, count in (("train", "train", 5), ("val", "t10k", 3)):
        images[split] = RNG.integers(1, 256, (count, 28, 28), dtype=np.uint8)
        labels[split] = RNG.integers(0, 10, count, dtype=np.uint8)
        write_idx(tmp_path / name / "raw" / f"{prefix}-images-idx3-ubyte", images[split])
        write_idx(tmp_path / name / "raw" / f"{prefix}-labels-idx1-ubyte", labels[split])
    for split in ("train", "val"):
        published = kind(str(tmp_path), size=28, flip=False).load(split)
        np.testing.assert_array_equal(published.pixels[:, 0].numpy(), images[split])
        np.testing.assert_array_equal(published.labels.numpy(), labels[split])
        padded = kind(str(tmp_path), size=32, flip=False)
        np.testing.assert_array_equal(
            padded.load(split).pixels[:, 0].numpy(), np.pad(images[split], ((0, 0), (2, 2), (2, 2)))
        )
        assert padded.shape == (1, 32, 32)
    known = [text.split(" - ")[0] for text in getattr(datasets, name).classes]
    assert list(padded.class_names) == known


def test_cifar10_files_are_read(tmp_path, monkeypatch):
    from torchvision import datasets

    images = RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    names = ["train_1", "train_2", "test"]
    entries = {
        name: {"data": images[2 * k : 2 * k + 2].reshape(2, -1), "labels": [k, 9 - k]}
        for k, name in enumerate(names)
    }
    entries["meta"] = {"label_names": list("abcdefghij")}
    sums = {}
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name, entry in entries.items():
        data = pickle.dumps(entry)
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    # The real loading code, with our files for the published ones.
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, sums[name]] for name in names[:2]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": sums["meta"]}
    )
    dataset = CIFAR10(str(tmp_path), flip=True)
    train, val = dataset.load("train"), dataset.load("val")
    np.testing.assert_array_equal(train.pixels.numpy(), images[:4])
    assert labels_of(train).tolist() == [0, 9, 1, 8]
    np.testing.assert_array_equal(val.pixels.numpy(), images[4:])
    assert labels_of(val).tolist() == [2, 7]


@pytest.mark.parametrize(
    ("dataset", "place"),
    [
        (lambda path: MNIST(path, size=32, flip=False), "MNIST/raw"),
        (lambda path: FashionMNIST(path, size=32, flip=False), "FashionMNIST/raw"),
        (lambda path: CIFAR10(path, flip=True), "cifar-10-python.tar.gz"),
    ],
)
def test_without_a_network_one_line_says_what_to_fetch(tmp_path, monkeypatch, dataset, place):
    waits = []

    def offline(*_, **__):
        waits.append(socket.getdefaulttimeout())
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    before = socket.getdefaulttimeout()
    with pytest.raises(UsageError, match=r"^data_dir=.*no network.*get .*https?://.*") as caught:
        dataset(str(tmp_path)).load("train")
    assert place in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(wait is not None for wait in waits)  # a firewall that swallows packets must not hang us
    assert socket.getdefaulttimeout() is before is None


def test_a_damaged_mnist_file_is_no_traceback(tmp_path):
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"MNIST/raw/{prefix}-images-idx3-ubyte", np.zeros((5, 28, 28), np.uint8))
        write_idx(tmp_path / f"MNIST/raw/{prefix}-labels-idx1-ubyte", np.zeros(5, np.uint8))
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    for size in (2000, 3, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UsageError, match=r"data_dir=.*cannot read or download mnist"):
            MNIST(str(tmp_path), size=32, flip=False).load("train")


# The mixture


def test_the_density_is_that_of_torch_distributions(mixture):
    x_t = torch.randn(20, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for alpha, sigma in ((1.0, 0.0), (0.8, 0.6), (0.1, 2.0)):
        stds = (alpha**2 * mixture.stds**2 + sigma**2).sqrt()
        components = Independent(Normal(alpha * mixture.means, stds[:, None].expand(-1, 4)), 1)
        expected = MixtureSameFamily(Categorical(mixture.weights), components).log_prob(x_t.flatten(1))
        assert_close(mixture.log_prob(x_t, alpha, sigma), expected)
        conditional = components.log_prob(x_t.flatten(1)[:, None])
        for label in range(3):
            assert_close(mixture.log_prob(x_t, alpha, sigma, label), conditional[:, label])


def test_the_denoiser_obeys_tweedies_formula(mixture):
    x_t = torch.randn(20, 1, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for alpha, sigma in ((0.8, 0.6), (0.1, 2.0)):
        for label in (None, 1):
            expected = (x_t + sigma**2 * mixture.score(x_t, alpha, sigma, label)) / alpha
            assert_close(mixture.denoise(x_t, alpha, sigma, label), expected)


def test_every_point_may_have_its_own_noise_level_and_label(mixture):
    x = torch.randn(3, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha = torch.linspace(0.1, 1, 15, dtype=torch.float64).reshape(3, 5)
    sigma = (1 - 0.9 * alpha**2).sqrt()
    label = torch.arange(15).reshape(3, 5) % 3
    for method in (mixture.log_prob, mixture.score, mixture.denoise):
        together = method(x, alpha, sigma, label)
        for i in range(3):
            for j in range(5):
                alone = method(x[i, j], alpha[i, j].item(), sigma[i, j].item(), label[i, j].item())
                assert_close(together[i, j], alone)


def test_the_score_is_the_gradient_of_the_density(mixture):
    x = torch.randn(
        20, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True
    )
    for alpha, sigma in ((1.0, 0.0), (0.8, 0.6), (0.1, 2.0)):
        for label in (None, 2):
            (gradient,) = torch.autograd.grad(mixture.log_prob(x, alpha, sigma, label).sum(), x)
            assert_close(mixture.score(x, alpha, sigma, label), gradient)


def test_density_and_posterior_mean_agree_with_quadrature():
    means, stds, weights = [-0.7, 0.4], [0.2, 0.1], [3.0, 1.0]
    line = GaussianMixture(
        "", means=[[m] for m in means], stds=stds, weights=weights, shape=[1, 1, 1], size=1, seed=0
    )
    prior = MixtureSameFamily(
        Categorical(torch.tensor(weights, dtype=torch.float64)),
        Normal(torch.tensor(means, dtype=torch.float64), torch.tensor(stds, dtype=torch.float64)),
    )
    x0 = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    x_t = torch.linspace(-2, 2, 9, dtype=torch.float64)
    joint = (prior.log_prob(x0) + Normal(0.7 * x0, 0.5).log_prob(x_t[:, None])).exp()  # [x_t, x0]
    density = torch.trapezoid(joint, x0)
    points = x_t.reshape(-1, 1, 1, 1)
    assert_close(line.log_prob(points, 0.7, 0.5), density.log(), rtol=1e-9, atol=1e-9)
    posterior_mean = torch.trapezoid(joint * x0, x0) / density
    assert_close(line.denoise(points, 0.7, 0.5).flatten(), posterior_mean, rtol=1e-9, atol=1e-9)


def test_drawn_points_have_the_moments_of_the_mixture(mixture):
    size = 40000
    drawn = GaussianMixture(
        "",
        means=mixture.means.tolist(),
        stds=mixture.stds.tolist(),
        weights=mixture.weights.tolist(),
        shape=[1, 2, 2],
        size=size,
        seed=7,
    )
    images, val = drawn.load("train"), drawn.load("val")
    points = images[torch.arange(size)].double().flatten(1)
    scale = drawn.covariance().diagonal().sqrt()
    assert ((points.mean(0) - drawn.mean().flatten()).abs() < 5 * scale / math.sqrt(size)).all()
    error = (points.T.cov() - drawn.covariance()).abs() / (scale[:, None] * scale)
    assert (error < 5 * 2 / math.sqrt(size)).all()
    frequency = labels_of(images).bincount() / size
    assert ((frequency - drawn.weights).abs() < 5 * 0.5 / math.sqrt(size)).all()
    inside = points[images.labels == 1] - drawn.means[1]
    assert_close(inside.std(), drawn.stds[1], rtol=0.05, atol=0)
    assert images.digest() == drawn.load("train").digest()
    assert images.digest() != val.digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means": [[0.0], [1.0, 2.0]]}, "every mean needs 1"),
        ({"stds": [1.0]}, r"dataset\.stds=\[1\.0\]: must be 2"),
        ({"weights": [1.0, 0.0]}, r"dataset\.weights=.*positive"),
        ({"shape": [1, 1]}, r"dataset\.shape=\[1, 1\]"),
    ],
)
def test_a_mixture_that_does_not_add_up_is_refused(changes, message):
    arguments = {
        "means": [[0.0], [1.0]],
        "stds": [1.0, 1.0],
        "weights": [1.0, 1.0],
        "shape": [1, 1, 1],
        "size": 1,
        "seed": 0,
    }
    with pytest.raises(ValueError, match=message):
        GaussianMixture("", **(arguments | changes))

"""Order, augmentation, sharing and reading ahead of training batches."""

import math
import os
import threading
from collections.abc import Generator
from typing import cast

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffusion_cli.data import Batches, UnreadableError, to_device, to_model_range
from diffusion_cli.data.file_images import FileImages
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.system.seeding import mix
from helpers.data import assert_same, folder, labels_of, take, write_images, zipped

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


def test_mix_is_one_fixed_hash():
    # Frozen on purpose: other numbers would silently change what every seed stands for.
    assert (mix(0), mix(1, "order", 2)) == (6197007067532723406, 134742103060896294)
    different = [mix(), mix(0), mix("0"), mix(0, 1), mix(1, 0), mix("ab"), mix("a", "b")]
    assert len(set(different)) == len(different)
    assert all(0 <= mix(seed) < 2**63 for seed in range(100))


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


@pytest.mark.parametrize("parts", [1, 2])
def test_repeated_batches_are_the_same_images_with_the_same_flips(parts):
    """Each group of two parts comes three times in a row; a start within the repetitions changes nothing."""
    once = take(Batches(numbered(10), 4, seed=3, flip=True, parts=parts), 4 * parts)
    whole = take(Batches(numbered(10), 4, seed=3, flip=True, parts=parts, repeats=3), 12 * parts)
    groups = [once[at : at + parts] for at in range(0, len(once), parts)]
    expected = [batch for group in groups for _ in range(3) for batch in group]
    numbers = range(12 * parts)
    assert_same(whole, [batch._replace(number=k) for k, batch in zip(numbers, expected, strict=True)])
    for start in (4 * parts, 5 * parts - 1):
        later = Batches(numbered(10), 4, seed=3, flip=True, parts=parts, repeats=3, start=start)
        assert_same(whole[start:], take(later, 12 * parts - start))


@pytest.mark.parametrize("parts", [1, 2])
def test_repeated_batches_are_read_once(parts):
    class Counted(MemoryImages):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    images = Counted(torch.zeros(10, 1, 1, 2, dtype=torch.uint8), None)
    take(Batches(images, 4, seed=3, flip=False, parts=parts, repeats=3), 12 * parts)
    assert images.reads == 4 * parts


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


def test_more_workers_than_cores_print_no_warning(tmp_path, monkeypatch, recwarn):
    write_images(tmp_path, 6)
    images = folder(tmp_path, in_memory=False).load("train")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    take(Batches(images, 4, 0, False, num_workers=2), 1)
    assert not [str(warning.message) for warning in recwarn if "worker" in str(warning.message)]


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

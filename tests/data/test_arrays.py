"""NumPy files of images, and packed data sets."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffusion_cli.cli import run
from diffusion_cli.data import (
    Array,
    Batches,
    Dataset,
    Digits,
    GaussianMixture,
    Pack,
    UnreadableError,
    given_images,
    member_check,
    packing,
)
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.errors import UsageError
from helpers.data import array, assert_same, folder, labels_of, take, write_images, zipped

RNG = np.random.default_rng(0)


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


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ("dataset=points dataset.num_points=16 dataset.size=4", "shapes has samples of shape 3 x 16"),
        (
            "dataset=folder dataset.path=v dataset.resolution=[2,8,8] dataset.channels=1 dataset.range=[0,1]",
            "v has samples of shape 1 x 2 x 8 x 8",
        ),
    ],
)
def test_points_and_volumes_are_not_packed(tmp_path, monkeypatch, capsys, words, sizes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v").mkdir()
    np.save(tmp_path / "v" / "0.npy", np.eye(8, dtype=np.float32)[None].repeat(2, 0))
    assert run(["data", *words.split()]) == 2
    line = f"diffuse: dataset: {sizes}, and only images can be packed; train without packing"
    assert line in capsys.readouterr().err.splitlines()
    assert not [*tmp_path.rglob("*.npz")]


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

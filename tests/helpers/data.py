"""Folders, archives and tables of small images."""

from itertools import islice
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from PIL import Image
from torch.testing import assert_close

from diffusion_cli.data import Array, Batches, Folder, Images

RNG = np.random.default_rng(0)


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


def folder(path: Path | str, **changes) -> Folder:
    arguments = {
        "data_dir": "",
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
    return Folder(path=str(path), **(arguments | changes))


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


def array(path: Path | str, **changes) -> Array:
    arguments = {"data_dir": "", "range": None, "flip": False, "val_fraction": 0.0, "in_memory": True}
    return Array(path=str(path), **(arguments | changes))


def damaged(good: bytes, draw: np.random.RandomState) -> bytes:
    """A random beginning of a file, with up to three other bytes."""
    data = bytearray(good[: draw.randint(1, len(good) + 1)])
    for _ in range(draw.randint(4)):
        data[draw.randint(len(data))] = draw.randint(256)
    return bytes(data)

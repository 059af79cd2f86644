"""Throughput of training batches in images/s, of torchvision's ImageFolder with a DataLoader and of diffuse."""

import tempfile
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.race import Contestant, Table, paced, raced
from diffusion_cli.data import Batches, Folder
from diffusion_cli.data.memory import MemoryImages

WORKERS = 2
FILES, BATCH = 400, 32


def tables(rounds: int, device: torch.device) -> Iterator[Table]:
    """Small images in memory, and photographs decoded in workers; all randomly flipped and scaled to [-1, 1]."""
    with tempfile.TemporaryDirectory() as folder:
        yield _in_memory(Path(folder), rounds, device)
    with tempfile.TemporaryDirectory() as folder:
        yield _decoded(Path(folder), rounds, device)


def _in_memory(folder: Path, rounds: int, device: torch.device) -> Table:
    size, pixels = 128, torch.randint(256, (2000, 3, 32, 32), dtype=torch.uint8)
    images = pixels.permute(0, 2, 3, 1).numpy()
    _write(folder, images)
    contestants = [
        _contestant("`ImageFolder`", _image_folder(folder, size, []), size, 20, device),
        _contestant("`Batches`", _ours(MemoryImages(pixels, None), size, device), size, 20, device),
    ]
    return raced(
        f"Batches of {size} images of 3x32x32: held in memory, and files of them read by {WORKERS} workers.",
        contestants,
        rounds,
    )


def _decoded(folder: Path, rounds: int, device: torch.device) -> Table:
    rng = np.random.default_rng(0)
    coarse = rng.integers(256, size=(FILES, 32, 32, 3), dtype=np.uint8)
    _write(
        folder / "files",
        [np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.BICUBIC)) for image in coarse],
    )
    archive = folder / "files.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (folder / "files").rglob("*.jpg"):
            file.write(path, path.relative_to(folder / "files"))
    steps = [transforms.Resize(64), transforms.CenterCrop(64)]
    contestants = [
        _contestant("`ImageFolder`", _image_folder(folder / "files", BATCH, steps), BATCH, 20, device),
        *(
            _contestant(f"`dataset=folder` of {what}", _ours(_folder(path), BATCH, device), BATCH, 20, device)
            for what, path in (("files", folder / "files"), ("a ZIP", archive))
        ),
    ]
    return raced(
        f"Batches of {BATCH} JPEGs of 256x256 as 3x64x64, decoded by {WORKERS} workers: ours at half their size, then "
        "resized by Lanczos; torchvision's whole, then bilinear.",
        contestants,
        rounds,
    )


def _write(folder: Path, images: Iterator[np.ndarray] | list[np.ndarray] | np.ndarray) -> None:
    (folder / "class").mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(np.ascontiguousarray(image)).save(folder / "class" / f"{number}.jpg", quality=95)


def _image_folder(folder: Path, size: int, steps: list[Callable[..., object]]) -> Iterator[Tensor]:
    """Yield torchvision's batches endlessly, as diffuse does, so that workers are never restarted."""
    normal = [
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ]
    files = ImageFolder(str(folder), transforms.Compose([*steps, *normal]))
    endless = RandomSampler(files, num_samples=10**7)
    return (images for images, _ in DataLoader(files, size, sampler=endless, num_workers=WORKERS))


def _folder(path: Path) -> Folder:
    return Folder(
        "", path=str(path), masks=None,
        resolution=64, channels=3, range=None, depth="auto", labels="none", background="white",
        flip=True, val_fraction=0.0, in_memory=False, num_workers=WORKERS,
    )  # fmt: skip


def _ours(source: MemoryImages | Folder, size: int, device: torch.device) -> Iterator[Tensor]:
    images = source.load("train") if isinstance(source, Folder) else source
    stream = Batches(images, size, seed=0, flip=True, device=device, num_workers=WORKERS)
    return (batch.images for batch in stream)


def _contestant(
    name: str, stream: Iterator[Tensor], size: int, batches: int, device: torch.device
) -> Contestant:
    def some() -> None:
        for images in islice(stream, batches):
            images.to(device, non_blocking=True)

    return Contestant(name, paced(some, device), batches * size)

"""A data set in one file, from which training reads images as they are."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch
from numpy.lib import format as npy
from pydantic import NonNegativeInt
from torch import Tensor
from tqdm import tqdm

from diffusion_cli.data.array import CLASS_NAMES, IMAGE_KEYS, LABEL_KEYS, MARKS
from diffusion_cli.data.base import Dataset, Images
from diffusion_cli.data.batches import fetched

CHUNK = 2**20  # bytes that a process decodes at a time: of all of them little, where /dev/shm is small


class Pack:
    """Decodes all images of a dataset once and writes them, as they come, to a .npz that `Array` reads in parts.

    It holds the images of both splits, uint8 [N, C, H, W], which of them are held out, and where there are classes
    the labels and their names. Its bytes are a function of these alone.
    """

    def __init__(self, *, processes: NonNegativeInt | None) -> None:
        self.processes = processes

    def __call__(self, dataset: Dataset, path: Path) -> int:
        """Write the file and return the number of images.

        Raises ValueError naming files that cannot be decoded, or where images are not of 256 values.
        """
        if dataset.shape[-1] in (1, 3):
            raise ValueError(
                f"dataset: images {dataset.shape} would pass for others, with their channels last"
            )
        splits = [dataset.once("train"), dataset.once("held_out")]
        counts = [len(images) for images in splits]
        with ZipFile(path, "w") as archive:
            with _entry(archive, IMAGE_KEYS[0]) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (sum(counts), *dataset.shape)}
                npy.write_array_header_1_0(file, header)
                for pixels in self._pixels(dataset, splits):
                    file.write(pixels.contiguous().numpy().data)
            _write(archive, MARKS, np.arange(sum(counts)) >= counts[0])
            labels = [images.labels for images in splits if images.labels is not None]
            if dataset.class_names is not None and labels:
                _write(archive, LABEL_KEYS[0], torch.cat(labels).cpu().numpy())
                _write(archive, CLASS_NAMES, np.array(dataset.class_names))
        return sum(counts)

    def _pixels(self, dataset: Dataset, splits: list[Images]) -> Iterator[Tensor]:
        """The images of one split after the other, some at a time, under a progress bar on stderr."""
        wanted = _cores() if self.processes is None else self.processes
        size = max(1, CHUNK // int(np.prod(dataset.shape)))
        total = sum(map(len, splits))
        with tqdm(
            total=total, desc=f"packing {dataset.name}", unit="image", unit_scale=True, delay=2.0
        ) as progress:
            for images in filter(len, splits):
                rows = torch.arange(len(images)).split(size)
                processes = min(wanted, len(rows))
                for pixels in fetched(images, rows, processes, key="action.processes"):
                    if isinstance(pixels, Exception):
                        raise ValueError(str(pixels)) from pixels
                    if pixels.dtype != torch.uint8:
                        raise ValueError(
                            f"dataset: {dataset.name} has no images of 256 values, and needs no packing"
                        )
                    yield pixels
                    progress.update(len(pixels))


def _cores() -> int:
    """Those that this process may use: of a node's, what a batch job was given."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _entry(archive: ZipFile, name: str) -> IO[bytes]:
    return archive.open(ZipInfo(f"{name}.npy"), "w", force_zip64=True)  # of 1980: no clock in the bytes


def _write(archive: ZipFile, name: str, array: np.ndarray) -> None:
    with _entry(archive, name) as file:
        npy.write_array(file, array, allow_pickle=False)

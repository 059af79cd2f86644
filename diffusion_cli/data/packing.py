"""Packing of a dataset into a single file for fast training."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch
from numpy.lib import format as npy
from pydantic import NonNegativeInt
from torch import Tensor

from diffusion_cli.data.array import CLASS_NAMES, FORM, IMAGE_KEYS, LABEL_KEYS, MARKS, MASKS, channel_order
from diffusion_cli.data.base import Dataset, Images
from diffusion_cli.data.batches import UnreadableError, fetched
from diffusion_cli.data.packed_conditions import PackedConditions
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.formats import RangedImage
from diffusion_cli.system.machine import usable_cores
from diffusion_cli.system.progress import ProgressBar

CHUNK = 2**20  # bytes decoded at a time per process, little because /dev/shm may be small


class Pack:
    """Decodes all images of a dataset once and writes them to an uncompressed .npz, which `Array` memory-maps.

    The file has the images of both splits [N, C, H, W] in the values of their files, and which of them are for
    validation. If present, it also has labels, class names, attributes, captions, the format of images that are not
    8-bit, and that their last channel is a mask. Equal datasets give equal bytes.

    Args:
        processes: processes that decode images; None: one per core.
    """

    def __init__(self, *, processes: NonNegativeInt | None = None) -> None:
        self.processes = processes

    def __call__(self, dataset: Dataset, path: Path) -> int:
        """Write the file and return the number of images.

        Raises:
            UsageError: files cannot be decoded, captions cannot be read, or the dataset has what cannot be packed, such
                as points, volumes and condition images.
        """
        if len(dataset.shape) != 3:
            size = " x ".join(map(str, dataset.shape))
            problem = f"{dataset.name} has samples of shape {size}, and only images can be packed"
            raise UsageError("dataset", NO_VALUE, problem, "train without packing")
        if channel_order(dataset.shape) != "NCHW":
            raise UsageError(
                "dataset",
                NO_VALUE,
                f"images of shape {dataset.shape} would be mistaken for images with channels last",
            )
        splits = [dataset.stream("train"), dataset.stream("val")]
        counts = [len(images) for images in splits]
        labels = _labels(splits)
        conditions = PackedConditions.of(dataset, splits, labels)
        with ZipFile(path, "w") as archive:
            with _entry(archive, IMAGE_KEYS[0]) as file:
                dtype = np.dtype(dataset.form.dtype if isinstance(dataset.form, RangedImage) else np.uint8)
                header = {"descr": dtype.str, "fortran_order": False, "shape": (sum(counts), *dataset.shape)}
                npy.write_array_header_1_0(file, header)
                for pixels in self._pixels(dataset, splits):
                    file.write(np.ascontiguousarray(pixels).data)
            _write(archive, MARKS, np.arange(sum(counts)) >= counts[0])
            if isinstance(dataset.form, RangedImage):
                _write(archive, FORM, np.array(json.dumps(dataset.form.to_dict())))
            if dataset.has_masks:
                _write(archive, MASKS, np.array(True))
            if dataset.class_names is not None and labels is not None and (labels >= 0).all():
                _write(archive, LABEL_KEYS[0], labels)
                _write(archive, CLASS_NAMES, np.array(dataset.class_names))
            conditions.write(archive)
            for name, values in conditions.arrays().items():
                _write(archive, name, values)
        return sum(counts)

    def _pixels(self, dataset: Dataset, splits: list[Images]) -> Iterator[np.ndarray]:
        """Yield chunks of the images, one split after the other, with a progress bar on stderr."""
        wanted = usable_cores() if self.processes is None else self.processes
        size = max(1, CHUNK // int(np.prod(dataset.shape)))
        total = sum(map(len, splits))
        with ProgressBar(
            total=total, desc=f"packing {dataset.name}", unit="image", unit_scale=True, delay=2.0
        ) as progress:
            for images in filter(len, splits):
                rows = torch.arange(len(images)).split(size)
                processes = min(wanted, len(rows))
                for pixels in fetched(images, rows, processes, key="action.processes"):
                    if isinstance(pixels, Exception):
                        raise UnreadableError(str(pixels)) from pixels
                    yield _numbers(pixels, dataset)
                    progress.update(len(pixels))


def _labels(splits: list[Images]) -> np.ndarray | None:
    """Return the classes of the images, int64 [N], one split after the other; None without classes."""
    labels = [images.labels for images in splits if images.labels is not None]
    return torch.cat(labels).cpu().numpy() if labels else None


def _numbers(pixels: Tensor, dataset: Dataset) -> np.ndarray:
    """Return the values that image files store."""
    if isinstance(dataset.form, RangedImage):
        return dataset.form.numbers(pixels)
    if pixels.dtype != torch.uint8:
        raise UsageError(
            "dataset", NO_VALUE, f"{dataset.name} does not consist of 8-bit images and need not be packed"
        )
    return pixels.numpy()


def _entry(archive: ZipFile, name: str) -> IO[bytes]:
    return archive.open(ZipInfo(f"{name}.npy"), "w", force_zip64=True)  # fixed date, for equal bytes


def _write(archive: ZipFile, name: str, array: np.ndarray) -> None:
    with _entry(archive, name) as file:
        npy.write_array(file, array, allow_pickle=False)

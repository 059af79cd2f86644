"""Images in a NumPy file."""

import math
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple
from zipfile import ZIP_STORED

import numpy as np
import torch
from numpy.lib import format as npy
from pydantic import Field
from torch import Tensor

from diffusion_cli.data.base import Dataset, Images, Split, shuffled_mask, split_rows
from diffusion_cli.data.memory import MemoryImages, fits_in_memory, free_memory
from diffusion_cli.foreign import Archive, reason, regular

IMAGE_KEYS = ("images", "arr_0", "x")
LABEL_KEYS = ("labels", "arr_1", "y")
MOST_CLASSES = 10**6


class Array(Dataset):
    """A .npy or .npz file of uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels.

    Where the shape allows both, channels are last. A .npz holds the images as `images`, `arr_0` or `x`, and
    maybe their classes 0..K - 1 as `labels`, `arr_1` or `y` (integers [N]). Pickled objects are refused.

    Raises FileNotFoundError or ValueError, before pixels are read, if the file is missing or is not this.
    """

    def __init__(
        self,
        data_dir: str,
        *,
        path: str,
        flip: bool,
        held_out: Annotated[float, Field(ge=0, lt=1)],
        in_memory: bool | None,
    ) -> None:
        super().__init__(data_dir)
        self.path = Path(path).expanduser()
        self.name = self.path.stem
        self.flip = flip
        self.held_out = held_out
        compressed = self.path.suffix == ".npz"
        if not self.path.is_file() or self.path.suffix not in (".npy", ".npz"):
            raise FileNotFoundError(f"dataset.path={path}: no such file; give a .npy or .npz file of images")
        if compressed and in_memory is False:
            raise ValueError(
                "dataset.in_memory=False: a .npz cannot be read in parts; save the images as .npy"
            )
        self.in_memory = compressed or in_memory
        try:
            self.key, self.labels = find_keys(self.path) if compressed else (None, None)
            self.count, self.layout, self.shape = read_layout(self.path, self.key)
            self.class_names = None if self.labels is None else class_numbers(self.labels, self.count)
        except Exception as error:  # damaged files fail in many ways in the parsers of ZIP and NumPy headers
            raise ValueError(f"dataset.path={path}: {reason(error)}") from error

    def load(self, split: Split) -> Images:
        rows = split_rows(shuffled_mask(self.count, self.held_out), self.held_out, split)
        labels = None if self.labels is None else self.labels[rows]
        images = ArrayImages(self.path, self.key, self.layout, self.shape, rows, labels)
        in_memory = self.in_memory
        if in_memory is None:
            in_memory = fits_in_memory(len(images) * int(np.prod(self.shape)))
        return MemoryImages(images.gather(torch.arange(len(images))), labels) if in_memory else images


class ArrayImages(Images):
    """Some rows of a NumPy file; a .npy stays on disk, mapped into memory by each process for itself."""

    def __init__(
        self,
        path: Path,
        key: str | None,
        layout: str,
        shape: tuple[int, int, int],
        rows: Tensor,
        labels: Tensor | None,
    ) -> None:
        self.path, self.key, self.layout = path, key, layout
        self.shape = shape
        self.rows = rows
        self.labels = labels
        self._array: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}  # a mapped array would be pickled with all its pixels

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, index: Tensor) -> Tensor:
        if self._array is None:
            self._array = self._open()
        return torch.from_numpy(np.ascontiguousarray(self._array[self.rows[index].numpy()]))

    def _open(self) -> np.ndarray:
        """All images of the file as [N, C, H, W]."""
        array = opened_array(self.path, self.key)
        if self.layout == "NHW":
            return array[:, None]
        return array.transpose(0, 3, 1, 2) if self.layout == "NHWC" else array


class Header(NamedTuple):
    """What a NumPy file says of its array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    start: int
    """Bytes before the array."""

    @property
    def order(self) -> Literal["C", "F"]:
        """In which its numbers lie, as NumPy names it."""
        return "F" if self.fortran_order else "C"

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def opened_array(path: Path, key: str | None) -> np.ndarray:
    """The array of a .npy, or the one called `key` of a .npz: mapped from disk, but where it is compressed.

    Raises ValueError before anything is allocated if the file does not have all that its header declares.
    """
    if key is None:
        header = read_header(path, None)
        return np.memmap(path, header.dtype, "r", header.start, header.shape, header.order)
    with Archive(path) as archive:
        entry = archive.entries[f"{key}.npy"]
        header = _header(archive, f"{key}.npy")
        if entry.compress_type == ZIP_STORED:
            with path.open("rb") as file:  # the member's own header stands before it in the archive
                file.seek(entry.header_offset + 26)
                name, extra = np.frombuffer(file.read(4), "<u2")
            start = entry.header_offset + 30 + int(name) + int(extra) + header.start
            return np.memmap(path, header.dtype, "r", start, header.shape, header.order)
        if header.nbytes > free_memory() // 2:
            raise ValueError(f"'{key}' takes {header.nbytes} bytes of memory; save it as .npy")
        data = archive.read(f"{key}.npy", entry.file_size)
    return np.frombuffer(data, header.dtype, offset=header.start).reshape(header.shape, order=header.order)


def read_arrays(path: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of a .npz, held to its check sums; ValueError, or an error of the parsers, if one is not there whole."""
    with Archive(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.entries]
        missing = [key for key in keys if key not in held]
        if missing:
            raise ValueError(f"holds {', '.join(held[:10])}, and not {' and '.join(missing)}")
        headers = [_header(archive, f"{key}.npy") for key in keys]
        contents = [archive.read(f"{key}.npy") for key in keys]
    return [
        np.frombuffer(content, header.dtype, math.prod(header.shape), header.start)
        .reshape(header.shape, order=header.order)
        .copy()
        for header, content in zip(headers, contents, strict=True)
    ]


def read_header(path: Path, key: str | None) -> Header:
    """The header of a .npy, or of the array called `key` of a .npz; ValueError if the file does not hold as much."""
    if key is not None:
        with Archive(path) as archive:
            return _header(archive, f"{key}.npy")
    size = regular(path)
    with path.open("rb") as file:
        return _parsed(file, size)


def _header(archive: Archive, name: str) -> Header:
    with archive.open(name) as file:
        return _parsed(file, archive.entries[name].file_size)


def _parsed(file: IO[bytes], size: int) -> Header:
    version = npy.read_magic(file)
    shape, fortran_order, dtype = (
        npy.read_array_header_1_0(file) if version == (1, 0) else npy.read_array_header_2_0(file)
    )
    if dtype.kind not in "biuf":
        raise ValueError(f"holds {dtype}; images and labels are numbers")
    if min(shape, default=0) < 0:
        raise ValueError(f"has shape {shape}; no length is negative")
    header = Header(shape, dtype, fortran_order, file.tell())
    if header.start + header.nbytes > size:
        raise ValueError(f"has {size} bytes, fewer than an array {shape} of {dtype} takes")
    return header


def find_keys(path: Path) -> tuple[str, Tensor | None]:
    """The name of the images in a .npz, and its labels."""
    with Archive(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.entries if name.endswith(".npy")]
    images = [key for key in IMAGE_KEYS if key in names]
    labels = [key for key in LABEL_KEYS if key in names]
    if not images:
        raise ValueError(
            f"holds {', '.join(names[:10])}; images must be called one of {', '.join(IMAGE_KEYS)}"
        )
    if not labels:
        return images[0], None
    dtype = read_header(path, labels[0]).dtype
    if dtype.kind not in "iu":
        raise ValueError(f"'{labels[0]}' holds {dtype}; labels must be integers")
    return images[0], torch.from_numpy(opened_array(path, labels[0]).astype(np.int64))


def read_layout(path: Path, key: str | None) -> tuple[int, str, tuple[int, int, int]]:
    """Number, order of axes, and shape [C, H, W] of the images, from the header of their array."""
    shape, dtype, *_ = read_header(path, key)
    if dtype != np.uint8:
        raise ValueError(f"holds {dtype}; images must be uint8 in 0..255")
    match shape:
        case sizes if 0 in sizes:
            raise ValueError("holds no image")
        case (count, height, width):
            return count, "NHW", (1, height, width)
        case (count, height, width, (1 | 3) as channels):
            return count, "NHWC", (channels, height, width)
        case (count, (1 | 3) as channels, height, width):
            return count, "NCHW", (channels, height, width)
    raise ValueError(
        f"has shape {shape}; images must be [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3"
    )


def class_numbers(labels: Tensor, count: int) -> tuple[str, ...]:
    """The names "0".."K - 1" of the classes."""
    if labels.shape != (count,) or labels.min() < 0:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)}, from {labels.min()}; must be {count} from 0 on"
        )
    if labels.max() >= MOST_CLASSES:
        raise ValueError(
            f"labels up to {labels.max()}; classes are numbered from 0, up to {MOST_CLASSES - 1}"
        )
    return tuple(str(number) for number in range(int(labels.max()) + 1))

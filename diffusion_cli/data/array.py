"""Images in a NumPy file."""

import math
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple
from zipfile import ZIP_STORED

import numpy as np
import torch
from numpy.lib import format as npy
from pydantic import Field
from torch import Tensor

from diffusion_cli.data.base import Dataset, Images, Split, shuffled_mask, split_rows, spread, too_few
from diffusion_cli.data.member_check import member_check
from diffusion_cli.data.memory import MemoryImages, fits_in_memory, free_memory
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.formats import Range, RangedImage, SampleFormat, Shape, Uint8Image, form_of, image_form
from diffusion_cli.formats.range_check import LOOKED_AT
from diffusion_cli.runs.migrate import SPLITS_OF_FORMAT_5
from diffusion_cli.system.untrusted import Archive, from_json, reason, regular

IMAGE_KEYS = ("images", "arr_0", "x")
LABEL_KEYS = ("labels", "arr_1", "y")
CLASS_NAMES, MARKS, FORM = "class_names", "val", "form"
VAL_FRACTION = 0.1  # fraction, where nothing else is said
MOST_CLASSES = 10**6


class Array(Dataset):
    """A .npy or .npz file of images [N, H, W], [N, H, W, C] or [N, C, H, W], uint8, uint16, int16 or float32.

    Of 1 or 3 channels, which are last where the shape allows both; else of the fewest of the two lengths. A .npz holds
    the images as `images`, `arr_0` or `x`, and maybe their classes 0..K - 1 as `labels`, `arr_1` or `y`
    (integers [N]), what these are called as `class_names` (texts [K]), which are validation images as `val`
    (bool [N]), which count where the argument `val_fraction` is None, and what their numbers mean as `form` (a text of
    JSON), which counts where `range` is None. Pickled objects are refused.

    Raises UsageError, before pixels are read, if the file is missing or is not this.
    """

    def __init__(
        self,
        data_dir: str,
        *,
        path: str,
        range: Range | list[Range] | None = None,
        flip: bool = False,
        val_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None,
        in_memory: bool | None = None,
    ) -> None:
        super().__init__(data_dir)
        self.path = Path(path).expanduser()
        self.name = self.path.stem
        self.flip = flip
        if not self.path.is_file() or self.path.suffix not in (".npy", ".npz"):
            raise UsageError("dataset.path", path, "no such file", "give a .npy or .npz file of images")
        try:
            self.contents = read_contents(self.path)
            self.form = form_of_array(self.contents, range)
        except UsageError:
            raise
        except Exception as error:  # damaged files fail in many ways in the parsers of ZIP and NumPy headers
            raise UsageError("dataset.path", path, reason(error)) from error
        if self.contents.compressed and in_memory is False:
            raise UsageError(
                "dataset.in_memory",
                "False",
                "a compressed .npz cannot be read in parts",
                "save the images as .npy, or by diffuse data pack",
            )
        self.in_memory = self.contents.compressed or in_memory
        self.shape = self.contents.shape
        self.class_names = self.contents.class_names
        marks = self.contents.val
        if val_fraction is None and marks is not None:
            self.val_fraction, self.is_val = float(marks.mean()), marks
        else:
            self.val_fraction = VAL_FRACTION if val_fraction is None else val_fraction
            self.is_val = shuffled_mask(self.contents.number, self.val_fraction)

    def load(self, split: Split) -> Images:
        images = self._rows(split)
        in_memory = self.in_memory
        if in_memory is None:
            in_memory = fits_in_memory(
                len(images) * int(np.prod(self.shape)) * (1 if isinstance(self.form, Uint8Image) else 4)
            )
        if not in_memory:
            return images
        return MemoryImages(images[torch.arange(len(images))], images.labels, images.fingerprint())

    def remarks(self) -> list[str]:
        remark = self.form.remark([*first_images(self.path, self.contents)])
        lines = [*shape_remarks(f"dataset.path={self.path}", self.contents), *([remark] if remark else [])]
        no_val = self.val_fraction > 0 and not self.is_val.any()
        return [*lines, too_few(self.contents.number, self.val_fraction)] if no_val else lines

    def stream(self, split: Split) -> Images:
        # What is compressed would be unpacked whole by every process that reads some of it.
        return self.load(split) if self.contents.compressed else self._rows(split)

    def _rows(self, split: Split) -> "ArrayImages":
        rows = split_rows(self.is_val, self.val_fraction, split)
        return ArrayImages(self.path, self.contents, self.form, rows)


class Contents(NamedTuple):
    """What a NumPy file of images holds."""

    key: str | None
    """What the images of a .npz are called."""
    compressed: bool
    """Whether these cannot be mapped from disk."""
    dtype: str
    number: int
    layout: str
    """The order of the images' axes."""
    shape: Shape
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    val: np.ndarray | None
    form: SampleFormat | None
    """What is noted of it."""


def form_of_array(contents: Contents, given: Range | list[Range] | None) -> SampleFormat:
    """The format of its images, by their range or as noted in the file; UsageError if there is none."""
    if given is None and contents.form is not None:
        return contents.form
    return image_form(contents.dtype, contents.shape[0], given)


def first_images(path: Path, contents: Contents) -> np.ndarray:
    """What the file holds of a few images, [B, C, H, W]: of a compressed one the first, else spread over all."""
    few = min(contents.number, LOOKED_AT)
    if not contents.compressed:
        rows = spread(contents.number, few).numpy()
        return _channels_first(np.ascontiguousarray(opened_array(path, contents.key)[rows]), contents.layout)
    with Archive(path) as archive, archive.open(f"{contents.key}.npy") as file:
        header = _parsed(file, archive.entries[f"{contents.key}.npy"].file_size)
        size = header.nbytes if header.fortran_order else header.nbytes // contents.number * few
        numbers = np.frombuffer(file.read(size), header.dtype)
    number = contents.number if header.fortran_order else few
    numbers = numbers.reshape(number, *header.shape[1:], order=header.order)
    return _channels_first(np.ascontiguousarray(numbers[:few]), contents.layout)


def _channels_first(numbers: np.ndarray, layout: str) -> np.ndarray:
    if layout == "NCHW":
        return numbers
    return numbers[:, None] if layout == "NHW" else numbers.transpose(0, 3, 1, 2)


def shape_remarks(key: str, contents: Contents) -> list[str]:
    """One line that states how an array is read, where its axes are probably others, as of MATLAB or one image."""
    count, (channels, height, width) = contents.number, contents.shape
    before = count if contents.layout == "NHW" else channels
    likely = before != height or before == width or (contents.layout != "NHW" and channels <= 4)
    if likely and min(height, width) > 4 and max(height, width) < 8 * min(height, width):
        return []
    kind = {1: "gray images", 3: "colour images"}.get(channels, f"images of {channels} channels")
    axes = {"NHW": (count, height, width), "NCHW": (count, channels, height, width)}
    shown = ",".join(map(str, axes.get(contents.layout, (count, height, width, channels))))
    return [
        f"{key}: the array [{shown}] is read as {count} {kind} of height {height} and width {width}; if that is not "
        "meant, save [N,H,W] or [N,H,W,C], and one image as [1,H,W,C]"
    ]


class ArrayImages(Images):
    """Some rows of a NumPy file; a .npy stays on disk, mapped into memory by each process for itself."""

    def __init__(self, path: Path, contents: Contents, form: SampleFormat, rows: Tensor) -> None:
        self.path, self.key, self.layout, self.form = path, contents.key, contents.layout, form
        self.shape = contents.shape
        self.rows = rows
        self.labels = None if contents.labels is None else contents.labels[rows]
        self._array: np.ndarray | None = None
        mapped = self.key is not None and not contents.compressed
        self._check = member_check(path, f"{self.key}.npy") if mapped else None

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array would be pickled with all its pixels; the process that starts others does the check.
        return {**self.__dict__, "_array": None, "_check": None}

    def __len__(self) -> int:
        return len(self.rows)

    def numbers(self, index: Tensor) -> np.ndarray:
        """What the file holds of rows, [B, C, H, W]."""
        if self._array is None:
            self._array = opened_array(self.path, self.key)
        if self._check is not None:
            self._check.require()
        # Whole images first, as they lie, and then their axes: four times as fast as both at once.
        return _channels_first(np.ascontiguousarray(self._array[self.rows[index].numpy()]), self.layout)

    def fingerprint(self) -> str:
        numbers = self.numbers(self._evenly())
        kind = f"{len(self)} {numbers.shape} {numbers.dtype.str}".encode()
        return sha256(kind + numbers.tobytes()).hexdigest()

    def __getitem__(self, index: Tensor) -> Tensor:
        pixels = self.numbers(index)
        if not isinstance(self.form, RangedImage):
            return torch.from_numpy(pixels).contiguous()
        try:
            return self.form.from_numbers(pixels)
        except ValueError as error:
            raise UsageError(
                self.path, NO_VALUE, f"one of the rows {self.rows[index].tolist()[:9]} {error}"
            ) from error


class ArrayHeader(NamedTuple):
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

    Raises FormatError before anything is allocated if the file does not have all that its header declares.
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
    return loaded_array(path, key)


def loaded_array(path: Path, key: str) -> np.ndarray:
    """The array called `key` of a .npz, held to its checksum; FormatError if it is damaged or takes too much memory."""
    with Archive(path) as archive:
        header = _header(archive, f"{key}.npy")
        if header.nbytes > free_memory() // 2:
            raise FormatError(f"'{key}' takes {header.nbytes} bytes of memory; save it as .npy")
        data = archive.read(f"{key}.npy", archive.entries[f"{key}.npy"].file_size)
    numbers = np.frombuffer(data, header.dtype, math.prod(header.shape), header.start)
    return numbers.reshape(header.shape, order=header.order)


def array_of(data: bytes) -> np.ndarray:
    """The array of numbers that the bytes of a .npy hold; FormatError, or an error of the parser, if they hold none."""
    header = _parsed(BytesIO(data), len(data))
    numbers = np.frombuffer(data, header.dtype, math.prod(header.shape), header.start)
    return numbers.reshape(header.shape, order=header.order)


def read_arrays(path: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of a .npz, held to its check sums; FormatError, or an error of the parsers, if one is not there whole."""
    with Archive(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.entries]
        missing = [key for key in keys if key not in held]
        if missing:
            raise FormatError(f"holds {', '.join(held[:10])}, and not {' and '.join(missing)}")
        headers = [_header(archive, f"{key}.npy") for key in keys]
        contents = [archive.read(f"{key}.npy") for key in keys]
    return [
        np.frombuffer(content, header.dtype, math.prod(header.shape), header.start)
        .reshape(header.shape, order=header.order)
        .copy()
        for header, content in zip(headers, contents, strict=True)
    ]


def read_header(path: Path, key: str | None) -> ArrayHeader:
    """The header of a .npy, or of the array called `key` of a .npz; FormatError if the file does not hold as much."""
    if key is not None:
        with Archive(path) as archive:
            return _header(archive, f"{key}.npy")
    size = regular(path)
    with path.open("rb") as file:
        return _parsed(file, size)


def _header(archive: Archive, name: str) -> ArrayHeader:
    with archive.open(name) as file:
        return _parsed(file, archive.entries[name].file_size)


def _parsed(file: IO[bytes], size: int, kinds: str | None = "biuf") -> ArrayHeader:
    version = npy.read_magic(file)
    shape, fortran_order, dtype = (
        npy.read_array_header_1_0(file) if version == (1, 0) else npy.read_array_header_2_0(file)
    )
    if kinds is not None and dtype.kind not in kinds:
        raise FormatError(f"holds {dtype}; images and labels are numbers")
    if min(shape, default=0) < 0:
        raise FormatError(f"has shape {shape}; no length is negative")
    header = ArrayHeader(shape, dtype, fortran_order, file.tell())
    if header.start + header.nbytes > size:
        raise FormatError(f"has {size} bytes, fewer than an array {shape} of {dtype} takes")
    return header


def read_contents(path: Path) -> Contents:
    """What a .npy or .npz file of images holds; FormatError, or an error of the parsers, if it is none."""
    if path.suffix != ".npz":
        return Contents(
            None, False, *read_layout(path, None), labels=None, class_names=None, val=None, form=None
        )
    with Archive(path) as archive:
        entries = {name.removesuffix(".npy"): entry for name, entry in archive.entries.items()}
        names = _texts(archive) if CLASS_NAMES in entries else None
        form = _noted(archive) if FORM in entries else None
    key = next((key for key in IMAGE_KEYS if key in entries), None)
    if key is None:
        held = ", ".join([*entries][:10])
        raise FormatError(f"holds {held}; images must be called one of {', '.join(IMAGE_KEYS)}")
    dtype, count, layout, shape = read_layout(path, key)
    marks_key = next((key for key in (MARKS, *SPLITS_OF_FORMAT_5) if key in entries), None)
    labels_key = next((key for key in LABEL_KEYS if key in entries), None)
    labels = None if labels_key is None else read_labels(path, labels_key)
    return Contents(
        key, entries[key].compress_type != ZIP_STORED, dtype, count, layout, shape, labels,
        None if labels is None else class_names(labels, count, names),
        None if marks_key is None else read_marks(path, marks_key, count),
        form if isinstance(form, RangedImage) and form.dtype == dtype else None,
    )  # fmt: skip


def read_labels(path: Path, key: str) -> Tensor:
    """The array of a .npz called `key`, as int64 [N]."""
    dtype = read_header(path, key).dtype
    if dtype.kind not in "iu":
        raise FormatError(f"'{key}' holds {dtype}; labels must be integers")
    return torch.from_numpy(loaded_array(path, key).astype(np.int64))


def read_marks(path: Path, key: str, count: int) -> np.ndarray | None:
    """Which images of a .npz are validation images, bool [count], or None where something else is called so."""
    header = read_header(path, key)
    if header.dtype != np.bool_:
        return None
    if header.shape != (count,):
        raise FormatError(f"'{key}' has shape {header.shape}; must be of {count}")
    return np.array(loaded_array(path, key))


def _texts(archive: Archive) -> list[str] | None:
    """The names of the classes, or None where something else is called so."""
    name = f"{CLASS_NAMES}.npy"
    with archive.open(name) as file:
        header = _parsed(file, archive.entries[name].file_size, None)
    if header.dtype.kind != "U" or len(header.shape) != 1 or header.shape[0] > MOST_CLASSES:
        return None
    return np.frombuffer(archive.read(name), header.dtype, math.prod(header.shape), header.start).tolist()


def _noted(archive: Archive) -> SampleFormat | None:
    """The format that a packed file names, or None if the entry is something else."""
    name = f"{FORM}.npy"
    with archive.open(name) as file:
        header = _parsed(file, archive.entries[name].file_size, None)
    if header.dtype.kind != "U" or header.shape != ():
        return None
    stored = from_json(str(np.frombuffer(archive.read(name), header.dtype, 1, header.start)[0]).encode())
    return form_of(stored) if isinstance(stored, dict) else None


def read_layout(path: Path, key: str | None) -> tuple[str, int, str, Shape]:
    """Type, number, order of axes, and shape [C, H, W] of the images, from the header of their array."""
    shape, dtype, *_ = read_header(path, key)
    if 0 in shape:
        raise FormatError("holds no image")
    if len(shape) == 3:
        count, height, width = shape
        return dtype.name, count, "NHW", (1, height, width)
    order = channel_order(shape[1:])
    if order is None:
        raise FormatError(
            f"has shape {shape}; images must be [N, H, W], [N, H, W, C] or [N, C, H, W], C 1, 3 or less than H and W"
        )
    count, channels, height, width = shape if order == "NCHW" else (shape[0], shape[3], *shape[1:3])
    return dtype.name, count, order, (channels, height, width)


def channel_order(sizes: Shape) -> Literal["NHWC", "NCHW"] | None:
    """Where the channels of images of three sizes are, or None where that cannot be told."""
    if len(sizes) != 3:
        return None
    first, _, last = sizes
    if 1 in (first, last) or 3 in (first, last):
        return "NHWC" if last in (1, 3) else "NCHW"
    if first == last:
        return None
    return "NHWC" if last < first else "NCHW"


def class_names(labels: Tensor, count: int, names: list[str] | None) -> tuple[str, ...]:
    """The names of the classes; "0".."K - 1" where none are given."""
    if labels.shape != (count,) or labels.min() < 0:
        raise FormatError(
            f"labels of shape {tuple(labels.shape)}, from {labels.min()}; must be {count} from 0 on"
        )
    if labels.max() >= MOST_CLASSES:
        raise FormatError(
            f"labels up to {labels.max()}; classes are numbered from 0, up to {MOST_CLASSES - 1}"
        )
    if names is None:
        return tuple(str(number) for number in range(int(labels.max()) + 1))
    if not labels.max() < len(set(names)) == len(names):
        raise FormatError(f"has {len(set(names))} names of classes, and labels up to {labels.max()}")
    return tuple(names)

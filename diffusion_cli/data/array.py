"""Images in a NumPy file."""

import math
from collections.abc import Mapping
from functools import partial
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

from diffusion_cli.conditions import AttributeDescription
from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.data.attributes import Attributes, Chosen, Column, attributes, chosen_columns, kinds_of
from diffusion_cli.data.base import Dataset, Images, Split, shuffled_mask, split_rows, spread, too_few
from diffusion_cli.data.captions import CaptionTable
from diffusion_cli.data.groups import KEY as GROUP_KEY
from diffusion_cli.data.groups import Groups
from diffusion_cli.data.member_check import member_check
from diffusion_cli.data.memory import MemoryImages, fits_in_memory
from diffusion_cli.data.packed_conditions import (
    CAPTIONS,
    VALUES,
    array_name,
    packed_attributes,
    packed_column,
    read_packed_captions,
)
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.formats import (
    Original,
    Range,
    RangedImage,
    SampleFormat,
    Shape,
    Uint8Image,
    form_of,
    image_form,
)
from diffusion_cli.formats.range_check import LOOKED_AT
from diffusion_cli.runs.migrate import SPLITS_OF_FORMAT_5
from diffusion_cli.system.machine import free_memory
from diffusion_cli.system.remote import local_copy
from diffusion_cli.system.untrusted import Archive, from_json, reason, regular

IMAGE_KEYS = ("images", "arr_0", "x")
LABEL_KEYS = ("labels", "arr_1", "y")
CLASS_NAMES, MARKS, FORM, MASKS = "class_names", "val", "form", "has_masks"
VAL_FRACTION = 0.1  # default of val_fraction
MOST_CLASSES = 10**6


class Array(Dataset):
    """Images in a .npy or .npz file, [N, H, W], [N, H, W, C] or [N, C, H, W], of uint8, uint16, int16 or float32.

    The channel axis is the last one if it has length 1 or 3, else the first if that has, else the shorter of the
    two. Pickled objects are refused. A .npz file has these arrays:

    - `images`, `arr_0` or `x`: the images;
    - `labels`, `arr_1` or `y` (optional): classes 0..K - 1, integers [N];
    - `class_names` (optional): names of the classes, strings [K];
    - `val` (optional): which images are for validation, bool [N]; used if `val_fraction` is None;
    - `form` (optional): JSON text with the value range of the images; used if `range` is None;
    - `has_masks` (optional): whether the last channel of the images is a segmentation mask, one bool;
    - other arrays of texts, numbers or booleans [N] (optional): attributes, chosen by `label`. An empty text and NaN
      are missing values;
    - attributes and captions of `Pack` (optional).

    Args:
        data_dir: folder of downloaded datasets, for the copy of a URL.
        path: the file, or its URL.
        range: [low, high], the values that become -1 and 1, or one pair per channel; None: as stored in the file,
            or the whole range of an integer dtype.
        label: arrays that a model is conditioned on (`label`: the classes): names, or types by name; None: the classes.
        flip: whether training may flip images horizontally.
        val_fraction: fraction of the images for validation, in [0, 1); None: as marked in the file, or 0.1.
        group: array of a .npz with the group of each image; a hash of its name decides the split. None: each image by
            itself.
        in_memory: whether to load all images; None: if they fit. Compressed files are always loaded.

    Raises:
        UsageError: the file is missing or malformed. Only headers are read for this, no pixels.
    """

    def __init__(
        self,
        data_dir: str,
        *,
        path: str,
        range: Range | list[Range] | None = None,
        label: Chosen = None,
        flip: bool = False,
        val_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None,
        group: str | None = None,
        in_memory: bool | None = None,
    ) -> None:
        super().__init__(data_dir)
        self.path = local_copy(path, self.data_dir)
        self.name = self.path.stem
        self.flip = flip
        if not self.path.is_file() or self.path.suffix not in (".npy", ".npz"):
            raise UsageError("dataset.path", path, "no such .npy or .npz file", "give a NumPy file of images")
        try:
            self.contents = read_contents(self.path)
            self.form = form_of_array(self.contents, range)
        except UsageError:
            raise
        except Exception as error:  # the parsers of ZIP and NumPy headers raise errors of many types
            raise UsageError("dataset.path", path, reason(error)) from error
        if self.contents.compressed and in_memory is False:
            raise UsageError(
                "dataset.in_memory",
                "False",
                "a compressed .npz must be read as a whole",
                "save the images as .npy, or pack them with diffuse data pack",
            )
        self.in_memory = self.contents.compressed or in_memory
        self.shape = self.contents.shape
        self.class_names = self.contents.class_names
        self.has_masks = self.contents.has_masks
        marks = self.contents.val
        self.groups: Groups | None = None
        if val_fraction is None and marks is not None:
            if group is not None:
                problem = f"conflicts with the validation images that {self.path.name} marks"
                remedy = "leave it out, or set dataset.val_fraction to split anew"
                raise UsageError(GROUP_KEY, group, problem, remedy)
            self.val_fraction, self.is_val = float(marks.mean()), marks
        else:
            self.val_fraction = VAL_FRACTION if val_fraction is None else val_fraction
            self.is_val = shuffled_mask(self.contents.number, self.val_fraction)
            if group is not None:
                self.groups = Groups.of_column(group, self._columns, self.val_fraction)
                self.is_val, self.num_groups = self.groups.is_val(), self.groups.counts()
        self.captions = self.contents.captions
        self._texts = CaptionTable(partial(read_packed_captions, self.path, self.contents.number))
        self.chosen: Attributes | None = None
        if label is not None:
            kinds = kinds_of(label)
            columns, train = self._columns(kinds), split_rows(self.is_val, self.val_fraction, "train")
            self.chosen = attributes(columns, kinds, train, "image {}".format)
            self.class_names, self.attributes = self.chosen.class_names, self.chosen.descriptions
            self.missing_classes = self.chosen.missing_classes

    def _columns(self, kinds: Mapping[str, Any]) -> dict[str, Column]:
        """Return the chosen columns; UsageError if one is missing or has another shape."""
        contents, own = self.contents, {*IMAGE_KEYS, *LABEL_KEYS, CLASS_NAMES, MARKS, FORM, MASKS}
        packed = {attribute.name: attribute for attribute in contents.attributes}
        there: dict[str, Column] = {}
        if contents.labels is not None:
            there[LABEL] = Column(contents.labels.tolist(), contents.class_names)
        if contents.key is not None:
            with Archive(self.path) as archive:
                names = [name.removesuffix(".npy") for name in archive.entries if name.endswith(".npy")]
            there |= {name: Column([]) for name in names if name not in own and not name.startswith(VALUES)}
        there |= {name: Column([]) for name in packed}
        columns = chosen_columns(there, kinds, self.path.name)
        try:
            for name, column in columns.items():
                if name in packed:
                    values = loaded_array(self.path, array_name(name))
                    columns[name] = packed_column(packed[name], values, contents.number)
                elif not column.names:
                    columns[name] = Column(read_values(self.path, name, contents.number))
            return columns
        except Exception as error:  # as in the constructor
            raise UsageError("dataset.path", self.path, reason(error)) from error

    def load(self, split: Split) -> Images:
        images = self._rows(split)
        in_memory = self.in_memory
        if in_memory is None:
            in_memory = fits_in_memory(
                len(images) * int(np.prod(self.shape)) * (1 if isinstance(self.form, Uint8Image) else 4)
            )
        if not in_memory:
            return images
        pixels = images[torch.arange(len(images))]
        loaded = MemoryImages(pixels, images.labels, images.fingerprint())
        loaded.captions = images.captions
        return loaded.with_conditions(images.conditions)

    def remarks(self) -> list[str]:
        remark = self.form.remark([*first_images(self.path, self.contents)])
        lines = [*shape_remarks(f"dataset.path={self.path}", self.contents), *([remark] if remark else [])]
        lines += [] if self.chosen is None else self.chosen.remarks
        lines += [] if self.groups is None else self.groups.remarks()
        no_val = self.val_fraction > 0 and not self.is_val.any()
        return [*lines, too_few(self.contents.number, self.val_fraction)] if no_val else lines

    def stream(self, split: Split) -> Images:
        # Each worker process would decompress the whole array.
        return self.load(split) if self.contents.compressed else self._rows(split)

    def _rows(self, split: Split) -> "ArrayImages":
        rows = split_rows(self.is_val, self.val_fraction, split)
        images = ArrayImages(self.path, self.contents, self.form, rows)
        images.captions = self._texts.rows(rows) if self.captions else None
        if self.chosen is None:
            return images
        images.labels = self.chosen.labels_of(rows)
        return images.with_conditions(self.chosen.sources(rows))


class Contents(NamedTuple):
    """Properties and small arrays of a NumPy file of images."""

    key: str | None
    """Name of the image array in a .npz."""
    compressed: bool
    """Whether the images are compressed and thus cannot be memory-mapped."""
    dtype: str
    number: int
    layout: str
    """Order of the image axes: NHW, NHWC or NCHW."""
    shape: Shape
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    val: np.ndarray | None
    form: SampleFormat | None
    """Format stored in the file."""
    attributes: tuple[AttributeDescription, ...] = ()
    """Attributes of a packed file."""
    captions: bool = False
    """Whether a packed file has captions."""
    has_masks: bool = False
    """Whether the last channel is a segmentation mask."""


def form_of_array(contents: Contents, given: Range | list[Range] | None) -> SampleFormat:
    """Return the format of the images: by `given`, or as stored in the file; UsageError if it is invalid."""
    if given is None and contents.form is not None:
        return contents.form
    return image_form(contents.dtype, contents.shape[0], given)


def first_images(path: Path, contents: Contents) -> np.ndarray:
    """Return a few images in the numbers of the file, [B, C, H, W]: evenly spaced, or the first of a compressed one."""
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
    """Return one remark on how the array is read if its axes may be in another order, as in a file of MATLAB."""
    count, (channels, height, width) = contents.number, contents.shape
    before = count if contents.layout == "NHW" else channels
    likely = before != height or before == width or (contents.layout != "NHW" and channels <= 4)
    if likely and min(height, width) > 4 and max(height, width) < 8 * min(height, width):
        return []
    kind = {1: "gray images", 3: "colour images"}.get(channels, f"images of {channels} channels")
    axes = {"NHW": (count, height, width), "NCHW": (count, channels, height, width)}
    shown = ",".join(map(str, axes.get(contents.layout, (count, height, width, channels))))
    return [
        f"{key}: the array [{shown}] is read as {count} {kind} of height {height} and width {width}; if this is wrong, "
        "save [N,H,W] or [N,H,W,C], and one image as [1,H,W,C]"
    ]


class ArrayImages(Images):
    """Rows of a NumPy file; an uncompressed array stays on disk, and each process memory-maps it."""

    def __init__(self, path: Path, contents: Contents, form: SampleFormat, rows: Tensor) -> None:
        self.path, self.key, self.layout, self.form = path, contents.key, contents.layout, form
        self.shape = contents.shape
        self.rows = rows
        self.labels = None if contents.labels is None else contents.labels[rows]
        self._array: np.ndarray | None = None
        mapped = self.key is not None and not contents.compressed
        self._check = member_check(path, f"{self.key}.npy") if mapped else None

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a mapped array would copy all its pixels; only the parent process checks the file.
        return {**self.__dict__, "_array": None, "_check": None}

    def __len__(self) -> int:
        return len(self.rows)

    def numbers(self, index: Tensor) -> np.ndarray:
        """Return rows in the numbers of the file, [B, C, H, W]."""
        if self._array is None:
            self._array = opened_array(self.path, self.key)
        if self._check is not None:
            self._check.require()
        # Copying whole images before permuting the axes is four times faster than both at once.
        return _channels_first(np.ascontiguousarray(self._array[self.rows[index].numpy()]), self.layout)

    def original(self, row: int) -> Original | None:
        if not isinstance(self.form, RangedImage):
            return None
        return Original(self.form.to_values(self.numbers(torch.tensor([row]))[0]).astype(np.float64), {})

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
                self.path, NO_VALUE, f"one of the images {self.rows[index].tolist()[:9]} {error}"
            ) from error


class ArrayHeader(NamedTuple):
    """Header of an array in a NumPy file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    start: int
    """Number of bytes before the array."""

    @property
    def order(self) -> Literal["C", "F"]:
        """Memory order, as NumPy names it."""
        return "F" if self.fortran_order else "C"

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def opened_array(path: Path, key: str | None) -> np.ndarray:
    """Return the array of a .npy, or array `key` of a .npz, memory-mapped unless it is compressed.

    Raises:
        FormatError: the file is shorter than its header declares; nothing is allocated then.
    """
    if key is None:
        header = read_header(path, None)
        return np.memmap(path, header.dtype, "r", header.start, header.shape, header.order)
    with Archive(path) as archive:
        entry = archive.entries[f"{key}.npy"]
        header = _header(archive, f"{key}.npy")
        if entry.compress_type == ZIP_STORED:
            with path.open("rb") as file:  # a local header precedes the member in the archive
                file.seek(entry.header_offset + 26)
                name, extra = np.frombuffer(file.read(4), "<u2")
            start = entry.header_offset + 30 + int(name) + int(extra) + header.start
            return np.memmap(path, header.dtype, "r", start, header.shape, header.order)
    return loaded_array(path, key)


def loaded_array(path: Path, key: str) -> np.ndarray:
    """Return array `key` of a .npz, with its checksum verified; FormatError if damaged or too large for memory."""
    with Archive(path) as archive:
        header = _header(archive, f"{key}.npy")
        if header.nbytes > free_memory() // 2:
            raise FormatError(f"needs {header.nbytes} bytes of memory for '{key}'; save it as .npy")
        data = archive.read(f"{key}.npy", archive.entries[f"{key}.npy"].file_size)
    numbers = np.frombuffer(data, header.dtype, math.prod(header.shape), header.start)
    return numbers.reshape(header.shape, order=header.order)


def array_of(data: bytes) -> np.ndarray:
    """Return the array in the bytes of a .npy; FormatError, or an error of NumPy's parser, if malformed."""
    header = _parsed(BytesIO(data), len(data))
    numbers = np.frombuffer(data, header.dtype, math.prod(header.shape), header.start)
    return numbers.reshape(header.shape, order=header.order)


def read_arrays(path: Path, *keys: str) -> list[np.ndarray]:
    """Return arrays of a .npz, with checksums verified; FormatError, or an error of a parser, if missing or damaged."""
    with Archive(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.entries]
        missing = [key for key in keys if key not in held]
        if missing:
            raise FormatError(f"has the arrays {', '.join(held[:10])}, but not {' and '.join(missing)}")
        headers = [_header(archive, f"{key}.npy") for key in keys]
        contents = [archive.read(f"{key}.npy") for key in keys]
    return [
        np.frombuffer(content, header.dtype, math.prod(header.shape), header.start)
        .reshape(header.shape, order=header.order)
        .copy()
        for header, content in zip(headers, contents, strict=True)
    ]


def read_header(path: Path, key: str | None) -> ArrayHeader:
    """Return the header of a .npy, or of array `key` of a .npz; FormatError if the file is too short for it."""
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
        raise FormatError(f"has dtype {dtype}; images and labels must be numbers")
    if min(shape, default=0) < 0:
        raise FormatError(f"has shape {shape}; lengths cannot be negative")
    header = ArrayHeader(shape, dtype, fortran_order, file.tell())
    if header.start + header.nbytes > size:
        raise FormatError(f"has {size} bytes, too few for an array {shape} of {dtype}")
    return header


def read_contents(path: Path) -> Contents:
    """Return the contents of a .npy or .npz file of images; FormatError, or an error of a parser, if malformed."""
    if path.suffix != ".npz":
        return Contents(
            None, False, *read_layout(path, None), labels=None, class_names=None, val=None, form=None
        )
    with Archive(path) as archive:
        entries = {name.removesuffix(".npy"): entry for name, entry in archive.entries.items()}
        names = read_texts(archive) if CLASS_NAMES in entries else None
        form = _noted(archive) if FORM in entries else None
        attributes = packed_attributes(archive)
    key = next((key for key in IMAGE_KEYS if key in entries), None)
    if key is None:
        held = ", ".join([*entries][:10])
        raise FormatError(f"has the arrays {held}; the images must be named {', '.join(IMAGE_KEYS)}")
    dtype, count, layout, shape = read_layout(path, key)
    marks_key = next((key for key in (MARKS, *SPLITS_OF_FORMAT_5) if key in entries), None)
    labels_key = next((key for key in LABEL_KEYS if key in entries), None)
    labels = None if labels_key is None else read_labels(path, labels_key)
    return Contents(
        key, entries[key].compress_type != ZIP_STORED, dtype, count, layout, shape, labels,
        None if labels is None else class_names(labels, count, names),
        None if marks_key is None else read_marks(path, marks_key, count),
        form if isinstance(form, RangedImage) and form.dtype == dtype else None,
        attributes, CAPTIONS in entries, MASKS in entries and read_flag(path, MASKS),
    )  # fmt: skip


def read_labels(path: Path, key: str) -> Tensor:
    """Return array `key` of a .npz as labels, int64 [N]."""
    dtype = read_header(path, key).dtype
    if dtype.kind not in "iu":
        raise FormatError(f"has '{key}' of dtype {dtype}; labels must be integers")
    return torch.from_numpy(loaded_array(path, key).astype(np.int64))


def read_values(path: Path, key: str, count: int) -> list[Any]:
    """Return array `key` of a .npz with an attribute of each image: texts, numbers or booleans."""
    name = f"{key}.npy"
    with Archive(path) as archive:
        with archive.open(name) as file:
            header = _parsed(file, archive.entries[name].file_size, None)
        if header.dtype.kind not in "biufU" or header.shape != (count,):
            problem = f"has '{key}' of dtype {header.dtype} and shape {header.shape}"
            raise FormatError(f"{problem}; attributes are texts or numbers of shape ({count},)")
        data = archive.read(name)
    return np.frombuffer(data, header.dtype, count, header.start).tolist()


def read_marks(path: Path, key: str, count: int) -> np.ndarray | None:
    """Return which images are for validation, bool [count], or None if array `key` is not boolean."""
    header = read_header(path, key)
    if header.dtype != np.bool_:
        return None
    if header.shape != (count,):
        raise FormatError(f"has '{key}' of shape {header.shape}; expected ({count},)")
    return np.array(loaded_array(path, key))


def read_flag(path: Path, key: str) -> bool:
    """Return whether array `key` is one bool, and true."""
    header = read_header(path, key)
    return header.dtype == np.bool_ and header.shape == () and bool(loaded_array(path, key))


def read_texts(archive: Archive) -> list[str] | None:
    """Return the class names, or None if the array of this name is something else."""
    name = f"{CLASS_NAMES}.npy"
    with archive.open(name) as file:
        header = _parsed(file, archive.entries[name].file_size, None)
    if header.dtype.kind != "U" or len(header.shape) != 1 or header.shape[0] > MOST_CLASSES:
        return None
    return np.frombuffer(archive.read(name), header.dtype, math.prod(header.shape), header.start).tolist()


def _noted(archive: Archive) -> SampleFormat | None:
    """Return the format stored by `diffuse data pack`, or None if the array of this name is something else."""
    name = f"{FORM}.npy"
    with archive.open(name) as file:
        header = _parsed(file, archive.entries[name].file_size, None)
    if header.dtype.kind != "U" or header.shape != ():
        return None
    stored = from_json(str(np.frombuffer(archive.read(name), header.dtype, 1, header.start)[0]).encode())
    return form_of(stored) if isinstance(stored, dict) else None


def read_layout(path: Path, key: str | None) -> tuple[str, int, str, Shape]:
    """Return dtype, number, axis order and shape [C, H, W] of the images, from the header of their array."""
    shape, dtype, *_ = read_header(path, key)
    if 0 in shape:
        raise FormatError("has no images")
    if len(shape) == 3:
        count, height, width = shape
        return dtype.name, count, "NHW", (1, height, width)
    order = channel_order(shape[1:])
    if order is None:
        raise FormatError(
            f"has shape {shape}; images must be [N,H,W], [N,H,W,C] or [N,C,H,W], with C 1, 3, or less than H and W"
        )
    count, channels, height, width = shape if order == "NCHW" else (shape[0], shape[3], *shape[1:3])
    return dtype.name, count, order, (channels, height, width)


def channel_order(sizes: Shape) -> Literal["NHWC", "NCHW"] | None:
    """Return the position of the channel axis in an image shape of three lengths, or None if it is ambiguous."""
    if len(sizes) != 3:
        return None
    first, _, last = sizes
    if 1 in (first, last) or 3 in (first, last):
        return "NHWC" if last in (1, 3) else "NCHW"
    if first == last:
        return None
    return "NHWC" if last < first else "NCHW"


def class_names(labels: Tensor, count: int, names: list[str] | None) -> tuple[str, ...]:
    """Return the class names; "0".."K - 1" if none are given."""
    if labels.shape != (count,) or labels.min() < 0:
        raise FormatError(
            f"has labels of shape {tuple(labels.shape)} and minimum {labels.min()}; must be {count} labels from 0"
        )
    if labels.max() >= MOST_CLASSES:
        raise FormatError(
            f"has labels up to {labels.max()}; the largest supported label is {MOST_CLASSES - 1}"
        )
    if names is None:
        return tuple(str(number) for number in range(int(labels.max()) + 1))
    if not labels.max() < len(set(names)) == len(names):
        raise FormatError(f"has {len(set(names))} distinct class names, but labels up to {labels.max()}")
    return tuple(names)

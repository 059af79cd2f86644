"""Items of datasets of torch: images of Pillow, tensors and arrays, with or without a label."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.data.attributes import Column
from diffusion_cli.data.base import row_chunks, spread
from diffusion_cli.data.decoding import ImageDecoder, center_crop_resize
from diffusion_cli.data.memory import fits_in_memory
from diffusion_cli.errors import FormatError, counted, first_line
from diffusion_cli.formats import HighDepthImage, Range, Uint8Image, image_form

READ_TWICE = 8
"""Number of items that are read twice, to find transforms that draw random numbers."""
AS_IS = ("L", "LA", "RGB", "RGBA", "F")
"""Modes of Pillow with values that need no conversion."""
OPACITY: dict[int, Literal["LA", "RGBA"]] = {2: "LA", 4: "RGBA"}
CHANNELS = (1, 2, 3, 4)
"""Numbers of channels by which a wrong order of axes is noticed."""


class Item(NamedTuple):
    """An image [H, W, C] of uint8, uint16, int16 or float32, and its label."""

    image: np.ndarray
    label: Any
    """Label as the dataset gives it, or None."""


class ItemDecoder(NamedTuple):
    """Crops and resizes images [H, W, C] to stored ones [C, h, w], as the decoders of files do.

    Args:
        form: storage format.
        shape: shape of the result.
        background: colour behind transparent pixels if opacity is no channel.
        exact: whether all images must have this height and width.
    """

    form: HighDepthImage | Uint8Image
    shape: tuple[int, int, int]
    background: Literal["white", "black"]
    exact: bool

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the stored images: uint8 or float32."""
        return np.dtype(np.uint8 if isinstance(self.form, Uint8Image) else np.float32)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the stored image; FormatError if it has another dtype, size or number of channels."""
        image = self.values(image)
        height, width, channels = image.shape
        if self.exact and (height, width) != self.shape[1:]:
            size = " x ".join(map(str, self.shape[1:]))
            raise FormatError(
                f"has {height} x {width} pixels, and the first one {size}; set dataset.resolution"
            )
        if isinstance(self.form, Uint8Image):
            picture = Image.fromarray(image.squeeze(2) if channels == 1 else image)
            return ImageDecoder(self.shape, self.background, reduced=False, srgb=False).picture(picture)
        return center_crop_resize(self.form.samples(image.transpose(2, 0, 1)), self.form, self.shape).numpy()

    def values(self, image: np.ndarray) -> np.ndarray:
        """Return an image in the numbers of the format; FormatError if it has another dtype or number of channels."""
        wanted = "uint8" if isinstance(self.form, Uint8Image) else self.form.dtype
        if wanted == "uint8" and image.dtype == np.float32:
            low, high = image.min(), image.max()
            if not (low >= 0 and high <= 1):
                raise FormatError(
                    f"has values from {low:.4g} to {high:.4g}, beyond 0 to 1; set dataset.range"
                )
            image = np.rint(255 * image).astype(np.uint8)
        convertible = isinstance(self.form, Uint8Image) and image.shape[2] in CHANNELS
        if image.dtype.name != wanted or not (convertible or image.shape[2] == self.shape[0]):
            found = f"{counted(image.shape[2], 'channel')} of {image.dtype}"
            raise FormatError(f"has {found}; expected {self.shape[0]} of {wanted}, as in the first one")
        return image


class Items:
    """The items of one split; can be pickled if the dataset can.

    Args:
        items: dataset with a length and items by number, or decoded images.
        labels: label of each item, or None if they are not known.
        stored: whether the items are decoded images.
    """

    def __init__(self, items: Any, labels: list[Any] | None = None, stored: bool = False) -> None:
        self.items, self.labels, self.stored = items, labels, stored

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Item:
        """Return an item; FormatError if the dataset fails or the item is not an image with at most a label."""
        with_traceback = os.environ.get("DIFFUSE_TRACEBACK")
        try:
            item = self.items[row]
        except Exception as error:  # code of the user
            if with_traceback:
                raise
            raise FormatError(f"{type(error).__name__}: {first_line(error)}") from error
        return as_item(item)

    def image(self, row: int, decoder: ItemDecoder) -> np.ndarray:
        """Return an image [C, H, W] as stored; FormatError as for an item, or if it has another type."""
        return self.items[row] if self.stored else decoder(self[row].image)

    def all_labels(self) -> list[Any]:
        """Return the labels of all items: `.targets` if it agrees with a few items, else those of all items read."""
        if self.labels is None:
            known = targets(self.items)
            few = spread(len(self), min(len(self), READ_TWICE)).tolist()
            if known is None or any(plain_label(known[row]) != plain_label(self[row].label) for row in few):
                chunks = row_chunks(len(self), "reading labels")
                known = [self._label(row) for rows in chunks for row in rows.tolist()]
            self.labels = [plain_label(label) for label in known]
        return self.labels

    def _label(self, row: int) -> Any:
        try:
            return self[row].label
        except FormatError as error:
            raise FormatError(f"item {row} ({error})") from error


def read_through(items: Any, decoder: ItemDecoder) -> Items:
    """Return the items of an iterable dataset, decoded in memory.

    Raises:
        FormatError: an item is not an image of the type of the first one, or the items do not fit in memory.
    """
    images: list[np.ndarray] = []
    labels: list[Any] = []
    for item in map(as_item, items):
        images.append(decoder(item.image))
        labels.append(plain_label(item.label))
        count = len(images)
        if count & (count - 1) == 0 and not fits_in_memory(images[0].nbytes * count):  # at powers of two
            raise FormatError(f"more than {count} images do not fit in memory; return a map-style dataset")
    return Items(images, labels, stored=True)


def few_items(items: Any) -> Iterator[Item]:
    """Yield a few items: evenly spaced ones, or the first of an iterable dataset."""
    if is_iterable(items):
        yield from map(as_item, islice(iter(items), READ_TWICE))
    else:
        wrapped = Items(items)
        yield from (wrapped[row] for row in spread(len(items), min(len(items), READ_TWICE)).tolist())


def is_iterable(items: Any) -> bool:
    """Return whether a dataset can only be iterated over, although an IterableDataset inherits `__getitem__`."""
    return isinstance(items, IterableDataset) or not (
        hasattr(items, "__getitem__") and hasattr(items, "__len__")
    )


def as_item(item: Any) -> Item:
    """Return an item of a dataset as an array and a label; FormatError if it is something else."""
    if isinstance(item, dict):
        raise FormatError(f"is a mapping of {', '.join(map(str, item))}; return (image, label)")
    if not isinstance(item, tuple | list):
        return Item(as_array(item), None)
    if len(item) not in (1, 2):
        raise FormatError(f"has {len(item)} parts; return (image, label)")
    return Item(as_array(item[0]), item[1] if len(item) == 2 else None)


def as_array(image: Any) -> np.ndarray:
    """Return an image as an array [H, W, C] of uint8, uint16, int16 or float32; FormatError if it is none."""
    if isinstance(image, Image.Image):
        return _of_pillow(image)
    if not isinstance(image, Tensor | np.ndarray):
        raise FormatError(
            f"is of type {type(image).__name__}; return an image of Pillow, a tensor or an array"
        )
    is_tensor = isinstance(image, Tensor)
    shape = tuple(image.shape)
    first, last = (shape[0], shape[-1]) if len(shape) == 3 else (0, 0)
    channels, other = (first, last) if is_tensor else (last, first)
    if len(shape) not in (2, 3) or 0 in shape or (channels not in CHANNELS and other in CHANNELS):
        order = "a tensor must be [C,H,W]" if is_tensor else "an array must be [H,W,C]"
        raise FormatError(f"has shape {[*shape]}; {order}".replace(", ", ","))
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    if image.dtype == np.bool_:
        image = image.astype(np.uint8) * np.uint8(255)
    elif image.dtype.kind == "f":
        image = image.astype(np.float32)
    elif image.dtype.name not in ("uint8", "uint16", "int16"):
        raise FormatError(f"has dtype {image.dtype}; return uint8, uint16, int16 or floats")
    return np.atleast_3d(image)


def _of_pillow(image: Image.Image) -> np.ndarray:
    """Return the values of an image of Pillow; palettes and colour spaces become RGB, with opacity RGBA."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise FormatError("has 32-bit pixels; convert it to 8 or 16 bits")
        return values.astype(np.uint16)[..., None]
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode not in AS_IS:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return np.atleast_3d(np.asarray(image))


def item_decoder(
    first: np.ndarray,
    size: Sequence[int] | None,
    channels: int | None,
    given: Range | list[Range] | None,
    background: Literal["white", "black"],
) -> ItemDecoder:
    """Return the decoder of images like the array `first`; UsageError or FormatError as `image_form`.

    Args:
        first: image [H, W, C].
        size: height and width of the result; None: those of `first`.
        channels: number of channels; None: that of `first`.
        given: [low, high], the values that become -1 and 1, or one pair per channel; None: [0, 1] for floats, stored
            with 8 bits, or the whole range of an integer dtype.
        background: colour behind transparent pixels if opacity is no channel.
    """
    height, width = size or first.shape[:2]
    count = int(first.shape[2]) if channels is None else channels
    dtype = "uint8" if first.dtype == np.float32 and given is None else first.dtype.name
    form = image_form(dtype, count, given, OPACITY.get(count) if given is None else None)
    assert isinstance(form, HighDepthImage | Uint8Image)
    return ItemDecoder(form, (count, height, width), background, exact=size is None)


def targets(items: Any) -> Any:
    """Return `.targets` of a dataset or of that of a subset; None if it has no label for each item."""
    if isinstance(items, Subset):
        inner = targets(items.dataset)
        return None if inner is None else [inner[row] for row in items.indices]
    found: Any = getattr(items, "targets", ())
    return found if hasattr(found, "__len__") and len(found) == len(items) else None


def classes_of(items: Any) -> tuple[str, ...] | None:
    """Return `.classes` of a dataset or of that of a subset; None if it has no such names."""
    if isinstance(items, Subset):
        return classes_of(items.dataset)
    found = getattr(items, "classes", None)
    is_names = isinstance(found, list | tuple) and all(isinstance(name, str) for name in found)
    return tuple(found) if is_names and found else None


def plain(label: Any) -> int | str | None:
    """Return a label as an integer or a text; None if it is something else."""
    if isinstance(label, Tensor | np.ndarray | np.generic) and math.prod(label.shape) == 1:
        label = label.item()
    return label if isinstance(label, int | str) else None


def plain_label(label: Any) -> Any:
    """Return a label as by `plain`, or a mapping of attributes with plain values."""
    return (
        {str(name): plain_value(value) for name, value in label.items()}
        if isinstance(label, Mapping)
        else plain(label)
    )


def plain_value(value: Any) -> Any:
    """Return the value of an attribute as a text, a number, a boolean or None, if it is one."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
        return value.item()
    return value


def label_columns(labels: Sequence[Any], classes: tuple[str, ...] | None) -> dict[str, Column]:
    """Return the columns of the labels of items; one named `label` if they are no mappings.

    Args:
        labels: labels as by `plain_label`.
        classes: names of the classes of integers; None: unknown.
    """
    if any(isinstance(label, Mapping) for label in labels):
        found = [label if isinstance(label, Mapping) else {} for label in labels]
        names = dict.fromkeys(name for label in found for name in label)
        return {name: Column([label.get(name) for label in found]) for name in names}
    whole = all(isinstance(label, int) for label in labels)
    return {LABEL: Column(labels, classes if whole else None)}

"""Images of any dataset of torch that a function of the user returns."""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from diffusion_cli.config import plugins
from diffusion_cli.data.attributes import (
    Attributes,
    Chosen,
    Column,
    Kind,
    attributes,
    chosen_columns,
    joined,
    kinds_of,
)
from diffusion_cli.data.base import Dataset, Images, Split, row_chunks, shuffled_mask, split_rows, too_few
from diffusion_cli.data.encoded import unusable
from diffusion_cli.data.items import (
    ItemDecoder,
    Items,
    classes_of,
    few_items,
    is_iterable,
    item_decoder,
    label_columns,
    plain,
    read_through,
)
from diffusion_cli.data.memory import MemoryImages, fits_in_memory
from diffusion_cli.data.tables import numbered
from diffusion_cli.errors import FormatError, UsageError, first_line
from diffusion_cli.formats import HighDepthImage, Original, Range

KEY = "dataset.factory"
Argument = bool | int | float | str | list[bool | int | float | str] | None
"""An argument of the function."""


class TorchDataset(Dataset):
    """Images of a `torch.utils.data.Dataset` that a function of an allowed plugin returns.

    An item is an image, or an image and its class: an integer, or a name in `.classes` of the dataset. The second part
    may be a mapping of attributes, from which `label` chooses. An image is one of Pillow, a tensor [C, H, W] or [H, W],
    or an array [H, W, C] or [H, W]:

    - uint8, with opacity as second or fourth channel;
    - floats in [0, 1], as `ToTensor` gives them, which become 8-bit; or floats and a `range`, which stay floats;
    - uint16 or int16.

    Items must not be random: they are stored once, or identified by a few of them. Items of an `IterableDataset` are
    counted and kept in memory. The classes are those of `.targets` if the dataset has it; otherwise all items are read.

    Args:
        data_dir: unused.
        factory: function or class, as module:name, that returns the dataset. If it has a parameter `split`, it is
            called with "train" and "val"; if it has `train`, with True and False; otherwise `val_fraction` applies.
        arguments: further arguments of the function.
        resolution: size N for NxN images, or [H, W], by centre crop and resize; None: that of the items.
        channels: number of channels; None: that of the items.
        range: [low, high], the values that become -1 and 1, or one pair per channel; None: [0, 1] for floats, or that
            of the integer dtype.
        background: colour behind transparent pixels if opacity is no channel.
        label: attributes that a model is conditioned on (`label`: the class): names, or types by name; None: the class.
        flip: whether training may flip images horizontally.
        val_fraction: fraction of the images for validation, in [0, 1), always the same rows.
        in_memory: whether to read all items once and keep them in memory; None: if they fit.
        num_workers: worker processes that read items.

    Raises:
        UsageError: the function is missing, not allowed or fails; the items differ in type or between two reads.
    """

    def __init__(
        self,
        data_dir: str,
        *,
        factory: str,
        arguments: dict[str, Argument] | None = None,
        resolution: PositiveInt
        | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
        | None = None,
        channels: PositiveInt | None = None,
        range: Range | list[Range] | None = None,
        background: Literal["white", "black"] = "white",
        label: Chosen = None,
        flip: bool = False,
        val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        in_memory: bool | None = None,
        num_workers: NonNegativeInt = 4,
    ) -> None:
        super().__init__(data_dir)
        self.factory, self.flip = factory, flip
        self.val_fraction, self.in_memory, self.num_workers = val_fraction, in_memory, num_workers
        self.name = factory.partition(":")[2]
        sets = self._sets(plugins.function(factory, KEY), arguments or {})
        size = [resolution, resolution] if isinstance(resolution, int) else resolution
        try:
            first = next(few_items(sets["train"]), None)
            if first is None:
                problem = "returns a dataset without items"
                raise UsageError(KEY, factory, problem, "return at least one image")
            self.decoder = item_decoder(first.image, size, channels, range, background)
        except FormatError as error:
            raise UsageError(KEY, factory, f"item 0 {error}") from error
        self.form, self.shape = self.decoder.form, self.decoder.shape
        parts: dict[Split, Items] = {split: self._items(items) for split, items in sets.items()}
        if any(part.stored for part in parts.values()):
            self.num_workers = 0
        self.chosen: Attributes | None = None
        self._parts: dict[Split, tuple[Items, Tensor | None, Tensor]] = {}
        names = classes_of(sets["train"])
        for split, part in parts.items():
            if label is not None or plain(first.label) is None:
                labels = None
                self.missing_classes = "its items have no integer or name as label"
            else:
                names, labels = self._numbered(part, names)
            self._parts[split] = part, labels, torch.arange(len(part))
        self.class_names = names if self._parts["train"][1] is not None else None
        if "val" not in parts:
            part, labels, _ = self._parts["train"]
            is_val = shuffled_mask(len(part), val_fraction)
            self._parts["train"] = part, labels, split_rows(is_val, val_fraction, "train")
            self._parts["val"] = part, labels, split_rows(is_val, val_fraction, "val")
        if label is not None:
            self._choose(parts, names, kinds_of(label))

    def _choose(
        self, parts: Mapping[Split, Items], names: tuple[str, ...] | None, kinds: dict[str, Kind | None]
    ) -> None:
        """Set the attributes and the classes by the labels of the items of all splits."""
        columns: list[dict[str, Column]] = []
        for part in parts.values():
            try:
                there = label_columns(part.all_labels(), names)
            except FormatError as error:
                raise UsageError(KEY, self.factory, f"cannot read {error}") from error
            columns.append(chosen_columns(there, kinds, f"the labels of {self.factory}"))
        _, _, train = self._parts["train"]
        self.chosen = attributes(joined(columns), kinds, train, "item {}".format)
        self.class_names, self.attributes = self.chosen.class_names, self.chosen.descriptions
        self.missing_classes = self.chosen.missing_classes

    def load(self, split: Split) -> Images:
        images, in_memory = self.stream(split), self.in_memory
        if images.items.stored:  # in memory already
            return images
        if in_memory is None:
            in_memory = fits_in_memory(len(images) * int(np.prod(self.shape)) * self.decoder.dtype.itemsize)
        return images.in_memory() if in_memory else images

    def stream(self, split: Split) -> "ItemImages":
        items, labels, rows = self._parts[split]
        images = ItemImages(items, labels, rows, self.decoder, self.factory)
        if self.chosen is None:
            return images
        train, _, _ = self._parts["train"]
        of_all = rows if items is train else rows + len(train)
        images.labels = self.chosen.labels_of(of_all)
        return images.with_conditions(self.chosen.sources(of_all))

    def remarks(self) -> list[str]:
        count = len(self._parts["train"][0])
        no_val = self._parts["train"][0] is self._parts["val"][0] and not len(self._parts["val"][2])
        lines = [] if self.chosen is None else [*self.chosen.remarks]
        return [*lines, too_few(count, self.val_fraction)] if no_val and self.val_fraction > 0 else lines

    def _sets(self, function: Callable[..., Any], arguments: dict[str, Any]) -> dict[Split, Any]:
        """Call the function, for each split if it has a parameter for it."""
        try:
            known = inspect.signature(function).parameters.keys() - arguments.keys()
        except ValueError:  # of a class written in C
            known = set()
        each: dict[Split, dict[str, Any]] = {"train": {}}
        if "split" in known:
            each = {"train": {"split": "train"}, "val": {"split": "val"}}
        elif "train" in known:
            each = {"train": {"train": True}, "val": {"train": False}}
        try:
            sets: dict[Split, Any] = {split: function(**arguments, **given) for split, given in each.items()}
        except Exception as error:  # code of the user
            if os.environ.get("DIFFUSE_TRACEBACK"):
                raise
            problem = f"failed ({type(error).__name__}: {first_line(error)})"
            remedy = "correct it or dataset.arguments; DIFFUSE_TRACEBACK=1 shows the place"
            raise UsageError(KEY, self.factory, problem, remedy) from error
        for items in sets.values():
            if is_iterable(items) and not hasattr(items, "__iter__"):
                problem = f"returns {type(items).__name__}, which is no dataset of torch"
                raise UsageError(KEY, self.factory, problem, "return a torch.utils.data.Dataset")
            if is_iterable(items) and isinstance(items, Iterator):
                problem = "returns an iterator, which can be read only once"
                raise UsageError(KEY, self.factory, problem, "return an IterableDataset")
        return sets

    def _items(self, items: Any) -> Items:
        """Return the items of a split; UsageError if they are not images or differ between two reads."""
        try:
            for one, other in zip(few_items(items), few_items(items), strict=False):
                if one.image.shape != other.image.shape or one.image.tobytes() != other.image.tobytes():
                    problem = "an item differs when it is read again; images must not be random"
                    raise UsageError(
                        KEY, self.factory, problem, "leave out random transforms; see dataset.flip"
                    )
            return read_through(items, self.decoder) if is_iterable(items) else Items(items)
        except FormatError as error:
            raise UsageError(KEY, self.factory, f"an item {error}") from error

    def _numbered(self, items: Items, names: tuple[str, ...] | None) -> tuple[tuple[str, ...], Tensor | None]:
        """Return the class names and the labels of a split; UsageError if some items have no class."""
        try:
            values = items.all_labels()
        except FormatError as error:
            raise UsageError(KEY, self.factory, f"cannot read {error}") from error
        try:
            is_text = any(isinstance(value, str) for value in values)
            return numbered(values, None if names is None or is_text else [*names], names)
        except FormatError as error:
            raise UsageError(KEY, self.factory, f"a label {error}") from error


class ItemImages(Images):
    """Rows of the items of a dataset of torch, read on access; can be pickled if the dataset can.

    Args:
        items: the items.
        labels: class of each item, int64, or None.
        rows: numbers of the items, int64 [N].
        decoder: decoder of the items.
        factory: the function that returned the dataset, for errors.
    """

    def __init__(
        self, items: Items, labels: Tensor | None, rows: Tensor, decoder: ItemDecoder, factory: str
    ) -> None:
        self.items, self.rows, self.decoder, self.factory = items, rows, decoder, factory
        self.shape = decoder.shape
        self.labels = None if labels is None else labels[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        pixels = np.zeros((len(index), *self.shape), self.decoder.dtype)
        broken: dict[str, str] = {}
        for slot, row in enumerate(self.rows[index].tolist()):
            try:
                pixels[slot] = self.items.image(row, self.decoder)
            except FormatError as error:
                broken[f"item {row}"] = str(error)
        if broken:
            raise unusable((KEY, self.factory), "items", broken)
        return torch.from_numpy(pixels)

    def original(self, row: int) -> Original | None:
        if self.items.stored or not isinstance(self.decoder.form, HighDepthImage):
            return None
        values = self.decoder.values(self.items[int(self.rows[row])].image)
        return Original(values.transpose(2, 0, 1).astype(np.float64), {})

    def in_memory(self) -> MemoryImages:
        """Read all items, with a progress bar; UsageError names those that cannot be used."""
        pixels = torch.from_numpy(np.empty((len(self), *self.shape), self.decoder.dtype))
        for rows in row_chunks(len(self), f"reading {self.factory}"):
            pixels[rows] = self[rows]
        return MemoryImages(pixels, self.labels).with_conditions(self.conditions)

"""Datasets of the Hugging Face library `datasets`: of the Hub, saved folders, Parquet, WebDataset, image folders."""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from diffusion_cli.conditions import Conditions
from diffusion_cli.data import survey
from diffusion_cli.data.attributes import Attributes, Chosen, Kind, attributes, joined, kinds_of
from diffusion_cli.data.base import Dataset, Images, Split, shuffled_mask, split_rows, spread, too_few
from diffusion_cli.data.captions import CaptionTable
from diffusion_cli.data.decoding import HighDepthDecoder, ImageDecoder, image_decoder
from diffusion_cli.data.encoded import EncodedImages, range_remarks
from diffusion_cli.data.file_names import RULES
from diffusion_cli.data.groups import Groups
from diffusion_cli.data.tables import STREAMS, Source, Table, class_remarks, source_name
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import Range, Uint8Image, has_own_numbers
from diffusion_cli.formats.range_check import LOOKED_AT
from diffusion_cli.system.untrusted import reason

if TYPE_CHECKING:
    import datasets


class HuggingFace(Dataset):
    """Images of a dataset that the library `datasets` reads; no code of a dataset is run.

    Images are the bytes of files, and are decoded, cropped and resized as by `Folder`. Classes are those of the only
    `ClassLabel` column, or of the column `label`: its integers, or its texts in alphabetical order. A list of columns,
    columns with types and a column of other values are attributes instead; see `attributes`.

    Args:
        data_dir: folder of downloaded datasets, for streamed images; other downloads are in the library's own cache.
        path: name on the Hub, folder of `save_to_disk`, folder of files, or a file or pattern such as `shards/*.tar`.
        name: configuration of the dataset.
        revision: branch, tag or commit on the Hub; None: the newest.
        builder: reader of the files; None: by their suffix.
        split: name of the training split, or a slice of it.
        val_split: name of the validation split; None: `val_fraction` of `split`.
        image: column of the images; None: the only one.
        label: columns that a model is conditioned on: the name of a column of classes, names, or types by name; None:
            the only `ClassLabel` column, for the classes.
        caption: column of the captions, with a text or a list of texts; None: `text` or `caption`, if it has texts.
        streaming: whether to download only the first `max_images` images of each split, which are stored.
        max_images: number of images of each split to use, from the first; None: all.
        resolution: size N for NxN images, or [H, W].
        channels: number of channels.
        range: [low, high], the values that become -1 and 1, or one pair per channel; None: that of the dtype.
        depth: `auto`: as in the first image; 8: reduce to 8 bits.
        background: colour behind transparent pixels of 8-bit images.
        flip: whether training may flip images horizontally.
        val_fraction: fraction of the images for validation, in [0, 1), always the same rows; without `val_split`.
        group: column with the group of each image; a hash of its name decides the split. None: each image by itself.
        in_memory: whether to decode all images once and keep them in memory; None: if they fit.
        num_workers: worker processes that decode images.

    Raises:
        UsageError: the dataset, a split or a column does not exist, cannot be read, or is ambiguous.
    """

    def __init__(
        self,
        data_dir: str,
        *,
        path: str,
        name: str | None = None,
        revision: str | None = None,
        builder: Literal["imagefolder", "parquet", "webdataset", "arrow"] | None = None,
        split: str = "train",
        val_split: str | None = None,
        image: str | None = None,
        label: Chosen = None,
        caption: str | None = None,
        streaming: bool = False,
        max_images: PositiveInt | None = None,
        resolution: PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)],
        channels: PositiveInt = 3,
        range: Range | list[Range] | None = None,
        depth: Literal["auto", 8] = "auto",
        background: Literal["white", "black"] = "white",
        flip: bool = True,
        val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        group: str | None = None,
        in_memory: bool | None = None,
        num_workers: NonNegativeInt = 4,
    ) -> None:
        super().__init__(data_dir)
        if streaming and max_images is None:
            problem = "needs the number of images to download"
            raise UsageError("dataset.streaming", True, problem, "set dataset.max_images")
        if group is not None and val_split is not None:
            problem = "applies to dataset.val_fraction, and dataset.val_split chooses the validation images"
            raise UsageError("dataset.group", group, problem, "leave one of them out")
        self.path, self.flip, self.val_fraction = path, flip, val_fraction
        self.name = source_name(path)
        self.in_memory, self.num_workers = in_memory, num_workers
        streams = self.data_dir / STREAMS if streaming else None
        named = label if isinstance(label, str) else None
        source = Source(path, name, revision, builder, image, named, caption, max_images, streams)
        rows = [source.rows("dataset.split", split)]
        rows += [] if val_split is None else [source.rows("dataset.val_split", val_split)]
        as_classes = label is None or (named is not None and source.has_classes(rows[0]))
        train = source.table("dataset.split", split, rows[0], classes=as_classes)
        self._parts: dict[Split, tuple[Table, Tensor]]
        self.groups: Groups | None = None
        if val_split is None:
            is_val = shuffled_mask(len(train.data), val_fraction)
            if group is not None:
                self.groups = Groups.of_column(group, partial(source.columns, rows[0]), val_fraction)
                is_val, self.num_groups = self.groups.is_val(), self.groups.counts()
            self._parts = {
                "train": (train, split_rows(is_val, val_fraction, "train")),
                "val": (train, split_rows(is_val, val_fraction, "val")),
            }
        else:
            val = source.table(
                "dataset.val_split", val_split, rows[1], classes=as_classes, class_names=train.class_names
            )
            self._parts = {
                "train": (train, torch.arange(len(rows[0]))),
                "val": (val, torch.arange(len(rows[1]))),
            }
        self.class_names, self.missing_classes = train.class_names, train.missing_classes
        self.chosen: Attributes | None = None
        self._label_remarks: tuple[str, ...] = ()
        if not as_classes:
            self._choose(source, rows, kinds_of(label))
        elif named is not None and train.class_names:
            self.attributes = Conditions.of_classes(train.class_names).attributes
            self._label_remarks = class_remarks(named, rows[0].features[named], train.class_names)
        self.captions = train.captions is not None
        self.missing_captions = "" if self.captions else "it has no column text or caption with texts"
        self._texts = {
            table.split: CaptionTable(table.captions.read)
            for table, _ in self._parts.values()
            if table.captions is not None
        }
        height, width = resolution if isinstance(resolution, list) else (resolution, resolution)
        try:
            first = train.content(0)
        except (ValueError, OSError):  # reported with the other broken files, where pixels are read
            first = b""
        try:
            self.decoder = image_decoder(first, (channels, height, width), range, depth, background, RULES)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError("dataset.path", path, f"cannot use the first image ({reason(error)})") from error
        self.form = self.decoder.form if isinstance(self.decoder, HighDepthDecoder) else Uint8Image()
        self.shape = self.decoder.shape

    def _choose(self, source: Source, rows: list["datasets.Dataset"], kinds: dict[str, Kind | None]) -> None:
        """Set the attributes and the classes by the rows of all splits."""
        columns = joined([source.columns(data, kinds) for data in rows])
        _, train = self._parts["train"]
        self.chosen = attributes(columns, kinds, train, "image {}".format)
        self.class_names, self.attributes = self.chosen.class_names, self.chosen.descriptions
        self.missing_classes, self._label_remarks = self.chosen.missing_classes, self.chosen.remarks

    def load(self, split: Split) -> Images:
        return self.stream(split).loaded(self.in_memory)

    def stream(self, split: Split) -> "TableImages":
        table, rows = self._parts[split]
        images = TableImages(table, rows, self.decoder, self.path)
        images.captions = self._texts[table.split].rows(rows) if table.split in self._texts else None
        if self.chosen is None:
            return images
        train, _ = self._parts["train"]
        of_all = rows if table is train else rows + len(train.data)
        images.labels = self.chosen.labels_of(of_all)
        return images.with_conditions(self.chosen.sources(of_all))

    def remarks(self) -> list[str]:
        count, (height, width) = len(self._parts["train"][0].data), self.shape[1:]
        own = isinstance(self.decoder, HighDepthDecoder) and has_own_numbers(self.form)
        headers = survey.headers_of(self._few(survey.MOST))
        lines = survey.remarks(f"dataset.path={self.path}", headers, count, (height, width), own_numbers=own)
        if self._parts["train"][0] is self._parts["val"][0] and self.val_fraction > 0:
            lines += [] if len(self._parts["val"][1]) else [too_few(count, self.val_fraction)]
        return [
            *lines,
            *self._label_remarks,
            *(self.groups.remarks() if self.groups else []),
            *range_remarks(self.decoder, (data for _, data in self._few(LOOKED_AT))),
        ]

    def _few(self, number: int) -> Iterator[tuple[str, bytes]]:
        """Yield the readable ones of evenly spaced training images, with their names."""
        table = self._parts["train"][0]
        for row in spread(len(table.data), min(len(table.data), number)).tolist():
            with suppress(ValueError, OSError):  # reported with the other broken files, where pixels are read
                yield f"image {row}", table.content(row)


class TableImages(EncodedImages):
    """Rows of a table of the library, decoded on access; can be pickled."""

    def __init__(
        self, table: Table, rows: Tensor, decoder: ImageDecoder | HighDepthDecoder, path: str
    ) -> None:
        labels = None if table.labels is None else table.labels[rows]
        super().__init__(labels, decoder, ("dataset.path", path))
        self.table, self.rows = table, rows

    def __len__(self) -> int:
        return len(self.rows)

    def contents(self, row: int) -> list[bytes]:
        return [self.table.content(int(self.rows[row]))]

    def title(self, row: int) -> str:
        return f"image {int(self.rows[row])} of {self.table.split}"

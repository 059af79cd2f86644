"""Base classes of datasets: a dataset has a training and a validation split; a split returns images by row."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.conditions import AttributeDescription, Condition
from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.data.captions import CaptionTable
from diffusion_cli.data.sources import ConditionSource
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import Original, SampleFormat, Shape, Uint8Image
from diffusion_cli.system.downloads import PublishedFile
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.seeding import mix

Split = Literal["train", "val"]
FINGERPRINTED = 64
"""Number of images that a fingerprint reads."""


class Images(ABC):
    """Images of one split, indexed by row number, before augmentation and scaling."""

    shape: Shape
    """Shape of every image without the batch dimension, [C, H, W] for images."""
    labels: Tensor | None
    """Class labels in 0..num_classes - 1, int64 [N], or None without classes."""
    conditions: Mapping[str, ConditionSource] = MappingProxyType({})
    """Sources of further conditions, by name.

    One named "label" is a number or yes/no: it is the value of this name in conditions, and no class label.
    """
    captions: CaptionTable | None = None
    """Captions of the images, or None without captions."""
    device: torch.device = torch.device("cpu")
    """Device of `labels` and of the images; row numbers must be on it."""
    _digest: str | None = None  # cached pixel_digest

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images N."""

    @abstractmethod
    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the images [B, *shape] of rows `index` (int64 [B]).

        Pixels are uint8 in 0..255, or float32 in about [-1, 1].

        Raises:
            UsageError: some files cannot be decoded; the message names them.
        """

    def hflip(self, images: Tensor, flip_mask: Tensor) -> Tensor:
        """Return `images` [B, *shape], flipped along the last axis where `flip_mask` (int64 [B]) is 1 rather than 0."""
        # index_select copies whole rows; on uint8 it is four times faster than torch.where.
        rows = torch.arange(len(images), device=images.device) + len(images) * flip_mask
        return torch.cat([images, images.flip(-1)]).index_select(0, rows)

    def with_conditions(self, conditions: Mapping[str, ConditionSource]) -> Self:
        """Set the sources of further conditions, and return these images."""
        self.conditions = dict(conditions)  # a proxy of a mapping cannot be pickled
        return self

    def labels_of(self, rows: Tensor, device: torch.device) -> Tensor | None:
        """Return the class labels of rows (int64 [B]) on a device, -1 for a missing one; None without classes."""
        if self.labels is None:
            return None
        return self.labels[rows.to(self.labels.device, non_blocking=True)].to(device, non_blocking=True)

    def condition(
        self,
        rows: Tensor,
        images: Tensor,
        draw: int | None = None,
        beside: Mapping[str, Tensor] | None = None,
    ) -> Condition | None:
        """Return the condition of rows, on the device of the images; None without labels and other conditions.

        Args:
            rows: row numbers, int64 [B].
            images: the images of these rows, float32 [B, C, *sizes] in [-1, 1], as the network gets them.
            draw: number of the random choices of a training step; None: the same choices at every call.
            beside: what was read and flipped with the images for some conditions; others are read here.
        """
        read = beside or {}
        labels = self.labels_of(rows, images.device)
        values = {} if labels is None else {LABEL: labels}
        for name, source in self.conditions.items():
            if name in read:
                values[name] = source.values_of(read[name], rows, draw)
            else:
                values[name] = source.values(rows, images, draw)
        return Condition(values) if values else None

    def digest(self) -> str:
        """Return the SHA-256 (hex) of pixels and labels, independent of how and where the images are stored."""
        labels = b"" if self.labels is None else b"labels" + self.labels.cpu().numpy().tobytes()
        return sha256(self.pixel_digest().encode() + labels).hexdigest()

    def pixel_digest(self) -> str:
        """Return the SHA-256 (hex) of all images, without labels; see `PixelDigest`."""
        if self._digest is None:
            state = PixelDigest()
            for rows in row_chunks(len(self), "hashing images"):
                state.update(self[rows.to(self.device)])
            self._digest = state.hexdigest()
        return self._digest

    def lossy(self, index: Tensor) -> dict[str, int]:
        """Count the files with lossy compression among rows `index`, by the name of the compression."""
        return {}

    def original(self, row: int) -> Original | None:
        """Return the values of a row's file before clipping and resizing; None for images that are not clipped."""
        return None

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) that identifies the images at the cost of reading only a few of them.

        It covers the number of images and the stored bytes of `FINGERPRINTED` evenly spaced ones; for image files
        also all file names. The images that `Dataset.load` and `Dataset.stream` return have the same fingerprint,
        in memory or not.
        """
        state = PixelDigest()
        state.update(self[self._evenly().to(self.device)])
        return sha256(f"{len(self)} {state.hexdigest()}".encode()).hexdigest()

    def _evenly(self) -> Tensor:
        """Return the rows that a fingerprint reads."""
        return spread(len(self), min(len(self), FINGERPRINTED))

    def sources(self, index: Tensor) -> list[bytes]:
        """Return a SHA-256 of the source of each row in `index`: its pixels, or the bytes of its file, not decoded.

        Raises:
            UsageError: some files cannot be read; the message names them.
        """
        pixels = self[index.to(self.device)].cpu().numpy()
        kind = f"{pixels.shape[1:]} {pixels.dtype.str}".encode()
        return [sha256(kind + image.tobytes()).digest() for image in pixels]


class PixelDigest:
    """Incremental SHA-256 of images [B, C, H, W]: of their shape, dtype and bytes."""

    def __init__(self) -> None:
        self._state = sha256()
        self._kind: str | None = None

    def update(self, images: Tensor) -> None:
        """Add a batch of images; all batches must have one shape and dtype."""
        pixels = images.cpu().numpy()
        if self._kind is None:
            self._kind = f"{pixels.shape[1:]} {pixels.dtype.str}"
            self._state.update(self._kind.encode())
        self._state.update(np.ascontiguousarray(pixels).data)

    def hexdigest(self) -> str:
        """Return the hash of all images added so far."""
        return self._state.hexdigest()


class Dataset(ABC):
    """Base class of datasets, each with a `train` and a `val` split.

    To add a dataset, write one subclass and one YAML file.

    Args:
        data_dir: folder of downloaded datasets; the program passes it to every dataset.
    """

    name: str
    """Name of the dataset in tables and file names."""
    shape: Shape
    """Shape of every image, [C, H, W] for images; available before any pixel is read."""
    form: SampleFormat = Uint8Image()
    """Storage format of the images, and of samples of a model trained on them."""
    class_names: tuple[str, ...] | None
    """Names of the classes in label order, or None without classes."""
    missing_classes: str = ""
    """Reason why the dataset has no classes, for messages."""
    attributes: tuple[AttributeDescription, ...] = ()
    """Attributes that a model is conditioned on in place of the class."""
    captions: bool = False
    """Whether the images may have captions, by the names of the files; the texts are read at their first use."""
    missing_captions: str = "this dataset has no captions"
    """Reason why the dataset has no captions, for messages."""
    has_masks: bool = False
    """Whether the last channel of the images is a segmentation mask."""
    condition_channels: int | None = None
    """Channels of the condition images; None without condition images."""
    flip: bool
    """Whether training may flip images horizontally."""
    flips_captioned: bool = True
    """Whether training may flip images horizontally, if `flip` is true, for a model of captions."""
    rules: int = 1
    """Version of the rules that convert files to images."""
    num_workers: int = 0
    """Suggested number of worker processes that read images from disk."""
    num_groups: Mapping[Split, int] | None = None
    """Number of groups of images in each split, which share no group; None without groups."""

    def __init__(self, data_dir: str) -> None:
        self.data_dir = Path(data_dir).expanduser()

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None without classes."""
        return None if self.class_names is None else len(self.class_names)

    @abstractmethod
    def load(self, split: Split) -> Images:
        """Return one split; the splits are disjoint, and `val` is empty if `val_fraction=0`.

        Raises:
            UsageError: a file is missing or cannot be used; the message names it.
        """

    def downloads(self) -> Sequence[PublishedFile]:
        """Return the published files of the dataset; none by default."""
        return []

    def serve_captions(self) -> None:
        """Flip no images, if those for a model of captions are not flipped."""
        self.flip = self.flip and self.flips_captioned

    def remarks(self) -> list[str]:
        """Return remarks for the user about the files and how they are read, one line each."""
        return []

    def stream(self, split: Split) -> Images:
        """Return one split for a single pass, like `load`, but read in parts where possible, not held in memory."""
        return self.load(split)


class NoDataset(Dataset):
    """Placeholder for the dataset when only generated images are given: their name and shape, no real images.

    Args:
        name: name of the images in tables.
        shape: shape of every image.
        missing: error for a use of its images; None for the usual one.
    """

    class_names = None
    flip = False

    def __init__(self, name: str, shape: Shape, missing: UsageError | None = None) -> None:
        super().__init__("")
        self.name, self.shape, self.missing = name, shape, missing

    def load(self, split: Split) -> Images:
        raise self.missing or UsageError(
            "reference",
            "dataset",
            f"no real images to compare {self.name} with",
            "set dataset=, run= or reference=images reference.path=, or give published statistics with "
            "reference.stats=",
        )


def row_chunks(count: int, title: str) -> Iterator[Tensor]:
    """Yield the rows 0..count - 1 in order, in chunks of 256, with a progress bar on stderr if it takes long."""
    with ProgressBar(total=count, desc=title, unit="image", unit_scale=True, delay=2.0) as progress:
        for rows in torch.arange(count).split(256):
            yield rows
            progress.update(len(rows))


def spread(count: int, wanted: int) -> Tensor:
    """Return `wanted` evenly spaced rows of 0..count - 1, int64 [wanted]."""
    return torch.arange(wanted) * count // max(wanted, 1)


FEW_VAL = 20
"""Number of validation images below which means over them are rough."""


def shuffled_mask(count: int, val_fraction: float) -> np.ndarray:
    """Return which of `count` rows are for validation, bool [count]: a fixed random subset.

    RandomState is used because NumPy guarantees its stream; a stream that changes with a release would
    move validation images into the training split.
    """
    mask = np.zeros(count, dtype=bool)
    mask[np.random.RandomState(0).permutation(count)[: num_val(count, val_fraction)]] = True
    return mask


def num_val(count: int, val_fraction: float) -> int:
    """Return the number of validation images for a fraction of `count`, leaving at least one for training."""
    return min(round(val_fraction * count), count - 1)


def named_mask(names: Sequence[str], val_fraction: float) -> np.ndarray:
    """Return which names are for validation, bool [N]: each name is chosen by its hash, so splits never change.

    For few names the hash may choose none or all. Then the name nearest to the threshold changes sides, so that at
    least one image is for training, and at least one for validation if the fraction amounts to one image.
    """
    # "held_out" is the former name of the split; another text here would move images between the splits.
    hashes = np.array([mix("held_out", name) for name in names], dtype=np.int64)
    mask = np.array([value < val_fraction * 2**63 for value in hashes.tolist()], dtype=bool)
    if len(names) and mask.all():
        mask[hashes == hashes.max()] = False
    elif not mask.any() and num_val(len(names), val_fraction) > 0:
        mask[hashes == hashes.min()] = True
    return mask


def named_remarks(names: Sequence[str], val_fraction: float) -> list[str]:
    """Return a remark if `named_mask` chooses no name although the fraction is positive."""
    if val_fraction == 0 or num_val(len(names), val_fraction) > 0 or named_mask(names, val_fraction).any():
        return []
    return [too_few(len(names), val_fraction)]


def too_few(count: int, val_fraction: float) -> str:
    """Return a remark about a validation fraction that amounts to no image."""
    return (
        f"dataset.val_fraction={val_fraction}: {count} images are too few to split; training uses all of them"
    )


def split_rows(is_val: np.ndarray, val_fraction: float, split: Split) -> Tensor:
    """Return the rows of one split in increasing order, int64; UsageError if no training image is left."""
    rows = np.flatnonzero(is_val if split == "val" else ~is_val)
    if len(rows) == 0 and split == "train":
        raise UsageError(
            "dataset.val_fraction",
            val_fraction,
            f"leaves none of the {len(is_val)} images for training",
            "add images, lower the fraction, or set 0 to train on all",
        )
    return torch.from_numpy(rows)

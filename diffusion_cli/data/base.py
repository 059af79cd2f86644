"""What every source of images offers: a dataset has splits, a split gives images by row number."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.errors import UsageError
from diffusion_cli.formats import SampleFormat, Shape, Uint8Image
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.seeding import mix

Split = Literal["train", "val"]
FINGERPRINTED = 64
"""Images that a fingerprint looks at."""


class Images(ABC):
    """The images of one split by row number, before augmentation and scaling."""

    shape: Shape
    """Of every image: channels, height and width."""
    labels: Tensor | None
    """The class of every image, int64 [N] in 0..num_classes - 1, or None without classes."""
    device: torch.device = torch.device("cpu")
    """The device of row numbers, images and `labels`."""
    _digest: str | None = None  # of the pixels alone

    @abstractmethod
    def __len__(self) -> int:
        """The number of images N."""

    @abstractmethod
    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the images of the rows `index` (int64 [B]), [B, *shape]: uint8, or float32 in about [-1, 1].

        Raises UsageError naming the files that cannot be decoded.
        """

    def hflip(self, images: Tensor, flip_mask: Tensor) -> Tensor:
        """Return the images [B, *shape], mirrored along the last axis where `flip_mask` (int64 [B]) is 1, not 0."""
        # Row copies, for they run at memory speed; torch.where is four times slower on bytes.
        rows = torch.arange(len(images), device=images.device) + len(images) * flip_mask
        return torch.cat([images, images.flip(-1)]).index_select(0, rows)

    def digest(self) -> str:
        """The SHA-256, in hex, of pixels and labels: equal for equal content, wherever it is held."""
        labels = b"" if self.labels is None else b"labels" + self.labels.cpu().numpy().tobytes()
        return sha256(self.pixel_digest().encode() + labels).hexdigest()

    def pixel_digest(self) -> str:
        """The SHA-256, in hex, of the images, as `PixelDigest` has it; their labels do not count."""
        if self._digest is None:
            state = PixelDigest()
            for rows in row_chunks(len(self), "hashing images"):
                state.update(self[rows.to(self.device)])
            self._digest = state.hexdigest()
        return self._digest

    def lossy(self, index: Tensor) -> dict[str, int]:
        """Return the number of files with lossy compression among the rows `index`, by the name of that compression."""
        return {}

    def fingerprint(self) -> str:
        """Return a SHA-256, in hex, that other images in the same place hardly share, at the cost of a few images.

        It is that of the number of images, and of the bytes of `FINGERPRINTED` evenly spread ones as their source holds
        them. Images of a file are also known by the names of all files. The images that `Dataset.load` and
        `Dataset.once` return have the same fingerprint, in memory or not.
        """
        state = PixelDigest()
        state.update(self[self._evenly().to(self.device)])
        return sha256(f"{len(self)} {state.hexdigest()}".encode()).hexdigest()

    def _evenly(self) -> Tensor:
        """The rows that a fingerprint is made of."""
        return spread(len(self), min(len(self), FINGERPRINTED))

    def sources(self, index: Tensor) -> list[bytes]:
        """The SHA-256 of what each image of the rows `index` is made of, which of files is had without decoding.

        Raises UsageError naming the files that cannot be read.
        """
        pixels = self[index.to(self.device)].cpu().numpy()
        kind = f"{pixels.shape[1:]} {pixels.dtype.str}".encode()
        return [sha256(kind + image.tobytes()).digest() for image in pixels]


class PixelDigest:
    """The SHA-256 of images [B, C, H, W] taken in batch by batch: of their shape, type and bytes."""

    def __init__(self) -> None:
        self._state = sha256()
        self._kind: str | None = None

    def update(self, images: Tensor) -> None:
        """Take in some more images, all of one shape and type."""
        pixels = images.cpu().numpy()
        if self._kind is None:
            self._kind = f"{pixels.shape[1:]} {pixels.dtype.str}"
            self._state.update(self._kind.encode())
        self._state.update(np.ascontiguousarray(pixels).data)

    def hexdigest(self) -> str:
        """The hash of all images so far."""
        return self._state.hexdigest()


class Dataset(ABC):
    """A named source of images with a `train` and a `val` split; one subclass and one YAML each.

    `data_dir`, which the program supplies to every dataset, is the folder of the published datasets.
    """

    name: str
    """The word for the dataset in tables and file names."""
    shape: Shape
    """Of every image: channels, height and width; known before any pixel is read."""
    form: SampleFormat = Uint8Image()
    """How its images, and those of a model trained on them, are stored and shown."""
    class_names: tuple[str, ...] | None
    """The name of every class, in the order of the labels, or None without classes."""
    missing_classes: str = ""
    """Why there are no classes."""
    flip: bool
    """Whether training may mirror the images left to right."""
    rules: int = 1
    """The version of the rules by which the source becomes images."""
    num_workers: int = 0
    """Processes worth starting to read images that are not held in memory."""

    def __init__(self, data_dir: str) -> None:
        self.data_dir = Path(data_dir).expanduser()

    @property
    def num_classes(self) -> int | None:
        """The number of classes, or None without classes."""
        return None if self.class_names is None else len(self.class_names)

    @abstractmethod
    def load(self, split: Split) -> Images:
        """One split; the two have no row in common. `val` has no images where `val_fraction=0` says so.

        Raises UsageError naming the file that is missing or cannot be used.
        """

    def remarks(self) -> list[str]:
        """Return what a user should see about the files, and about how they are read, one line each."""
        return []

    def stream(self, split: Split) -> Images:
        """As `load`, for a single pass: read in parts where the source can be, never held in memory for it."""
        return self.load(split)


class NoDataset(Dataset):
    """What stands for the dataset where only images are given: their name and shape, and no real images."""

    class_names = None
    flip = False

    def __init__(self, name: str, shape: Shape) -> None:
        super().__init__("")
        self.name, self.shape = name, shape

    def load(self, split: Split) -> Images:
        raise UsageError(
            "reference",
            "dataset",
            f"there are no real images to compare {self.name} with",
            "name them by dataset=, run= or reference=images reference.path=, or give published "
            "statistics as reference.stats=",
        )


def row_chunks(count: int, title: str) -> Iterator[Tensor]:
    """The rows 0..count - 1 in order, some at a time, under a progress bar on stderr once it takes long."""
    with ProgressBar(total=count, desc=title, unit="image", unit_scale=True, delay=2.0) as progress:
        for rows in torch.arange(count).split(256):
            yield rows
            progress.update(len(rows))


def spread(count: int, wanted: int) -> Tensor:
    """`wanted` of the rows 0..count - 1, evenly spread; int64."""
    return torch.arange(wanted) * count // max(wanted, 1)


def shuffled_mask(count: int, val_fraction: float) -> np.ndarray:
    """Which of `count` rows are for validation, bool [count]: a fraction `val_fraction`, always the same one.

    NumPy guarantees the stream of RandomState for ever; a generator whose stream may change with a release
    would one day move validation images into training.
    """
    mask = np.zeros(count, dtype=bool)
    mask[np.random.RandomState(0).permutation(count)[: num_val(count, val_fraction)]] = True
    return mask


def num_val(count: int, val_fraction: float) -> int:
    """The number of images that a fraction of `count` images comes to, which leaves at least one to train on."""
    return min(round(val_fraction * count), count - 1)


def named_mask(names: Sequence[str], val_fraction: float) -> np.ndarray:
    """Which of some names are for validation, bool: a fraction `val_fraction`, each by a hash of its own.

    Of a few names the hash may choose none or all. Then the one nearest to the threshold changes sides, so that one
    image at least is trained on, and one at least is for validation if the fraction comes to one image.
    """
    # "val" is an earlier word for the split; another text here would move images between the splits.
    hashes = np.array([mix("held_out", name) for name in names], dtype=np.int64)
    mask = np.array([value < val_fraction * 2**63 for value in hashes.tolist()], dtype=bool)
    if len(names) and mask.all():
        mask[hashes.argmax()] = False
    elif not mask.any() and num_val(len(names), val_fraction) > 0:
        mask[hashes.argmin()] = True
    return mask


def named_remarks(names: Sequence[str], val_fraction: float) -> list[str]:
    """A line if `named_mask` chooses none of the names, although the fraction is above 0."""
    if val_fraction == 0 or num_val(len(names), val_fraction) > 0 or named_mask(names, val_fraction).any():
        return []
    return [too_few(len(names), val_fraction)]


def too_few(count: int, val_fraction: float) -> str:
    """A line about a fraction that comes to no image."""
    return f"dataset.val_fraction={val_fraction}: {count} images are too few for a validation split; all are trained on"


def split_rows(is_val: np.ndarray, val_fraction: float, split: Split) -> Tensor:
    """The rows of one split, int64 in rising order; UsageError if none is left to train on."""
    rows = np.flatnonzero(is_val if split == "val" else ~is_val)
    if len(rows) == 0 and split == "train":
        raise UsageError(
            "dataset.val_fraction",
            val_fraction,
            f"leaves none of the {len(is_val)} images to train on",
            "add images, change the fraction, or set 0 to train on all",
        )
    return torch.from_numpy(rows)

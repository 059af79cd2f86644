"""Images that are decoded on access from the bytes of image files, wherever these bytes are stored."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from diffusion_cli.data.base import Images, row_chunks
from diffusion_cli.data.decoding import FileDecoder, HighDepthDecoder, NoResize, key_text
from diffusion_cli.data.masks import MaskedDecoder
from diffusion_cli.data.memory import MemoryImages, fits_in_memory
from diffusion_cli.data.signal_decoder import SignalDecoder
from diffusion_cli.data.volume_decoder import VolumeDecoder
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import Original, Uint8Image, ValueFormat
from diffusion_cli.system.machine import usable_cores
from diffusion_cli.system.untrusted import reason

NOUNS = {2: "point clouds", 3: "images", 4: "volumes"}
"""What a dataset consists of, by the dimensions of its samples, unless these are signals."""
NAMED = 3
"""Number of names that a message lists for one reason."""


class EncodedImages(Images):
    """Images that are decoded on access. Subclasses return the bytes of each row's file, and can be pickled.

    Args:
        labels: class of each image, int64 [N], or None.
        decoder: decoder of the files.
        source: configuration key and value of the images, for errors.
    """

    def __init__(
        self, labels: Tensor | None, decoder: FileDecoder | MaskedDecoder, source: tuple[str, Any]
    ) -> None:
        self.shape = decoder.shape
        self.labels = labels
        self.decoder = decoder
        self.source = source

    @abstractmethod
    def contents(self, row: int) -> list[bytes]:
        """Return the bytes of the file of a row, then of its mask or further slices if any.

        Raises UsageError, FormatError or OSError.
        """

    @abstractmethod
    def title(self, row: int) -> str:
        """Return the name of a row in errors."""

    def prepare(self) -> None:
        """Open what the threads of this process share."""

    def __getitem__(self, index: Tensor) -> Tensor:
        pixels, broken = self._decode(index)
        if broken:
            raise self._unusable(broken)
        return pixels

    def original(self, row: int) -> Original | None:
        if isinstance(self.decoder, HighDepthDecoder | VolumeDecoder | MaskedDecoder):
            return self.decoder.original(*self.contents(row))
        return None

    def lossy(self, index: Tensor) -> dict[str, int]:
        if not isinstance(self.decoder, NoResize):  # other decoders change pixels anyway
            return {}
        found = Counter(self.decoder.form.lossy(self.contents(row)[0]) for row in index.tolist())
        return {name: count for name, count in found.items() if name is not None}

    def sources(self, index: Tensor) -> list[bytes]:
        decoder = key_text(self.decoder).encode()
        return [sha256(decoder + content).digest() for content in self.content_digests(index)]

    def fingerprint(self) -> str:
        # Of the bytes: versions of a decoder may give different pixels for the same JPEG.
        return sha256(b"".join([b"%d" % len(self), *self.content_digests(self._evenly())])).hexdigest()

    def content_digests(self, index: Tensor) -> list[bytes]:
        """Return the concatenated SHA-256 digests of the files of each row in `index`."""
        digests: list[bytes] = []
        broken: dict[int, str] = {}
        for row in index.tolist():
            try:
                digests.append(b"".join(sha256(data).digest() for data in self.contents(row)))
            except (ValueError, OSError) as error:
                broken[row] = reason(error)
        if broken:
            raise self._unusable(broken)
        return digests

    def loaded(self, in_memory: bool | None) -> Images:
        """Return the images decoded in memory, or these, to decode on access; None: in memory if they fit."""
        if in_memory is None:
            in_memory = fits_in_memory(len(self) * int(np.prod(self.shape)) * self.decoder.dtype.itemsize)
        return self.in_memory() if in_memory else self

    def in_memory(self) -> MemoryImages:
        """Decode all images, with a progress bar; UsageError names all files that cannot be decoded."""
        pixels = torch.from_numpy(np.empty((len(self), *self.shape), self.decoder.dtype))
        broken: dict[int, str] = {}
        for rows in row_chunks(len(self), f"reading {self._name}"):
            pixels[rows], failures = self._decode(rows)
            broken |= failures
        if broken:
            raise self._unusable(broken)
        images = MemoryImages(pixels, self.labels, self.fingerprint())
        images.captions = self.captions
        return images.with_conditions(self.conditions)

    def unreadable(self) -> dict[int, str]:
        """Decode all images once, with a progress bar; return the reason for each row that cannot be decoded."""
        chunks = row_chunks(len(self), f"checking {self._name}")
        return {row: why for rows in chunks for row, why in self._decode(rows)[1].items()}

    @property
    def _name(self) -> str:
        return str(self.source[1]).rpartition("/")[2]

    def _unusable(self, broken: dict[int, str]) -> UsageError:
        named = {self.title(row): why for row, why in broken.items()}
        noun = "signals" if isinstance(self.decoder, SignalDecoder) else NOUNS[len(self.shape)]
        return unusable(self.source, noun, named)

    def _decode(self, index: Tensor) -> tuple[Tensor, dict[int, str]]:
        """Return the images of the rows, and the reason for each row that cannot be decoded."""
        pixels = np.zeros((len(index), *self.shape), self.decoder.dtype)
        self.prepare()

        def fill(slot: int, row: int) -> str | None:
            try:
                pixels[slot] = self.decoder(*self.contents(row))
            except (ValueError, OSError) as error:
                return reason(error)
            return None

        # Worker processes run in parallel already; elsewhere decode in threads.
        rows = index.tolist()
        threads = 1 if get_worker_info() else min(usable_cores(), len(rows))
        if threads <= 1:
            outcomes = list(map(fill, range(len(rows)), rows))
        else:
            with ThreadPoolExecutor(threads) as pool:
                outcomes = list(pool.map(fill, range(len(rows)), rows))
        broken = {row: outcome for row, outcome in zip(rows, outcomes, strict=True) if outcome is not None}
        return torch.from_numpy(pixels), broken


def unusable(source: tuple[str, Any], noun: str, broken: Mapping[str, str]) -> UsageError:
    """Return the error that lists what cannot be used of a dataset.

    Args:
        source: configuration key and value of the dataset.
        noun: what the dataset consists of, in the plural.
        broken: reason for each unusable element, by name.
    """
    return UsageError(
        *source, f"cannot use {len(broken)} of the {noun}; repair or remove {by_reason(broken)}"
    )


def by_reason(broken: Mapping[str, str], most: int = 10) -> str:
    """Return the names of unusable files with the reasons, as "a.png, b.png (REASON); c.png and 8 more (REASON)".

    Args:
        broken: reason for each file, by name.
        most: number of reasons to list.
    """
    groups: dict[str, list[str]] = {}
    for name, why in broken.items():
        groups.setdefault(why, []).append(name)
    shown = [f"{_named(names)} ({why})" for why, names in [*groups.items()][:most]]
    return "; ".join([*shown, "..."] if len(groups) > most else shown)


def _named(names: list[str]) -> str:
    """Return the first names of a group, and the number of the others."""
    rest = len(names) - NAMED
    return ", ".join(names) if rest <= 0 else f"{', '.join(names[:NAMED])} and {rest} more"


def range_remarks(decoder: FileDecoder | MaskedDecoder, contents: Iterable[bytes]) -> list[str]:
    """Compare the values of a few image files, without masks, with the range of their decoder."""
    if isinstance(decoder, MaskedDecoder):
        decoder = decoder.image
    form = decoder.form if isinstance(decoder, HighDepthDecoder) else Uint8Image()
    if isinstance(decoder, VolumeDecoder):  # large: `Folder` compares the first one
        return []
    images = []
    for data in contents:
        try:
            images.append(form.original(data).values if isinstance(form, ValueFormat) else decoder(data))
        except (ValueError, OSError):  # reported with the other broken files, where pixels are read
            continue
    remark = form.remark(images) if len({len(image) for image in images}) == 1 else None
    return [remark] if remark else []

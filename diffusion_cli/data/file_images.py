"""Images that are files in a folder or ZIP archive."""

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_cli.data.decoding import FileDecoder, key_text
from diffusion_cli.data.encoded import EncodedImages
from diffusion_cli.data.labels import composed
from diffusion_cli.data.masks import MaskedDecoder
from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.system.untrusted import LARGEST, Archive, read

MOST_TOGETHER = 4 * LARGEST
"""Bytes of the files of a volume, at most."""


class FileImages(EncodedImages):
    """Image files in a folder or ZIP archive, decoded on access.

    Can be pickled, and used after a fork: each process opens the archive for itself.

    Args:
        path: the folder or archive.
        names: names of the files below it.
        labels: class of each file, int64 [N], or None.
        decoder: decoder of the files.
        key: configuration key of the path, for errors.
        parts: files of each name that stands for several: an image and its mask, or the slices of a volume.
    """

    def __init__(
        self,
        path: Path,
        names: list[str],
        labels: Tensor | None,
        decoder: FileDecoder | MaskedDecoder,
        key: str = "dataset.path",
        parts: Mapping[str, list[str]] | None = None,
    ) -> None:
        super().__init__(labels, decoder, (key, path))
        self.path = path
        self.names = names
        self.parts = parts or {}
        self._archive: tuple[int, Archive] | None = None  # with the id of the process that opened it

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def __len__(self) -> int:
        return len(self.names)

    def title(self, row: int) -> str:
        name = self.names[row]
        first, *_ = self.parts.get(name, [name])
        return name if first.startswith(name) else f"{name} with {first}"  # a series among others in a folder

    def contents(self, row: int) -> list[bytes]:
        archive, name = self._open(), self.names[row]
        contents: list[bytes] = []
        for part in self.parts.get(name, [name]):
            contents.append(archive.read(part) if archive else read(self.path / part))
            if sum(map(len, contents)) > MOST_TOGETHER:
                raise FormatError(f"has files of more than {MOST_TOGETHER} bytes together")
        return contents

    def prepare(self) -> None:
        self._open()

    def fingerprint(self) -> str:
        parts = [part for name in self.names for part in self.parts.get(name, []) if part != name]
        names = "\n".join(composed(name) for name in [*self.names, *parts])
        return sha256(b"".join([names.encode(), *self.content_digests(self._evenly())])).hexdigest()

    def state(self) -> str:
        """Return a hash that changes with the files, by names, sizes and times, or with the decoder."""
        files = [file for name in self.names for file in self.parts.get(name, [name])]
        entries = [(file, *_status(self.path / file if self.path.is_dir() else self.path)) for file in files]
        return sha256(repr((str(self.path.resolve()), key_text(self.decoder), entries)).encode()).hexdigest()[
            :16
        ]

    def _open(self) -> Archive | None:
        """Return this process's own handle of the archive: a file position is shared across a fork."""
        if self.path.is_dir():
            return None
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = (os.getpid(), Archive(self.path))
            except FormatError as error:  # it was readable when the images were listed
                raise UsageError(
                    *self.source, f"is no longer a readable .zip ({error})", "restore it"
                ) from error
        return self._archive[1]


def _status(path: Path) -> tuple[int, ...]:
    """Return size and time of a file; nothing for a broken link, which is reported where pixels are read."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns

"""Files that this program keeps to save work: checked when they are read, made anew if damaged, and never required.

CRC-32 finds accidents. It does not show who wrote a file.
"""

import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_cli.errors import FormatError
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.untrusted import plain, printable, reason

BLOCK = 2**20
"""Bytes of a block, unless the caller gives another size."""
SUM = np.dtype("<u4")
CHECKSUM = "crc32"


class ChecksumError(ValueError):
    """A file does not have the bytes that were written."""


@contextmanager
def optional() -> Iterator[None]:
    """Report a file that cannot be written in one line and continue: it only saves work."""
    try:
        yield
    except OSError as error:
        print(f"diffuse: {printable(str(error))}; continuing without this file", file=sys.stderr)


def report_damage(path: Path, error: BaseException) -> None:
    """Print one line about a damaged file that is made anew."""
    print(f"diffuse: {printable(f'{path}: is damaged ({reason(error)})')}; making it again", file=sys.stderr)


# --- Large files ---------------------------------------------------------


def checksums_path(path: Path) -> Path:
    """The file with the checksums of the blocks of a file."""
    return path.with_name(f"{path.name}.{CHECKSUM}")


class Blocks:
    """A file in blocks of `size` bytes after the first `start`, each compared with its CRC-32 before its first use.

    A file of an earlier version has no checksums: it gets those of its present bytes. Raises ChecksumError if there are
    checksums of another number of blocks.
    """

    def __init__(self, path: Path, start: int = 0, size: int = BLOCK) -> None:
        self.path, self.size = path, size
        self._bytes = np.memmap(path, np.uint8, "r")[start:]
        count = -(-len(self._bytes) // size)
        self._checked = np.zeros(count, bool)
        if checksums_path(path).is_file():
            self._sums = np.fromfile(checksums_path(path), SUM)
        else:
            self._sums = np.array([self._sum(number) for number in range(count)], SUM)
            self._checked[:] = True
            with suppress(OSError):  # as of a folder that may only be read
                _write_sums(self._sums, path)
        if len(self._sums) != count:
            raise ChecksumError(f"has {count} blocks but {len(self._sums)} checksums")

    def _sum(self, number: int) -> int:
        return zlib.crc32(self._bytes[number * self.size : (number + 1) * self.size].data)

    def check(self, numbers: np.ndarray | None = None) -> None:
        """Compare blocks, or all, with their checksums, each once; ChecksumError if one differs."""
        unchecked = ~self._checked
        wanted = np.flatnonzero(unchecked) if numbers is None else numbers[unchecked[numbers]]
        for number in wanted.tolist():
            if self._sum(number) != self._sums[number]:
                raise ChecksumError(f"block {number} of {len(self._sums)} differs from its checksum")
            self._checked[number] = True

    def checked(self) -> int:
        """The number of blocks at the beginning of the file that were compared and are whole."""
        return int(np.argmin(np.append(self._checked, False)))


def checksum(data: bytes | memoryview) -> bytes:
    """The CRC-32 of a block, as it is appended to the checksums of a file that grows."""
    return SUM.type(zlib.crc32(data)).tobytes()


def continued(path: Path, start: int, size: int) -> int:
    """The number of whole blocks at the beginning of a file that grows and its checksums; both are cut to these."""
    sums = checksums_path(path)
    count = (path.stat().st_size - start) // size
    if sums.is_file():
        count = min(count, sums.stat().st_size // SUM.itemsize)
        os.truncate(sums, count * SUM.itemsize)
    os.truncate(path, start + count * size)
    blocks = Blocks(path, start, size)
    with suppress(ChecksumError):
        blocks.check()
    whole = blocks.checked()
    os.truncate(path, start + whole * size)
    os.truncate(sums, whole * SUM.itemsize)
    return whole


def write_checksums(content: Path, path: Path) -> None:
    """Write the checksums for the file `path`, whose content still lies in the file `content`."""
    with content.open("rb") as file:
        _write_sums(
            np.array([zlib.crc32(block) for block in iter(partial(file.read, BLOCK), b"")], SUM), path
        )


def _write_sums(sums: np.ndarray, path: Path) -> None:
    with atomic_write(checksums_path(path)) as temporary:
        sums.tofile(temporary)


# --- Small files ---------------------------------------------------------


def write_json(path: Path, entry: Mapping[str, Any]) -> None:
    """Write an object with its own checksum, whole or not at all; numbers may be infinite."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({**entry, CHECKSUM: _checksum(entry)}, indent=2), encoding="utf-8")


def parse_json(content: bytes) -> dict[str, Any]:
    """What `write_json` wrote; an earlier version wrote no checksum. FormatError if it is not that."""
    try:
        entry = plain(json.loads(content))
    except RecursionError as error:
        raise FormatError(reason(error)) from error
    if not isinstance(entry, dict):
        raise FormatError("is not an object")
    stored = entry.pop(CHECKSUM, None)
    if stored is not None and stored != _checksum(entry):
        raise ChecksumError("differs from its checksum")
    return entry


def _checksum(entry: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(entry, sort_keys=True).encode())

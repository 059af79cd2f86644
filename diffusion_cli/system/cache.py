"""Cache files: verified when read, recreated if damaged, and never required.

CRC-32 detects accidental damage, not manipulation.
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
"""Default block size in bytes."""
SUM = np.dtype("<u4")
CHECKSUM = "crc32"


class ChecksumError(ValueError):
    """The content of a file differs from its checksum."""


@contextmanager
def optional() -> Iterator[None]:
    """Context that reports an OSError in one line and continues, because cache files are optional."""
    try:
        yield
    except OSError as error:
        print(f"diffuse: {printable(str(error))}; continuing without this file", file=sys.stderr)


def report_damage(path: Path, error: BaseException) -> None:
    """Print one line about a damaged file that is recreated."""
    print(f"diffuse: {printable(f'{path}: is damaged ({reason(error)})')}; recreating it", file=sys.stderr)


# --- Large files ---------------------------------------------------------


def checksums_path(path: Path) -> Path:
    """Return the path of a file's block checksums."""
    return path.with_name(f"{path.name}.{CHECKSUM}")


class Blocks:
    """A file in blocks of `size` bytes after a header of `start` bytes, each with a CRC-32.

    Files of earlier versions have no checksums; they are created from the current content. Raises
    ChecksumError if the number of checksums differs from the number of blocks.
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
            with suppress(OSError):  # such as a read-only folder
                _write_sums(self._sums, path)
        if len(self._sums) != count:
            raise ChecksumError(f"has {count} blocks but {len(self._sums)} checksums")

    def _sum(self, number: int) -> int:
        return zlib.crc32(self._bytes[number * self.size : (number + 1) * self.size].data)

    def check(self, numbers: np.ndarray | None = None) -> None:
        """Verify the given blocks (None: all), each once; ChecksumError if one differs."""
        unchecked = ~self._checked
        wanted = np.flatnonzero(unchecked) if numbers is None else numbers[unchecked[numbers]]
        for number in wanted.tolist():
            if self._sum(number) != self._sums[number]:
                raise ChecksumError(f"block {number} of {len(self._sums)} differs from its checksum")
            self._checked[number] = True

    def checked(self) -> int:
        """Return the number of verified blocks at the start of the file."""
        return int(np.argmin(np.append(self._checked, False)))


def checksum(data: bytes | memoryview) -> bytes:
    """Return the CRC-32 of a block as it is stored in a file of checksums."""
    return SUM.type(zlib.crc32(data)).tobytes()


def continued(path: Path, start: int, size: int) -> int:
    """Truncate a partial file and its checksums to the valid blocks at their start; return their number."""
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
    """Write the checksums for the file `path`; its content is still in the file `content`."""
    with content.open("rb") as file:
        _write_sums(
            np.array([zlib.crc32(block) for block in iter(partial(file.read, BLOCK), b"")], SUM), path
        )


def _write_sums(sums: np.ndarray, path: Path) -> None:
    with atomic_write(checksums_path(path)) as temporary:
        temporary.write_bytes(sums.tobytes())  # tofile hides a full disk


# --- Small files ---------------------------------------------------------


def write_json(path: Path, entry: Mapping[str, Any]) -> None:
    """Write an object with its checksum, atomically; numbers may be infinite."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({**entry, CHECKSUM: _checksum(entry)}, indent=2), encoding="utf-8")


def parse_json(content: bytes) -> dict[str, Any]:
    """Return the object in the content of `write_json`; FormatError for other content.

    Raises ChecksumError if it is damaged. Files of earlier versions have no checksum.
    """
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

"""Images in the tables and tars that the library `datasets` reads, found without importing it or torch."""

import tarfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_cli.system.untrusted import IMAGE_FORMATS

if TYPE_CHECKING:
    import pyarrow

MOST_OPENED = 16
"""Maximum number of files to open, and of images to read."""
MOST_MEMBERS = 1000
"""Maximum number of files of a tar to look at."""
LARGEST = 2**24
"""Bytes to read of an image in a tar, at most; its size is in front."""
BUFFER = 2**20
"""Bytes of a Parquet file to read at a time; without a buffer, pyarrow reads a whole column."""
IMAGES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)


def images_in(files: Sequence[Path], column: str | None) -> tuple[int, list[bytes]]:
    """Return the number of images in files of `READERS`, and the contents of a few.

    Of many files a few are opened, and the number is estimated by size.

    Args:
        files: the files.
        column: column of the images; None: the first one that stores files.
    """
    few = files[:: ceil(len(files) / MOST_OPENED)]
    number, contents = 0.0, []
    for file in few:
        count, found = READERS[file.suffix.lower()](file, column, ceil(MOST_OPENED / len(few)))
        number += count
        contents += found
    return round(number * _bytes(files) / _bytes(few)), contents


def _bytes(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _of_parquet(path: Path, column: str | None, most: int) -> tuple[float, list[bytes]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path, buffer_size=BUFFER) as file:
        name = column or _image_column(file.schema_arrow)
        batches = file.iter_batches(batch_size=most, columns=[name]) if name else iter(())
        first = next(batches, None)
        return file.metadata.num_rows, [] if first is None else _contents(first.column(0).to_pylist())


def _of_arrow(path: Path, column: str | None, most: int) -> tuple[float, list[bytes]]:
    import pyarrow

    number, values = 0, []
    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
        name = column or _image_column(reader.schema)
        for batch in reader:
            number += batch.num_rows
            if name and len(values) < most:
                values += batch.column(name).slice(0, most - len(values)).to_pylist()
    return number, _contents(values)


def _of_tar(path: Path, column: str | None, most: int) -> tuple[float, list[bytes]]:
    number, contents, seen, end = 0, [], 0, 0
    with tarfile.open(path, "r:") as archive:
        for member in islice(archive, MOST_MEMBERS):
            seen, end = seen + 1, member.offset_data + member.size
            if member.isfile() and member.name.lower().endswith(IMAGES):
                number += 1
                file = archive.extractfile(member) if len(contents) < most else None
                contents += [file.read(LARGEST)] if file else []
    return (number if seen < MOST_MEMBERS else number * _bytes([path]) / end), contents


READERS: dict[str, Callable[[Path, str | None, int], tuple[float, list[bytes]]]] = {
    ".parquet": _of_parquet,
    ".arrow": _of_arrow,
    ".tar": _of_tar,
}
"""Readers by suffix: of a file, a column and a number of images, to the number of images and the first contents."""


def _image_column(schema: "pyarrow.Schema") -> str | None:
    """Return the first column that stores files as the library does: by bytes and path."""
    import pyarrow

    fields = (field for field in schema if pyarrow.types.is_struct(field.type))
    return next((field.name for field in fields if field.type.get_field_index("bytes") >= 0), None)


def _contents(values: Sequence[Any]) -> list[bytes]:
    """Return the stored contents of a column, without files that it only names."""
    stored = (value.get("bytes") if isinstance(value, Mapping) else value for value in values)
    return [value for value in stored if isinstance(value, bytes)]

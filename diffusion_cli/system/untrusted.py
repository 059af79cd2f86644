"""Safe reading of untrusted files: regular files of bounded size, and plain data of bounded depth.

All functions raise FormatError (its message follows the file name in a sentence), and OSError of the file
system.
"""

import csv
import json
import math
import pickletools
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from io import BytesIO, StringIO
from pathlib import Path
from typing import IO, Any

import yaml

from diffusion_cli.errors import FormatError, UsageError

LARGEST = 2**28
"""Bytes of an image or of a table of labels, at most."""
LONGEST_LINE = 1000
"""Characters of a line for the terminal, at most."""
LONGEST_TEXT = 2**24
"""Bytes of a JSON or CSV file of this program, at most."""
LONGEST_MANIFEST = 2**25
"""Bytes of a manifest, at most; earlier versions stored the seed of each sample, possibly millions."""
LONGEST_YAML = 2**20  # takes seconds to parse
LONGEST_SCALAR = 4096  # characters; YAML parses 1:2:3:... as a number in quadratic time
DEEPEST = 32
IMAGE_FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
}
"""Supported formats of Pillow with their suffixes.

Each has a signature, runs no code, and declares the number of pixels that its decoder allocates. TGA is
excluded because it has no signature, so that damaged files would count as TGA. AVIF is excluded because its
frames may be larger than declared.
"""
MOST_VALUES = 10**6
LARGEST_NUMBER = 10**6
"""Largest whole number in the configuration of a model, which could ask for a table or network of any size."""
MOST_PIXELS = 2**28
MOST_IN_MANIFEST = 10**7


class TooLargeError(FormatError):
    """A file is larger than the limit of its kind."""


def read(path: Path, limit: int = LARGEST) -> bytes:
    """Return the content of a regular file; FormatError for a pipe or a device, or beyond `limit` bytes."""
    _bounded(regular(path), limit)
    return path.read_bytes()


def regular(path: Path) -> int:
    """Return the size of a regular file; FormatError for others, without opening them, which could block."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FormatError("is not a regular file")
    return status.st_size


def _bounded(size: int, limit: int) -> None:
    if size > limit:
        raise TooLargeError(f"is larger than {limit} bytes")


def inflated(data: bytes, limit: int = LARGEST) -> bytes:
    """Return the content of gzip data; FormatError if it is damaged or has more than `limit` bytes."""
    stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        content = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise FormatError(reason(error)) from error
    _bounded(len(content), limit)
    if not stream.eof:
        raise FormatError("is truncated")
    return content


class Archive:
    """A ZIP archive, from a file or its content; a context that closes it."""

    def __init__(self, source: Path | bytes) -> None:
        if isinstance(source, Path):
            regular(source)
        try:
            self._zip = zipfile.ZipFile(source if isinstance(source, Path) else BytesIO(source))
        except OSError:
            raise
        except Exception as error:  # damaged archives raise errors of many types
            raise FormatError(reason(error)) from error
        self.entries = {entry.filename: entry for entry in self._zip.infolist()}
        if len(self.entries) < len(self._zip.infolist()):
            raise FormatError("has two entries with the same name; pack it again")

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def open(self, name: str) -> IO[bytes]:
        """Return an entry as a file that is inflated while it is read."""
        entry = self._entry(name)
        # Other methods inflate a complete block even for a small read.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError("uses a compression other than deflate; pack it again")
        try:
            return self._zip.open(entry)
        except Exception as error:  # encrypted, overlapping, or damaged
            raise FormatError(reason(error)) from error

    def read(self, name: str, limit: int = LARGEST) -> bytes:
        """Return the content of an entry of at most `limit` bytes."""
        size = self._entry(name).file_size
        _bounded(size, limit)
        with self.open(name) as file:
            try:
                return file.read(size + 1)  # inflates no more than declared
            except Exception as error:  # of zlib, a checksum or a truncated entry
                raise FormatError(reason(error)) from error

    def _entry(self, name: str) -> zipfile.ZipInfo:
        windows = name.replace("/", "\\")
        if (
            name not in self.entries
            and windows in self.entries
            and not any("/" in known for known in self.entries)
        ):
            return self.entries[windows]
        if name not in self.entries:  # for example after the archive was replaced
            raise FormatError("is not in the archive")
        return self.entries[name]


# The globals in checkpoints of tensors and plain data. torch allows others, and some of them can allocate any
# amount of memory.
NAMES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage")
# Older versions of torch use these too.
WEIGHT_NAMES = re.compile(
    rf"{NAMES.pattern}|torch\._utils _rebuild_(?:tensor|parameter)|torch\.nn\.parameter Parameter"
)
PROTOCOL = 2
"""Version of pickles, which torch.save writes unless it is given another."""
OPERATIONS = frozenset(
    [
        "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "NEWOBJ", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET",
        "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
        "BINUNICODE", "SHORT_BINSTRING", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
        "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    ]
)  # fmt: skip
"""Operations of these pickles that torch reads. Others are refused: some import a class by a name on the stack."""
TUPLES = ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")


def check_tensors(path: Path) -> None:
    """Raise FormatError, or a parser's error, unless a `torch.save` file has only tensors and plain data.

    Compressed entries are rejected, and tuples nested so deeply that hashing them overflows Python's stack.
    """
    with Archive(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.entries.values()):
            raise FormatError("is compressed")
        (name,) = (name for name in archive.entries if name.endswith("/data.pkl"))
        data = archive.read(name)
    _check_pickle(BytesIO(data), NAMES)


def check_sums(path: Path) -> None:
    """Raise FormatError unless the checksums of a `torch.save` file, which torch ignores, are right; or OSError."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            # Reject overlapping records, which could take very long to read; compression was rejected before.
            whole = sum(record.file_size for record in records) <= path.stat().st_size
            whole = whole and archive.testzip() is None
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # damaged archives fail in many ways
        raise FormatError(reason(error)) from error
    if not whole:
        raise FormatError("a checksum is wrong")


def check_weights(content: bytes) -> None:
    """Raise FormatError, or a parser's error, unless the content of a `torch.save` file has only tensors.

    torch before 1.6 wrote five pickles in a row: a magic number, the version, system information, the weights
    and the keys of their storages.
    """
    if content.startswith(b"PK\x03\x04"):
        with Archive(content) as archive:
            (name,) = (name for name in archive.entries if name.endswith("/data.pkl"))
            _check_pickle(BytesIO(archive.read(name)), WEIGHT_NAMES)
        return
    file = BytesIO(content)
    for _ in range(5):
        _check_pickle(file, WEIGHT_NAMES)


def _check_pickle(file: IO[bytes], names: re.Pattern[str]) -> None:
    """Raise FormatError for a pickle with other globals or operations, or with tuples nested too deeply to hash."""
    stack: list[int | None] = []  # nesting depth of the tuple in each place, None for a mark
    memo: dict[Any, int] = {}
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "PROTO" and argument != PROTOCOL:
            raise FormatError(f"has pickle protocol {argument}, and only protocol {PROTOCOL} is read")
        if operation.name not in OPERATIONS:
            raise FormatError(f"has the pickle operation {operation.name}, which torch.save does not write")
        if operation.name == "GLOBAL" and not names.fullmatch(str(argument)):
            raise FormatError(f"names {argument}")
        if "PUT" in operation.name:
            memo[argument] = stack[-1] or 0
        elif "GET" in operation.name:
            stack.append(memo[argument])
        elif operation.name == "MARK":
            stack.append(None)
        else:
            depth = _nesting(operation, stack)
            if depth > DEEPEST:
                raise FormatError(f"has tuples nested deeper than {DEEPEST} levels")
            stack += [depth] * len(operation.stack_after)


def _nesting(operation: pickletools.OpcodeInfo, stack: list[int | None]) -> int:
    """Pop the operands of an operation off a pickle's stack; return the depth of the tuple it makes, or 0."""
    taken = []
    if pickletools.markobject in operation.stack_before:
        while (depth := stack.pop()) is not None:
            taken.append(depth)
    for kind in operation.stack_before:
        if kind not in (pickletools.markobject, pickletools.stackslice):
            taken.append(stack.pop() or 0)
    return 1 + max(taken, default=0) if operation.name in TUPLES else 0


def reason(error: BaseException) -> str:
    """Return the message of an error in one line of at most 300 characters; the first cause of a UsageError."""
    message = error.problems[0].cause if isinstance(error, UsageError) else str(error)
    text = " ".join(message.split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def printable(text: str) -> str:
    """Return a line for the terminal, without the middle of a long one: the remedy is at the end."""
    text = escaped(text)
    if len(text) <= LONGEST_LINE:
        return text
    half = LONGEST_LINE // 2
    return f"{text[: half - 5]} ... {text[-half:]}"


def escaped(text: str) -> str:
    """Return a text with control characters escaped, because messages quote names and contents of files."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def plain(value: Any, most: int = MOST_VALUES) -> Any:
    """Return a value if it is plain data: dicts with text keys, lists, texts, numbers, booleans or None.

    Raises FormatError for other types, for nesting deeper than DEEPEST levels and for more than `most`
    values, where repeated references count each time. Numbers may be infinite.
    """
    todo: list[tuple[Any, int]] = [(value, 0)]
    seen = 0
    while todo:
        item, depth = todo.pop()
        parts: list[Any] = []
        if type(item) is dict:
            if not all(type(key) is str for key in item):
                raise FormatError("has a key that is not text")
            parts = [*item, *item.values()]
        elif type(item) is list:
            parts = item
        elif type(item) is int:
            if abs(item) >= 2**63:
                raise FormatError("has a whole number that is too large")
        elif item is not None and type(item) not in (str, float, bool):
            raise FormatError(f"has a value of type {type(item).__name__}")
        seen += 1 + len(parts)
        if depth > DEEPEST:
            raise FormatError(f"is nested deeper than {DEEPEST} levels")
        if seen > most:
            raise FormatError(f"has more than {most} values")
        todo += [(part, depth + 1) for part in parts]
    return value


def whole_numbers(node: Any) -> Iterator[int]:
    """Yield the integers in plain data."""
    if isinstance(node, int):
        yield node
    elif isinstance(node, Mapping | list):
        for item in node.values() if isinstance(node, Mapping) else node:
            yield from whole_numbers(item)


def from_json(
    data: bytes, limit: int = LONGEST_TEXT, most: int = MOST_VALUES, *, infinite: bool = False
) -> Any:
    """Return plain data from JSON of at most `limit` bytes and `most` values.

    Numbers are finite, unless `infinite` allows `Infinity` and `-Infinity`, which Python writes.
    """
    _bounded(len(data), limit)
    constants = _infinite if infinite else _refuse
    try:
        value = json.loads(data, parse_constant=constants, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not JSON ({reason(error)})") from error
    return plain(value, most)


def read_json(
    path: Path, limit: int = LONGEST_TEXT, most: int = MOST_VALUES, *, infinite: bool = False
) -> Any:
    """Return plain data of a JSON file, as `from_json`."""
    return from_json(read(path, limit), limit, most, infinite=infinite)


def _refuse(name: str) -> float:
    raise FormatError(f"{name} is not allowed")


def _infinite(name: str) -> float:
    return _refuse(name) if name == "NaN" else float(name)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise FormatError(f"{text[:40]} is too large")
    return number


class _Plain(yaml.SafeLoader):
    """YAML without aliases and long scalars, which can take unbounded memory or time."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise FormatError("has an alias (*name); write out its value")
        event = self.peek_event()
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST_SCALAR:
            raise FormatError(f"has a text of more than {LONGEST_SCALAR} characters")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """Return plain data of a YAML file."""
    data = read(path, LONGEST_YAML)
    try:
        value = yaml.load(data, _Plain)
    except Exception as error:  # its constructors raise various Python errors
        raise FormatError(f"is not plain YAML ({reason(error)})") from error
    return plain(value)


def read_csv(path: Path) -> list[list[str]]:
    """Return the fields of each line of a CSV file that is not empty."""
    try:
        text = read(path, LONGEST_TEXT).decode()
        return [row for row in csv.reader(StringIO(text, newline="")) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"is not CSV in UTF-8 ({reason(error)})") from error

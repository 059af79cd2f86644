"""What strangers' files may be: regular, of bounded size, and where they are text, plain data of bounded depth.

All raise FormatError with the end of a sentence that begins with the file's name, and OSError of the file system.
"""

import csv
import json
import math
import pickletools
import re
import stat
import zipfile
import zlib
from io import BytesIO, StringIO
from pathlib import Path
from typing import IO, Any

import yaml

from diffusion_cli.errors import FormatError

LARGEST = 2**28
"""Bytes of an image or of a table of labels."""
LONGEST_LINE = 1000
"""Characters of a line for the terminal."""
LONGEST_TEXT = 2**24
"""Bytes of a text that this program writes: JSON, CSV."""
LONGEST_MANIFEST = 2**25
"""Bytes of a manifest; earlier versions wrote the seed of each sample in it, and there may be millions."""
LONGEST_YAML = 2**20  # its parser takes seconds for that
LONGEST_SCALAR = 4096  # characters; YAML reads 1:2:3: ... as one number, in the square of its length
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
"""The formats of Pillow that are read, each with its suffixes.

Each has a signature, runs no code, and declares the number of pixels that its decoder allocates. TGA has no signature,
so that damaged files would pass for it; AVIF decodes frames of another size than declared.
"""
MOST_VALUES = 10**6
MOST_IN_MANIFEST = 10**7


def read(path: Path, limit: int = LARGEST) -> bytes:
    """The content of a regular file: of a pipe or a device, which may never end, none is read."""
    _bounded(regular(path), limit)
    return path.read_bytes()


def regular(path: Path) -> int:
    """The size of a regular file, which for anything else is not opened: that alone may wait for ever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FormatError("is not a regular file")
    return status.st_size


def _bounded(size: int, limit: int) -> None:
    if size > limit:
        raise FormatError(f"is larger than {limit} bytes")


def inflated(data: bytes, limit: int = LARGEST) -> bytes:
    """The content of a gzip file, of which no more is inflated than may be."""
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
    """A ZIP archive, from a file or from its content; entries are read one by one, and a `with` block closes it."""

    def __init__(self, source: Path | bytes) -> None:
        if isinstance(source, Path):
            regular(source)
        try:
            self._zip = zipfile.ZipFile(source if isinstance(source, Path) else BytesIO(source))
        except OSError:
            raise
        except Exception as error:  # its parser meets damaged archives with errors of many types
            raise FormatError(reason(error)) from error
        self.entries = {entry.filename: entry for entry in self._zip.infolist()}
        if len(self.entries) < len(self._zip.infolist()):
            raise FormatError("has two entries with the same name; pack it again")

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def open(self, name: str) -> IO[bytes]:
        """An entry, inflated as far as it is read."""
        entry = self._entry(name)
        # Other methods inflate a block at once, however little of it is asked for.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError("uses a compression other than deflate; pack it again")
        try:
            return self._zip.open(entry)
        except Exception as error:  # encrypted, overlapping, or damaged
            raise FormatError(reason(error)) from error

    def read(self, name: str, limit: int = LARGEST) -> bytes:
        """The content of an entry."""
        size = self._entry(name).file_size
        _bounded(size, limit)
        with self.open(name) as file:
            try:
                return file.read(size + 1)  # a number, so that no more is inflated than was declared
            except Exception as error:  # zlib's, of a bad checksum, of an early end
                raise FormatError(reason(error)) from error

    def _entry(self, name: str) -> zipfile.ZipInfo:
        windows = name.replace("/", "\\")
        if (
            name not in self.entries
            and windows in self.entries
            and not any("/" in known for known in self.entries)
        ):
            return self.entries[windows]
        if name not in self.entries:  # as where another archive has taken the place of this one
            raise FormatError("is not in the archive")
        return self.entries[name]


# What names a checkpoint of tensors and plain data. Of what torch allows beside, some takes any memory it is told to.
NAMES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage")
# Older versions of torch named these too.
WEIGHT_NAMES = re.compile(
    rf"{NAMES.pattern}|torch\._utils _rebuild_(?:tensor|parameter)|torch\.nn\.parameter Parameter"
)
TUPLES = ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")


def check_tensors(path: Path) -> None:
    """Raise FormatError, or an error of the parsers, unless a file of `torch.save` names tensors and plain data alone.

    Nothing in it may inflate, and no tuple be nested so deep that to hash it overflows Python's own stack.
    """
    with Archive(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.entries.values()):
            raise FormatError("is compressed")
        (name,) = (name for name in archive.entries if name.endswith("/data.pkl"))
        data = archive.read(name)
    _check_pickle(BytesIO(data), NAMES)


def check_weights(content: bytes) -> None:
    """Raise FormatError, or an error of the parsers, unless the content of a file of `torch.save` is tensors alone.

    Versions before 1.6 wrote five pickles one after the other: a number, a version, sizes of the machine, the weights
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
    """Raise FormatError for a pickle with other names, or with tuples nested so deep that to hash one fails."""
    stack: list[int | None] = []  # how deep the tuples are nested that lie there, None for a mark
    memo: dict[Any, int] = {}
    for operation, argument, _ in pickletools.genops(file):
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
    """Take off a pickle's stack what an operation does, and return how deep the tuple is nested that it makes, or 0."""
    taken = []
    if pickletools.markobject in operation.stack_before:
        while (depth := stack.pop()) is not None:
            taken.append(depth)
    for kind in operation.stack_before:
        if kind not in (pickletools.markobject, pickletools.stackslice):
            taken.append(stack.pop() or 0)
    return 1 + max(taken, default=0) if operation.name in TUPLES else 0


def reason(error: BaseException) -> str:
    """What an error says, in a line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def printable(text: str) -> str:
    """A line for the terminal; of a long one the middle is left out, for at the end stands the remedy."""
    text = escaped(text)
    if len(text) <= LONGEST_LINE:
        return text
    half = LONGEST_LINE // 2
    return f"{text[: half - 5]} ... {text[-half:]}"


def escaped(text: str) -> str:
    """A text without the characters that command a terminal: what a file holds, and is called, gets into our words."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def plain(value: Any, most: int = MOST_VALUES) -> Any:
    """Return plain data: mappings with names as keys, lists, texts, finite or infinite numbers, true, false, null.

    FormatError for anything else, and what is nested so deep or, with what is there many times, so large that
    walking through it would not end: `most` is the largest number of values.
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


def from_json(data: bytes, limit: int = LONGEST_TEXT, most: int = MOST_VALUES) -> Any:
    """Plain data of at most `limit` bytes and `most` values of JSON, all numbers finite."""
    _bounded(len(data), limit)
    try:
        value = json.loads(data, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not JSON ({reason(error)})") from error
    return plain(value, most)


def read_json(path: Path, limit: int = LONGEST_TEXT, most: int = MOST_VALUES) -> Any:
    """Plain data of a JSON file, as `from_json`."""
    return from_json(read(path, limit), limit, most)


def _refuse(name: str) -> float:
    raise FormatError(f"{name} is not allowed")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise FormatError(f"{text[:40]} is too large")
    return number


class _Plain(yaml.SafeLoader):
    """YAML without the few features by which a short text makes a huge tree, or takes hours."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise FormatError("has an alias (*name); write out its value")
        event = self.peek_event()
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST_SCALAR:
            raise FormatError(f"has a text of more than {LONGEST_SCALAR} characters")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """Plain data of a YAML file."""
    data = read(path, LONGEST_YAML)
    try:
        value = yaml.load(data, _Plain)
    except Exception as error:  # its constructors know no error but Python's own
        raise FormatError(f"is not plain YAML ({reason(error)})") from error
    return plain(value)


def read_csv(path: Path) -> list[list[str]]:
    """The lines of a CSV file that are not empty, as fields."""
    try:
        text = read(path, LONGEST_TEXT).decode()
        return [row for row in csv.reader(StringIO(text, newline="")) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"is not CSV in UTF-8 ({reason(error)})") from error

"""Captions of images: of text files beside them, of tables, or given; read at their first use."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from torch import Tensor

from diffusion_cli.data.labels import composed
from diffusion_cli.data.listing import NO_IMAGE_NAMES, stem, visible_name
from diffusion_cli.data.text_tables import FILE_COLUMNS, decoded, read_table
from diffusion_cli.errors import FormatError, UsageError, counted, examples
from diffusion_cli.system import untrusted

TABLES = ("metadata.jsonl", "metadata.csv", "labels.jsonl", "labels.csv")
"""File names of tables that may have captions."""
CAPTION_COLUMNS = ("text", "caption")
LONGEST = 2**18
"""Bytes of the captions of one image, at most."""
Texts = Sequence[tuple[str, ...]]
"""Captions of each image; an image without one has an empty tuple."""
Source = Literal["auto", "table", "txt", "none"]
"""Place of the captions of image files."""


class ReadCaptions(NamedTuple):
    """Captions with remarks for the user, one line each."""

    texts: Texts
    remarks: tuple[str, ...] = ()


class NoCaptionsError(UsageError):
    """The images have no captions; other errors are those of captions that cannot be read."""


class CaptionTable:
    """Captions of the images of a split, one or several of each; an image without one has a missing condition.

    Args:
        read: returns the captions. It is called at the first use, so that training without texts reads none; it can
            be pickled, and raises UsageError.
    """

    def __init__(self, read: Callable[[], ReadCaptions]) -> None:
        self._read = read
        self._found: ReadCaptions | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes that read images need no captions.
        return {"_read": self._read, "_found": None}

    @classmethod
    def of(cls, texts: Texts) -> "CaptionTable":
        """Return a table of given captions."""
        return cls(partial(ReadCaptions, texts))

    @property
    def texts(self) -> Texts:
        """Captions of each image."""
        return self._known().texts

    def remarks(self) -> list[str]:
        """Return remarks about the captions of the whole dataset, one line each."""
        return [*self._known().remarks]

    def rows(self, index: Tensor) -> "CaptionTable":
        """Return the captions of the images `index`, int64 [N]."""
        return CaptionTable(partial(_chosen, self, index))

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the captions, their order and their images."""
        state = sha256()
        for texts in self.texts:
            state.update(repr(texts).encode())
        return state.hexdigest()

    def _known(self) -> ReadCaptions:
        if self._found is None:
            self._found = self._read()
        return self._found


def _chosen(table: CaptionTable, index: Tensor) -> ReadCaptions:
    return ReadCaptions([table.texts[row] for row in index.tolist()], tuple(table.remarks()))


def one_line(text: str) -> str:
    """Return a caption without line breaks and without blanks at its ends.

    Raises:
        FormatError: the text has half of a surrogate pair, which JSON can write and no encoding has.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"has an invalid letter in {text[:40]!r}") from error
    return " ".join(text.split())


def cleaned(value: Any) -> tuple[str, ...]:
    """Return the captions in a cell: a text, a list of texts, or None.

    Raises:
        FormatError: the cell has another value.
    """
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise FormatError(
            f"has the caption {str(value)[:40]!r}, which is no text and no list of texts; repair it"
        )
    return tuple(line for line in map(one_line, texts) if line)


def numbered_captions(values: Iterable[Any], key: str, value: Any, remedy: str) -> ReadCaptions:
    """Return the captions of images that have numbers as names.

    Args:
        values: captions of each image: a text, a list of texts, or None.
        key: configuration key of the captions, for errors and remarks.
        value: its value.
        remedy: what to do if no image has a caption.

    Raises:
        UsageError: a value is no caption, or no image has one.
    """
    texts: list[tuple[str, ...]] = []
    for row, cell in enumerate(values):
        try:
            texts.append(cleaned(cell))
        except FormatError as error:
            raise UsageError(key, value, f"image {row} {error}") from error
    without = [row for row, captions in enumerate(texts) if not captions]
    if len(without) == len(texts):
        raise NoCaptionsError(key, value, "no image has a caption", remedy)
    line = f"{key}={value}: {counted(len(without), 'image')} without a caption"
    return ReadCaptions(texts, (f"{line}, such as image {without[0]}",) if without else ())


class CaptionFiles(NamedTuple):
    """Image files with captions in text files beside them, or in tables; see `Folder`.

    Args:
        path: folder or ZIP archive.
        names: all files in it.
        images: names of the images, in the order of the captions.
        source: place of the captions.
        given: path as the user wrote it.
    """

    path: Path
    names: Sequence[str]
    images: Sequence[str]
    source: Source
    given: str

    def missing(self) -> str:
        """Return why there are no captions, by the names of the files; empty if there may be some."""
        if self.source == "none":
            return "dataset.captions=none ignores them"
        if (self.source != "txt" and self._tables()) or (self.source != "table" and self._beside()):
            return ""
        return {"table": _NO_TABLE, "txt": _NO_FILE}.get(self.source, f"{_NO_FILE} and {_NO_TABLE}")

    def read(self) -> ReadCaptions:
        """Return the captions.

        Raises:
            UsageError: a file cannot be read, or no image has a caption.
        """
        if missing := self.missing():
            raise self._refusal(missing)
        with _opened(self.path) as read:
            found = self._of_tables(read) if self.source != "txt" else None
            if found is None and self.source != "table":
                found = self._of_files(read)
        if found is None:
            tables = ", ".join(self._tables()[:3])
            columns = f"{' or '.join(FILE_COLUMNS)}, and {' or '.join(CAPTION_COLUMNS)}"
            problem = f"{tables} has no captions: it needs a column {columns}"
            raise NoCaptionsError(*self._refusal(problem).problems[0])
        texts, remarks = found
        without = [image for image, captions in zip(self.images, texts, strict=True) if not captions]
        if len(without) == len(texts):
            raise self._refusal("; ".join(["no image has a caption", *remarks]))
        if without:
            shown = f"{counted(len(without), 'image')} without a caption: {examples(without)}"
            remarks = (shown, *remarks)
        return ReadCaptions(texts, tuple(f"dataset.path={self.given}: {remark}" for remark in remarks))

    def _refusal(self, problem: str) -> UsageError:
        remedy = (
            "write a .txt file beside each image, or a table metadata.csv with the columns file_name and text"
        )
        if self.source == "none":
            remedy = "leave dataset.captions out"
        return UsageError("dataset.captions", self.source, problem, remedy)

    def _tables(self) -> list[str]:
        paths = sorted(name for name in self.names if PurePosixPath(name).name in TABLES)
        return [name for name in paths if visible_name(PurePosixPath(name))]

    def _beside(self) -> dict[str, str]:
        """Return the text files that lie beside an image, by the image's name."""
        # Of a.TXT and a.txt, the latter counts.
        texts = {name[:-4]: name for name in sorted(self.names) if name[-4:].casefold() == ".txt"}
        if not texts:
            return {}
        stems = {image: _without_suffix(image) for image in self.images}
        partner: dict[str, str] = {}
        for form in (str, composed, _caseless):
            # File systems store different Unicode forms, and some ignore case; a name that fits several is no match.
            images, files = (Counter(map(form, names)) for names in ({*stems.values()}, texts))
            named = {form(stem): name for stem, name in texts.items()}
            for own in {*stems.values()} - partner.keys():
                if images[form(own)] == files[form(own)] == 1:
                    partner[own] = named[form(own)]
        return {image: partner[own] for image, own in stems.items() if own in partner}

    def _of_files(self, read: "Read") -> ReadCaptions | None:
        beside = self._beside()
        if not beside:
            return None
        texts: list[tuple[str, ...]] = []
        for image in self.images:
            name = beside.get(image)
            with self._named(name):
                text = decoded(read(name, LONGEST)) if name else ""
                texts.append(cleaned(text.replace("\r", "\n").split("\n")))
        used = {*beside.values(), *self._tables()}
        rest = [name for name in self.names if _is_caption(name) and name not in used]
        stray = f"{counted(len(rest), '.txt file')} without an image: {examples(rest)}"
        return ReadCaptions(texts, (stray,) if rest else ())

    def _of_tables(self, read: "Read") -> ReadCaptions | None:
        """Return the captions of all tables; None if no table has them."""
        found: dict[str, list[str]] = {}
        images = {composed(image): image for image in self.images}
        sizes: Counter[str] = Counter()
        unknown: list[str] = []
        has_column = False
        for table in self._tables():
            with self._named(table):
                limit = min(untrusted.LARGEST, LONGEST * (1 + len(self.images)))
                rows = table_rows(read(table, limit), table)
                if rows is None:
                    continue
                has_column = True
                for name, value in rows:
                    place = str(PurePosixPath(table).with_name("_"))[:-1] + name
                    try:
                        texts = cleaned(value)
                    except FormatError as error:
                        raise FormatError(f"in the row of {name[:80]!r} {error}") from error
                    if (image := images.get(composed(place))) is None:
                        unknown.append(name)
                        continue
                    found.setdefault(image, []).extend(texts)
                    sizes[image] += sum(len(text.encode()) for text in texts)
                    if sizes[image] > LONGEST:
                        raise FormatError(
                            f"has captions of more than {LONGEST} bytes for {image}; shorten them"
                        )
        if not has_column:
            return None
        rest = f"{counted(len(unknown), 'row')} of the table without an image: {examples(unknown)}"
        texts = [tuple(dict.fromkeys(found.get(image, ()))) for image in self.images]
        return ReadCaptions(texts, (rest,) if unknown else ())

    @contextmanager
    def _named(self, name: str | None) -> Iterator[None]:
        """Report errors of a file with its name."""
        try:
            yield
        except (ValueError, OSError) as error:
            problem = f"{name} {untrusted.reason(error)}"
            is_large = isinstance(error, untrusted.TooLargeError)
            remedy = f"shorten it; an image may have {LONGEST // 1024} KiB of captions" if is_large else ""
            raise UsageError("dataset.captions", self.source, problem, remedy) from error


_NO_FILE = "there are no .txt files beside the images"
_NO_TABLE = f"there is no {TABLES[1]} or {TABLES[0]}"
Read = Callable[[str, int], bytes]
"""Returns the content of a file by its name and its greatest size."""


def _caseless(name: str) -> str:
    return composed(name).casefold()


def _without_suffix(image: str) -> str:
    path = PurePosixPath(image)
    return str(path.with_name(stem(path)))


def _is_caption(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() == ".txt" and visible_name(path) and path.stem.lower() not in NO_IMAGE_NAMES


@contextmanager
def _opened(path: Path) -> Iterator[Read]:
    """Yield a function that reads the files of a folder, or of an archive that is opened once."""
    if path.is_dir():
        yield lambda name, limit: untrusted.read(path / name, limit)
        return
    with untrusted.Archive(path) as archive:
        yield archive.read


def table_rows(data: bytes, name: str) -> list[tuple[str, Any]] | None:
    """Return the file and the caption of each row of a table in CSV or JSON lines; None without such columns.

    Raises:
        FormatError: the table is malformed.
    """
    table = read_table(data, name, (*FILE_COLUMNS, *CAPTION_COLUMNS))
    caption = next((column for column in CAPTION_COLUMNS if column in table.columns), None)
    if table.file_column is None or caption is None:
        return None
    return [*zip(table.files(), table.columns[caption], strict=True)]

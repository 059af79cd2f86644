"""Tables of texts and values in CSV and JSON Lines, read within bounds of memory."""

import csv
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from io import BytesIO
from typing import Any, NamedTuple

from diffusion_cli.errors import FormatError, examples
from diffusion_cli.system.untrusted import LONGEST_TEXT, from_json

FILE_COLUMNS = ("file", "file_name")
"""Names of the column with image files, the first one that exists is used."""
MOST_COLUMNS = 10**4
"""Columns of a table, at most."""
MOST_CELLS = 5 * 10**7
"""Cells of the columns of a table that stay in memory, at most."""


class TextTable(NamedTuple):
    """A table in the order of its rows."""

    header: list[str]
    """Names of all columns, in order."""
    columns: dict[str, list[Any]]
    """Cells of the columns that were kept, by name."""

    @property
    def file_column(self) -> str | None:
        """The column with image files; None without one."""
        return next((name for name in FILE_COLUMNS if name in self.columns), None)

    def files(self) -> list[str]:
        """Return the image file of each row; FormatError without such a column, or for an empty cell."""
        if self.file_column is None:
            if not self.header:
                raise FormatError("is empty; write a row for each image, or remove it")
            first = ",".join(self.header)[:80]
            names = " or ".join(FILE_COLUMNS)
            raise FormatError(f"has no column {names}, and begins with {first!r}; add one")
        files = self.columns[self.file_column]
        if wrong := [file for file in files if not isinstance(file, str) or not file]:
            raise FormatError(f"has a row without the name of an image, but {str(wrong[0])[:40]!r}")
        return files


def read_table(data: bytes, name: str, kept: Collection[str]) -> TextTable:
    """Return a table in UTF-8, with or without a byte-order mark: JSON Lines if its name ends in .jsonl, else CSV.

    A cell of CSV is a text without blanks at its ends, and empty where a row is shorter than the header. A cell of JSON
    Lines is a text, a number, a boolean, a list of texts, or None, also where a row has no such key. Empty lines are
    skipped.

    Args:
        data: content of the file.
        name: name of the file.
        kept: columns that stay in memory, as far as they exist.

    Raises:
        FormatError: the table is malformed or too large, or a column of `kept` exists twice.
    """
    return json_lines(BytesIO(data), kept) if name.lower().endswith(".jsonl") else _csv(data, kept)


def json_lines(lines: Iterable[bytes], kept: Collection[str]) -> TextTable:
    """Return a table of JSON Lines, an object in each line; see `read_table`."""
    header: dict[str, None] = {}
    columns: dict[str, list[Any]] = {}
    rows = cells = 0
    for number, line in enumerate(_texts(lines), 1):
        if not line.strip():
            continue
        row = _object(line, number)
        header |= dict.fromkeys(row)
        _check_columns(len(header))
        for key in kept:
            if key in row and key not in columns:
                columns[key] = [None] * rows
                cells += rows
        for key, column in columns.items():
            column.append(_cell(row.get(key), number))
            cells += 1 if not isinstance(column[-1], list) else 1 + len(column[-1])
        _check_cells(cells)
        rows += 1
    return TextTable([*header], columns)


def _object(line: str, number: int) -> dict[str, Any]:
    try:
        row = from_json(line.encode())
    except ValueError as error:
        raise FormatError(f"has a line {number} that {error}; repair it") from error
    if not isinstance(row, dict):
        raise FormatError(f"has no object in line {number}; write one object with keys in each line")
    if "\\ud" in line.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which no encoding has
            raise FormatError(f"has an invalid letter in line {number}; repair it") from error
    return row


def _cell(value: Any, number: int) -> Any:
    """Return a value; FormatError for nested ones."""
    if isinstance(value, dict) or (isinstance(value, list) and not all(isinstance(x, str) for x in value)):
        problem = f"has {str(value)[:40]!r} in line {number}, which is no text, number or list of texts"
        raise FormatError(f"{problem}; repair it")
    return value


def _csv(data: bytes, kept: Collection[str]) -> TextTable:
    rows = _csv_rows(data)
    header = next(rows, [])
    _check_columns(len(header))
    number_of = Counter(header)
    if repeated := [name for name in kept if number_of[name] > 1]:
        raise FormatError(f"has more than one column {examples(repeated)}; rename them")
    places = {name: place for place, name in enumerate(header) if name in kept}
    columns: dict[str, list[Any]] = {name: [] for name in places}
    long: list[str] = []
    for number, row in enumerate(rows, 1):
        _check_cells(number * len(columns))
        if any(row[len(header) :]):
            long.append(",".join(row)[:80])
        for name, place in places.items():
            columns[name].append(row[place] if place < len(row) else "")
    if long:
        raise FormatError(
            f"has more fields than its header in {examples(long)}; quote fields that contain commas"
        )
    return TextTable(header, columns)


def _csv_rows(data: bytes) -> Iterator[list[str]]:
    """Yield the rows of a CSV file that are not empty, without blanks around the fields."""
    # Unlike texts, bytes split at line breaks alone, not at separators such as U+2028.
    lines = (part for line in BytesIO(data) for part in line.splitlines(keepends=True))
    # The limit is one of the process, by default 128 KiB.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_TEXT))
    reader = csv.reader(_texts(lines), skipinitialspace=True, strict=True)
    try:
        for fields in reader:
            row = [field.strip() for field in fields]
            if any(row):
                yield row
    except csv.Error as error:
        raise FormatError(f"is not valid CSV (line {reader.line_num}: {error}); repair it") from error


def decoded(data: bytes) -> str:
    """Return text in UTF-8, with or without a byte-order mark; FormatError that names the line of other bytes."""
    return "".join(_texts(BytesIO(data)))


def _texts(lines: Iterable[bytes]) -> Iterator[str]:
    """Yield lines as texts; FormatError for other bytes than UTF-8, or a line that is too long."""
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST_TEXT:
            raise FormatError(f"has a line {number} of more than {LONGEST_TEXT} bytes; split it")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"is not UTF-8 (line {number}: {error.reason}); save it as UTF-8") from error


def _check_columns(count: int) -> None:
    if count > MOST_COLUMNS:
        raise FormatError(f"has more than {MOST_COLUMNS} columns; remove those that are not used")


def _check_cells(count: int) -> None:
    if count > MOST_CELLS:
        raise FormatError(f"has more than {MOST_CELLS} cells in the columns to read; choose fewer columns")

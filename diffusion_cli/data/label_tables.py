"""Tables of values beside image files: `labels.csv`, and the forms that other programs write."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.data.attributes import KEY, Column, chosen_columns
from diffusion_cli.data.labels import (
    LABELS_CSV,
    LONGEST_ROW,
    class_folders,
    csv_lines,
    decoded,
    find_table,
    image_rows,
    in_one_form,
    padded,
    read,
    split_folders,
)
from diffusion_cli.errors import FormatError, UsageError, examples
from diffusion_cli.system import untrusted as foreign

TABLES = (LABELS_CSV, "labels.jsonl", "metadata.csv", "metadata.jsonl")
"""File names of tables, the first one that exists is used."""
FILE_COLUMNS = ("file", "file_name")
"""Names of the column with the files, the first one that exists is used."""


class LabelTable(NamedTuple):
    """A table in the order of its rows."""

    files: list[str]
    """File of each row."""
    cells: dict[str, list[Any]]
    """Values of the other columns."""


def file_columns(
    path: Path, names: list[str], images: list[str], kinds: Mapping[str, Any]
) -> dict[str, Column]:
    """Return the chosen columns of image files, in the order of the files.

    The column `label` is that of class folders if the table has no such column.

    Args:
        path: the folder or archive.
        names: all files below `path`.
        images: those that are images.
        kinds: the chosen columns.

    Raises:
        UsageError: there is no table, a column is missing, or the table is malformed or does not match the images.
    """
    folders = class_folders(split_folders(images)[1])
    columns = {} if folders is None else {LABEL: Column(in_one_form(folders))}
    table = find_table(names, images, TABLES)
    if table is None:
        if missing := [name for name in kinds if name not in columns]:
            problem = f"no {', '.join(TABLES[:-1])} or {TABLES[-1]} at the top of {path}"
            remedy = f"create one with the columns {FILE_COLUMNS[0]} and {missing[0]}"
            raise UsageError(KEY, missing[0], problem, remedy)
        return {name: columns[name] for name in kinds}
    try:
        found = read_table(path, table, len(images))
        rows = image_rows(found.files, table, images)
    except ValueError as error:
        raise UsageError("dataset.path", path, f"{table} {error}") from error
    columns |= {name: Column([cells[row] for row in rows]) for name, cells in found.cells.items()}
    return chosen_columns(columns, kinds, table)


def read_table(path: Path, table: str, count: int) -> LabelTable:
    """Return a table in a folder or archive; FormatError if it is malformed, or too large for `count` images."""
    data = read(path, table, min(foreign.LARGEST, LONGEST_ROW * (1 + count)))
    return _of_csv(data) if PurePosixPath(table).suffix == ".csv" else _of_json_lines(data)


def _of_csv(data: bytes) -> LabelTable:
    header, rows = csv_lines(data)
    files = _file_column(header)
    if repeated := [name for name in dict.fromkeys(header) if name and header.count(name) > 1]:
        raise FormatError(f"has more than one column {examples(repeated)}; rename them")
    rows = padded(header, rows)
    columns = {name: [row[place] for row in rows] for place, name in enumerate(header) if name}
    return LabelTable(columns.pop(files), columns)


def _of_json_lines(data: bytes) -> LabelTable:
    """Return a table of JSON Lines: an object in each line, where a missing key is a missing value."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(decoded(data).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = foreign.from_json(line.encode())
        except ValueError as error:
            raise FormatError(f"has a line {number} that {error}; repair it") from error
        if not isinstance(row, dict):
            raise FormatError(f"has no object in line {number}; write one object with keys in each line")
        rows.append(row)
    header = list(dict.fromkeys(name for row in rows for name in row))
    key = _file_column(header)
    files = [row.get(key) for row in rows]
    if wrong := [number for number, file in enumerate(files, 1) if not isinstance(file, str)]:
        raise FormatError(f"has no text as {key} in object {wrong[0]}; give the name of an image")
    return LabelTable(
        [str(file) for file in files],
        {name: [row.get(name) for row in rows] for name in header if name != key},
    )


def _file_column(header: list[str]) -> str:
    """Return the column with the files; FormatError without one."""
    found = next((name for name in FILE_COLUMNS if name in header), None)
    if found is None:
        first = ",".join(header)[:80]
        raise FormatError(f"has no column {' or '.join(FILE_COLUMNS)}, and begins with {first!r}; add one")
    return found

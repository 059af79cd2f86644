"""Tables of values beside image files: `labels.csv`, and the forms that other programs write."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.data.attributes import KEY, Column, chosen_columns
from diffusion_cli.data.labels import (
    LABELS_CSV,
    LONGEST_ROW,
    class_folders,
    find_table,
    in_one_form,
    read,
    rows_of_images,
    split_folders,
)
from diffusion_cli.data.text_tables import FILE_COLUMNS, TextTable, read_table
from diffusion_cli.errors import UsageError
from diffusion_cli.system import untrusted

TABLES = (LABELS_CSV, "labels.jsonl", "metadata.csv", "metadata.jsonl")
"""File names of tables, the first one that exists is used."""


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
        found = read_labels(path, table, len(images), kinds)
        rows = rows_of_images(found.files(), table, images)
    except ValueError as error:
        raise UsageError("dataset.path", path, f"{table} {error}") from error
    columns |= {name: Column([]) for name in found.header if name not in ("", found.file_column)}
    columns |= {
        name: Column([cells[row] for row in rows]) for name, cells in found.columns.items() if name in columns
    }
    return chosen_columns(columns, kinds, table)


def read_labels(path: Path, table: str, count: int | None, kept: Iterable[str]) -> TextTable:
    """Return a table in a folder or archive with its column of files and some others.

    Raises:
        FormatError: it is malformed, has no column of files, or is too large for `count` images, or for any (None).
    """
    most = untrusted.LARGEST if count is None else min(untrusted.LARGEST, LONGEST_ROW * (1 + count))
    data = read(path, table, most)
    return read_table(data, table, {*FILE_COLUMNS, *kept})

"""The classes of the images in a folder or ZIP archive: those of its `labels.csv`, or its folders."""

import csv
from collections import Counter
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple
from unicodedata import normalize

import torch
from torch import Tensor

from diffusion_cli.data.listing import MANIFEST
from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.system import untrusted as foreign

LABELS_CSV = "labels.csv"
LABEL_COLUMNS = ("file", "label")
TRAINING = {"train", "training"}
SPLITS = TRAINING | {"val", "valid", "validation", "dev", "test", "testing"}
MANY = 10
LONGEST_ROW = 2**13  # bytes: two of the longest paths that systems take


class Classes(NamedTuple):
    """The classes of some images."""

    names: tuple[str, ...] | None
    """In the order of the labels, or None without classes."""
    labels: Tensor | None
    """The class of each image, int64 [N], or None without classes."""
    remarks: tuple[str, ...] = ()
    """What a user should see about them, one line each."""
    missing: str = ""
    """Why there are none."""


def class_labels(
    path: Path,
    names: list[str],
    images: list[str],
    labels: Literal["auto", "folders", "csv", "none"],
    rules: int,
) -> Classes:
    """The classes of `images` by `labels`.

    `names` are all files below `path`. By version 1 of the `rules`, folders such as train and test
    are classes, and so are two folders whose names differ in their Unicode form only.

    Raises UsageError if `labels` is "csv" or "folders" and there are no classes, or if `labels.csv` is not what
    `csv_rows` and `csv_classes` accept.
    """
    if labels == "none":
        return Classes(None, None, missing="dataset.labels=none leaves them out")
    table = None if labels == "folders" else find_csv(names, images)
    found, inside = split_folders(images) if rules > 1 else ([], images)
    if table is not None:
        try:
            limit = min(foreign.LARGEST, LONGEST_ROW * (1 + len(images)))
            classes = csv_classes(csv_rows(read(path, table, limit)), table, images)
        except ValueError as error:
            raise UsageError("dataset.path", path, f"{table} {error}") from error
        if rules > 1:
            classes = in_one_form(classes)
            own = str(PurePosixPath(table).with_name(MANIFEST)) in names
            if labels == "auto" and not own and (missing := _measured(classes)):
                return Classes(
                    None, None, (f"dataset.path={path}: no classes, as {table} {missing}",), missing
                )
        return Classes(*numbered(classes, in_order(set(classes))), _few(path, classes))
    if labels == "csv":
        raise UsageError(
            "dataset.labels",
            "csv",
            f"there is no {LABELS_CSV} at the top of {path}",
            "write one with the columns file and label, or set folders or none",
        )
    classes = class_folders(inside)
    if classes is not None:
        if rules > 1:
            classes = in_one_form(classes)
        splits = (_of_splits(path, found),) if found else ()
        return Classes(*numbered(classes, sorted(set(classes))), (*splits, *_few(path, classes)))
    if labels == "folders":
        raise UsageError(
            "dataset.labels",
            "folders",
            f"the images of {path} do not all lie in two or more folders",
            "sort them into one folder a class, or set csv or none",
        )
    missing = _no_classes(inside)
    stray = (f"dataset.path={path}: no classes, as {missing}",) if missing else ()
    return Classes(None, None, stray, missing or f"there are no class folders and no {LABELS_CSV}")


def split_folders(images: list[str]) -> tuple[list[str], list[str]]:
    """The folders that divide images into splits, such as train and test, and the images as they lie in these.

    Without such folders the images are as they were. All images lie in folders called by the words of `SPLITS`, one of
    them by a word for training.
    """
    folders = [PurePosixPath(image).parts[:-1] for image in images]
    depth = common_depth(folders)
    tops = {folder[depth] if len(folder) > depth else "" for folder in folders}
    words = {top.lower() for top in tops}
    if len(tops) < 2 or not words <= SPLITS or not words & TRAINING:
        return [], images
    return sorted(tops), [str(PurePosixPath(*PurePosixPath(image).parts[depth + 1 :])) for image in images]


def in_one_form(classes: list[str]) -> list[str]:
    """The classes with one name for those that differ in their Unicode form only: the first in alphabetical order."""
    names: dict[str, str] = {}
    for name in sorted(set(classes)):
        names.setdefault(composed(name), name)
    return [names[composed(name)] for name in classes]


def _of_splits(path: Path, splits: list[str]) -> str:
    return (
        f"dataset.path={path}: the folders {', '.join(splits)} are splits, and the classes are the folders inside; "
        "images of all splits count, and dataset.val_fraction chooses among them; for one split give the path of its "
        "folder"
    )


def _measured(labels: list[str]) -> str:
    """Why labels are no classes: all are numbers, and not all of them whole; empty for others."""
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return ""
    parts = sorted({label for label, number in zip(labels, numbers, strict=True) if number % 1 > 0})
    if not parts:
        return ""
    some = examples(parts)
    return f"labels images with numbers such as {some}; set dataset.labels=csv to make each number a class, or none"


def _few(path: Path, labels: list[str]) -> tuple[str, ...]:
    """A line if there are more than `MANY` classes, of fewer than two images on average."""
    number = len(set(labels))
    if number <= MANY or len(labels) >= 2 * number:
        return ()
    line = f"{number} classes for {len(labels)} images leave little to learn of each; is label a class?"
    return (f"dataset.path={path}: {line} set dataset.labels=none for no classes",)


def _no_classes(images: list[str]) -> str:
    """Why images of which most lie in two or more folders have no classes; empty for other images."""
    folders = [PurePosixPath(image).parts[:-1] for image in images]
    depth = common_depth(folders)
    strays = [image for image, folder in zip(images, folders, strict=True) if len(folder) == depth]
    tops = sorted({folder[depth] for folder in folders if len(folder) > depth})
    if len(tops) < 2 or 2 * len(strays) >= len(images):
        return ""
    lie, them = ("lies", "it") if len(strays) == 1 else ("lie", "them")
    return (
        f"{examples(strays)} {lie} beside the folders {examples(tops)}; move {them} into class "
        "folders or away, or set dataset.labels=none"
    )


def composed(name: str) -> str:
    """The NFC form of a name: systems store one name in several Unicode forms, and names are compared in this one."""
    return normalize("NFC", name)


def numbered(classes: list[str], order: list[str]) -> tuple[tuple[str, ...], Tensor]:
    number = {name: label for label, name in enumerate(order)}
    return tuple(order), torch.tensor([number[name] for name in classes])


def in_order(names: set[str]) -> list[str]:
    """In numeric order if all are whole numbers, else in alphabetical order."""
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def class_folders(images: list[str]) -> list[str] | None:
    """For every image its class folder, or None unless all images lie in two or more."""
    folders = [PurePosixPath(image).parts[:-1] for image in images]
    depth = common_depth(folders)
    if any(len(folder) == depth for folder in folders):
        return None
    return [folder[depth] for folder in folders]


def common_depth(folders: list[tuple[str, ...]]) -> int:
    """How many levels of folders all have in common."""
    levels = enumerate(zip(*folders, strict=False))
    return next((depth for depth, level in levels if len(set(level)) > 1), min(map(len, folders)))


def find_csv(names: list[str], images: list[str]) -> str | None:
    """The name of the topmost `labels.csv` in a folder that holds all images, or None without one."""
    folders = [PurePosixPath(image).parts[:-1] for image in images]
    levels = range(common_depth(folders) + 1)
    places = [str(PurePosixPath(*folders[0][:depth], LABELS_CSV)) for depth in levels]
    return next((place for place in places if place in names), None)


def read(path: Path, name: str, limit: int = foreign.LARGEST) -> bytes:
    """The content of one file in a folder or ZIP archive; FormatError if it cannot be had, or is larger."""
    try:
        if path.is_dir():
            return foreign.read(path / name, limit)
        with foreign.Archive(path) as archive:
            return archive.read(name, limit)
    except (ValueError, OSError) as error:
        why = foreign.reason(error)
        raise FormatError(f"cannot be read ({why}); repair or remove it") from error


def csv_rows(data: bytes) -> list[tuple[str, str]]:
    """The columns `file` and `label` of a CSV file, without surrounding blanks; empty lines are skipped.

    Raises FormatError if it is not UTF-8 (with or without a byte-order mark), is no CSV, lacks a header
    line with each of the two columns once, or has rows longer than the header.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise FormatError(f"is not UTF-8 (line {line}: {error.reason}); save it as UTF-8") from error
    reader = csv.reader(StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        fields = [[field.strip() for field in row] for row in reader]
    except csv.Error as error:
        raise FormatError(f"is no CSV (line {reader.line_num}: {error}); repair it") from error
    header, *rows = [row for row in fields if any(row)] or [[]]
    if not header.count("file") == header.count("label") == 1:
        raise FormatError(
            f"needs a header line with one column file and one column label, and begins with "
            f"{','.join(header)[:80]!r}; write 'file,label' there, or set dataset.labels=folders or none"
        )
    long = [",".join(row)[:80] for row in rows if any(row[len(header) :])]
    if long:
        raise FormatError(f'has more fields than its header in {examples(long)}; put "..." around commas')
    padded = [row + [""] * len(header) for row in rows]
    return [(row[header.index("file")], row[header.index("label")]) for row in padded]


def csv_classes(rows: list[tuple[str, str]], table: str, images: list[str]) -> list[str]:
    """For every image the label in its row of the file `table`, relative to which rows name the images.

    Raises FormatError unless the rows name every image once, nothing else, and give each a label.
    """
    files = [image.removeprefix(table.removesuffix(LABELS_CSV)) for image in images]
    exact = set(files)
    one_form = {composed(file): file for file in files}
    rows = [(file if file in exact else one_form.get(composed(file), file), label) for file, label in rows]
    label_of = dict(rows)
    if unknown := [file for file, _ in rows if file not in exact]:
        raise FormatError(
            f"finds no image for {examples(unknown)}; remove these rows, or name images "
            f"as seen from the folder of {LABELS_CSV}, with /"
        )
    if repeated := [file for file, count in Counter(file for file, _ in rows).items() if count > 1]:
        raise FormatError(f"has more than one row for {examples(repeated)}; keep one row an image")
    if empty := [file for file, label in rows if not label]:
        raise FormatError(f"has no label for {examples(empty)}; fill in the column label")
    if missing := [file for file in files if file not in label_of]:
        raise FormatError(f"has no row for {examples(missing)}; add rows for them, or remove the images")
    return [label_of[file] for file in files]


def examples(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name[:80]) for name in names[:3]) + more

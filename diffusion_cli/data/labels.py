"""Class labels of image files: from a `labels.csv`, or from folders."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple
from unicodedata import normalize

import torch
from torch import Tensor

from diffusion_cli.data.listing import MANIFEST
from diffusion_cli.data.text_tables import read_table
from diffusion_cli.errors import FormatError, UsageError, examples
from diffusion_cli.system import untrusted

LABELS_CSV = "labels.csv"
LABEL_COLUMNS = ("file", "label")
TRAINING = {"train", "training"}
SPLITS = TRAINING | {"val", "valid", "validation", "dev", "test", "testing"}
MANY = 10
WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
LONGEST_ROW = 2**13  # bytes: twice the longest path of common systems


class Classes(NamedTuple):
    """Class names and labels of images."""

    names: tuple[str, ...] | None
    """Class names in label order, or None without classes."""
    labels: Tensor | None
    """Class of each image, int64 [N], or None without classes."""
    remarks: tuple[str, ...] = ()
    """Remarks for the user about the classes, one line each."""
    missing: str = ""
    """Reason why there are no classes."""


def class_labels(
    path: Path,
    names: list[str],
    images: list[str],
    labels: Literal["auto", "folders", "csv", "none"],
    rules: int,
) -> Classes:
    """Return the classes of image files.

    Args:
        path: the folder or archive.
        names: all files below `path`.
        images: those that are images.
        labels: source of the classes, as in `Folder`.
        rules: version of the data rules. In version 1, folders such as train and test are classes, and folders
            with names that differ only in Unicode form are different classes.

    Raises:
        UsageError: `labels` is "csv" or "folders" and there are no classes, or `labels.csv` is malformed or does not
            match the images.
    """
    if labels == "none":
        return Classes(None, None, missing="dataset.labels=none ignores them")
    table = None if labels == "folders" else find_csv(names, images)
    found, inside = split_folders(images) if rules > 1 else ([], images)
    if table is not None:
        try:
            limit = min(untrusted.LARGEST, LONGEST_ROW * (1 + len(images)))
            classes = csv_classes(csv_rows(read(path, table, limit)), table, images)
        except ValueError as error:
            raise UsageError("dataset.path", path, f"{table} {error}") from error
        if rules > 1:
            classes = in_one_form(classes)
            if labels == "auto" and not is_own(table, names) and (missing := _measured(classes)):
                return Classes(None, None, (f"dataset.path={path}: no classes: {table} {missing}",), missing)
        remarks = _few(path, classes)
        if labels == "auto" and not is_own(table, names):
            remarks = (*_whole_numbers(path, table, classes), *remarks)
        return Classes(*numbered(classes, in_order(set(classes))), remarks)
    if labels == "csv":
        raise UsageError(
            "dataset.labels",
            "csv",
            f"no {LABELS_CSV} at the top of {path}",
            "create it with the columns file and label, or use folders or none",
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
            f"the images of {path} are not all in two or more class folders",
            "sort them into one folder per class, or use csv or none",
        )
    missing = _no_classes(inside)
    stray = (f"dataset.path={path}: no classes: {missing}",) if missing else ()
    return Classes(None, None, stray, missing or f"there are no class folders and no {LABELS_CSV}")


def check_own_labels(labels: str, of: str) -> None:
    """Raise UsageError for a source of the classes of files, if the data bring their own classes."""
    if labels not in ("auto", "none"):
        raise UsageError("dataset.labels", labels, "applies to files", f"use auto or none for {of}")


def built_in_classes(
    size: int, labels: str, kinds: Collection[str], of: str
) -> tuple[tuple[str, ...], Tensor] | tuple[None, None]:
    """Return the names and labels of `size` generated images, whose kinds take turns; None for `none`."""
    check_own_labels(labels, of)
    return (None, None) if labels == "none" else (tuple(kinds), torch.arange(size) % len(kinds))


def split_folders(images: list[str]) -> tuple[list[str], list[str]]:
    """Return the folders that are splits, such as train and test, and the images relative to these folders.

    All images must lie in folders named by the words of `SPLITS`, at least one of them by a word for training.
    Otherwise there are no such folders, and the images are returned unchanged.
    """
    folders = [PurePosixPath(image).parts[:-1] for image in images]
    depth = common_depth(folders)
    tops = {folder[depth] if len(folder) > depth else "" for folder in folders}
    words = {top.lower() for top in tops}
    if len(tops) < 2 or not words <= SPLITS or not words & TRAINING:
        return [], images
    return sorted(tops), [str(PurePosixPath(*PurePosixPath(image).parts[depth + 1 :])) for image in images]


def in_one_form(classes: list[str]) -> list[str]:
    """Unify class names that differ only in Unicode form: use the first one in alphabetical order."""
    names: dict[str, str] = {}
    for name in sorted(set(classes)):
        names.setdefault(composed(name), name)
    return [names[composed(name)] for name in classes]


def _of_splits(path: Path, splits: list[str]) -> str:
    return (
        f"dataset.path={path}: the folders {', '.join(splits)} are splits, and those inside are the classes; "
        "images of all splits are used, and dataset.val_fraction chooses the validation images; for one split only, "
        "give the path of its folder"
    )


def _measured(labels: list[str]) -> str:
    """Return why labels are measurements, not classes: all are numbers, and some not integers; empty otherwise."""
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return ""
    parts = sorted({label for label, number in zip(labels, numbers, strict=True) if number % 1 > 0})
    if not parts:
        return ""
    some = examples(parts)
    return (
        f"has labels such as {some}; set dataset.label=label for a number, or dataset.labels=csv to make each number "
        "a class, or none"
    )


def is_own(table: str, names: Collection[str]) -> bool:
    """Return whether this program wrote a table beside its samples."""
    return str(PurePosixPath(table).with_name(MANIFEST)) in names


def _whole_numbers(path: Path, table: str, labels: list[str]) -> tuple[str, ...]:
    """Return a remark if all labels are integers, which may be meant as numbers."""
    classes = set(labels)
    if not all(WHOLE.fullmatch(label) for label in classes):
        return ()
    return (
        f"dataset.path={path}: {table} has {len(classes)} classes, one for each integer in the column label; "
        "dataset.label={label: number} makes it a number",
    )


def _few(path: Path, labels: list[str]) -> tuple[str, ...]:
    """Return the remark of `few_images` on the classes of a path."""
    return few_images(f"dataset.path={path}", len(set(labels)), len(labels), ", or set dataset.labels=none")


def few_images(key: str, classes: int, images: int, remedy: str = "") -> tuple[str, ...]:
    """Return a remark if there are more than `MANY` classes and fewer than two images per class on average."""
    if classes <= MANY or images >= 2 * classes:
        return ()
    line = f"{classes} classes for {images} images are too many to learn; check that the labels are classes"
    return (f"{key}: {line}{remedy}",)


def _no_classes(images: list[str]) -> str:
    """Return why images have no classes if most of them lie in two or more folders, but not all; empty otherwise."""
    folders = [PurePosixPath(image).parts[:-1] for image in images]
    depth = common_depth(folders)
    strays = [image for image, folder in zip(images, folders, strict=True) if len(folder) == depth]
    tops = sorted({folder[depth] for folder in folders if len(folder) > depth})
    if len(tops) < 2 or 2 * len(strays) >= len(images):
        return ""
    lie, them = ("lies", "it") if len(strays) == 1 else ("lie", "them")
    return (
        f"{examples(strays)} {lie} beside the class folders {examples(tops)}; move {them} into class "
        "folders or away, or set dataset.labels=none"
    )


def composed(name: str) -> str:
    """Return the NFC form of a name, in which names are compared: file systems store different Unicode forms."""
    return normalize("NFC", name)


def numbered(classes: list[str], order: list[str]) -> tuple[tuple[str, ...], Tensor]:
    number = {name: label for label, name in enumerate(order)}
    return tuple(order), torch.tensor([number[name] for name in classes])


def in_order(names: set[str]) -> list[str]:
    """Return the names in numeric order if all are integers, else in alphabetical order."""
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def class_folders(images: list[str]) -> list[str] | None:
    """Return the class folder of every image, or None unless all images lie in two or more folders."""
    folders = [PurePosixPath(image).parts[:-1] for image in images]
    depth = common_depth(folders)
    if any(len(folder) == depth for folder in folders):
        return None
    return [folder[depth] for folder in folders]


def common_depth(folders: list[tuple[str, ...]]) -> int:
    """Return the number of leading folders that all paths share."""
    levels = enumerate(zip(*folders, strict=False))
    return next((depth for depth, level in levels if len(set(level)) > 1), min(map(len, folders)))


def find_csv(names: list[str], images: list[str]) -> str | None:
    """Return the name of the topmost `labels.csv` in a folder that contains all images, or None."""
    return find_table(names, images, (LABELS_CSV,))


def find_table(names: list[str], images: list[str], tables: Sequence[str]) -> str | None:
    """Return the topmost of some tables in a folder that contains all images, the first of a folder; None without."""
    folders = [PurePosixPath(image).parts[:-1] for image in images]
    levels = range(common_depth(folders) + 1)
    there = set(names)
    places = (str(PurePosixPath(*folders[0][:depth], table)) for depth in levels for table in tables)
    return next((place for place in places if place in there), None)


def read(path: Path, name: str, limit: int = untrusted.LARGEST) -> bytes:
    """Return the content of a file in a folder or ZIP archive; FormatError if unreadable or larger than `limit`."""
    try:
        if path.is_dir():
            return untrusted.read(path / name, limit)
        with untrusted.Archive(path) as archive:
            return archive.read(name, limit)
    except (ValueError, OSError) as error:
        why = untrusted.reason(error)
        raise FormatError(f"cannot be read ({why}); repair or remove it") from error


def csv_rows(data: bytes) -> list[tuple[str, str]]:
    """Return the columns `file` and `label` of a CSV file, stripped of blanks; empty lines are skipped.

    Raises:
        FormatError: as `read_table`, or the header lacks one of the columns.
    """
    table = read_table(data, LABELS_CSV, LABEL_COLUMNS)
    if len(table.columns) < len(LABEL_COLUMNS):
        others = [name for name in table.header if name and name != "file"]
        choose = (
            f", or choose columns with dataset.label=[{','.join(others)[:80]}]"
            if "file" in table.columns
            else ""
        )
        raise FormatError(
            f"needs a header line with one column file and one column label, but begins with "
            f"{','.join(table.header)[:80]!r}; add 'file,label', or set dataset.labels=folders or none{choose}"
        )
    return [*zip(*(table.columns[name] for name in LABEL_COLUMNS), strict=True)]


def csv_classes(rows: list[tuple[str, str]], table: str, images: list[str]) -> list[str]:
    """Return the label of every image by the rows of `table`, which name images relative to its folder.

    Raises FormatError as `rows_of_images`, and for an image without a label.
    """
    chosen = rows_of_images([file for file, _ in rows], table, images)
    if empty := [file for file, label in (rows[row] for row in chosen) if not label]:
        raise FormatError(f"has no label for {examples(empty)}; complete the column label")
    return [rows[row][1] for row in chosen]


def rows_of_images(named: list[str], table: str, images: list[str]) -> list[int]:
    """Return the row of every image in a table, by the files that its rows name, relative to the folder of `table`.

    Raises FormatError unless the rows name every image exactly once and nothing else.
    """
    name = PurePosixPath(table).name
    files = [image.removeprefix(table.removesuffix(name)) for image in images]
    exact = set(files)
    one_form = {composed(file): file for file in files}
    named = [file if file in exact else one_form.get(composed(file), file) for file in named]
    row_of = {file: row for row, file in enumerate(named)}
    if unknown := [file for file in named if file not in exact]:
        raise FormatError(
            f"names files that do not exist: {examples(unknown)}; remove these rows, or name images relative to the "
            f"folder of {name}, with /"
        )
    if repeated := [file for file, count in Counter(named).items() if count > 1]:
        raise FormatError(f"has more than one row for {examples(repeated)}; keep one row per image")
    if missing := [file for file in files if file not in row_of]:
        raise FormatError(f"has no row for {examples(missing)}; add rows for them, or remove the images")
    return [row_of[file] for file in files]

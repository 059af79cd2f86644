"""Attributes of images: types and values of the columns of a table that a model is conditioned on."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffusion_cli.conditions import AttributeDescription
from diffusion_cli.conditions.condition import LABEL, is_missing
from diffusion_cli.conditions.description import LARGEST_NUMBER, RESERVED
from diffusion_cli.config.catalogue import did_you_mean
from diffusion_cli.data.labels import composed, few_images
from diffusion_cli.data.sources import ColumnSource, ConditionSource
from diffusion_cli.errors import Problem, UsageError, counted, examples

KEY = "dataset.label"
Kind = Literal["category", "yes_no", "number"]
Chosen = str | list[str] | dict[str, Kind] | None
"""Value of `dataset.label`: a column, columns, or columns with their types; None: the classes of the dataset."""
MISSING = frozenset(("", "na", "n/a", "nan", "null"))
"""Texts of a missing value, in lower case."""
YES_NO = {"no": 0, "false": 0, "yes": 1, "true": 1}
"""Texts of an attribute with yes and no, in lower case."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
DATE = re.compile(
    r"(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4})([T ].*)?", re.ASCII | re.DOTALL
)
INTEGER = re.compile(r"[+-]?\d+(\.0*)?", re.ASCII)
EXACT = 2**24
"""Number up to which float32 has all integers."""
NAMED = 3
"""Number of wrong cells that an error names."""
ROUNDED = "is an integer that float32 rounds", "are integers that float32 rounds"
ARE_NUMBERS = "is a number", "are numbers"
ALL_MISSING = "all values are missing", "complete the column, or leave it out"
WRONG: dict[str, tuple[str, str]] = {
    "number": ("is not a number", "are not numbers"),
    "yes_no": ("is neither yes nor no", "are neither yes nor no"),
    "category": ("is neither text nor number", "are neither texts nor numbers"),
}
"""Words for one cell and for several that a type does not have."""


class Column(NamedTuple):
    """Values of one column, a cell per image."""

    cells: Sequence[Any]
    """Texts, numbers, booleans or None; with `names`, class numbers from 0, and -1 or None for a missing one."""
    names: tuple[str, ...] | None = None
    """Names of the classes that the cells number; None for plain values."""


class Attributes(NamedTuple):
    """The chosen attributes of all images of a dataset."""

    descriptions: tuple[AttributeDescription, ...]
    values: Mapping[str, Tensor]
    """Values of each attribute: float32 or int64 [N]; a category named `label` is in `labels` alone."""
    class_names: tuple[str, ...] | None
    """Classes for metrics: the category named `label`, else the first category; None without any."""
    labels: Tensor | None
    """Class of each image, int64 [N], -1 where it is missing; None without classes."""
    remarks: tuple[str, ...]
    """Lines for the user: the types of the attributes, and what is probably not intended."""

    @property
    def missing_classes(self) -> str:
        """Reason why there are no classes; empty with classes."""
        return "" if self.class_names else f"{KEY} chooses no category"

    def labels_of(self, rows: Tensor) -> Tensor | None:
        """Return the classes of rows, int64 [B]; None without classes."""
        return None if self.labels is None else self.labels[rows]

    def sources(self, rows: Tensor) -> dict[str, ConditionSource]:
        """Return the sources of the conditions of some rows, by name."""
        return {name: ColumnSource(values[rows]) for name, values in self.values.items()}


def kinds_of(chosen: Chosen) -> dict[str, Kind | None]:
    """Return the chosen columns with their stated types, None for a type to infer.

    Raises:
        UsageError: no column is chosen, one is named twice, or has the name of another condition.
    """
    if isinstance(chosen, dict):
        kinds: dict[str, Kind | None] = {**chosen}
    else:
        names = [chosen] if isinstance(chosen, str) else chosen or []
        kinds = dict.fromkeys(names)
        if repeated := [name for name in kinds if names.count(name) > 1]:
            raise UsageError(KEY, repeated[0], "is named twice", "name it once")
    if not kinds:
        raise UsageError(KEY, chosen, "names no column", "name a column, or set null")
    if reserved := [name for name in kinds if name in RESERVED]:
        problem = "is the name of another condition"
        raise UsageError(KEY, reserved[0], problem, "rename the column")
    return kinds


def chosen_columns(columns: Mapping[str, Column], kinds: Mapping[str, Any], where: str) -> dict[str, Column]:
    """Return the chosen ones of the columns of a table; UsageError that names the others if one is missing."""
    if problems := [
        Problem(KEY, name, f"no such column in {where}", did_you_mean(name, [*columns]))
        for name in kinds
        if name not in columns
    ]:
        raise UsageError.several(problems)
    return {name: columns[name] for name in kinds}


def joined(parts: Sequence[Mapping[str, Column]]) -> dict[str, Column]:
    """Return the columns of several splits, one after the other; UsageError if the names of classes differ."""
    first, *others = parts
    for name, column in first.items():
        if any(other[name].names != column.names for other in others):
            raise UsageError(KEY, name, "has other classes in the validation split")
    return {
        name: Column([cell for part in parts for cell in part[name].cells], column.names)
        for name, column in first.items()
    }


def attributes(
    columns: Mapping[str, Column],
    kinds: Mapping[str, Kind | None],
    train: Tensor,
    title: Callable[[int], str],
) -> Attributes:
    """Return the values and descriptions of attributes.

    Numbers stay in their units. A column of numbers is a number, one of yes and no (or true and false) is yes or no,
    and one of other texts is a category with classes in alphabetical order. Numbers are classes, in numeric order,
    only if this type is stated. If one category alone is chosen, it is the class of the images, named `label`.

    Args:
        columns: the chosen columns.
        kinds: their stated types; None: inferred.
        train: rows of the training images, int64, for the range of numbers.
        title: returns the name of a row for errors.

    Raises:
        UsageError: values of a column contradict its type, are all missing, or all equal.
    """
    parsed: dict[str, _Parsed] = {}
    problems: list[Problem] = []
    for name, column in columns.items():
        try:
            parsed[name] = _parsed(name, column, kinds[name], train, title)
        except UsageError as error:
            problems += error.problems
    if problems:
        raise UsageError.several(problems)
    lines = [f"{KEY}: {'; '.join(each.line for each in parsed.values())}"]
    categories = [name for name, each in parsed.items() if each.description.kind == "category"]
    if len(parsed) == 1 and categories:
        (only,) = parsed.values()
        parsed = {LABEL: only._replace(description=only.description.model_copy(update={"name": LABEL}))}
        categories = [LABEL]
    chief = LABEL if LABEL in categories else next(iter(categories), None)
    for name in categories:
        names, labels = parsed[name].description.values, parsed[name].values
        lines += few_images(f"{KEY}={name}", len(names), int((labels >= 0).sum()))
    return Attributes(
        tuple(each.description for each in parsed.values()),
        {name: each.values for name, each in parsed.items() if not (name == LABEL and name in categories)},
        None if chief is None else parsed[chief].description.values,
        None if chief is None else parsed[chief].values,
        tuple(lines),
    )


class _Parsed(NamedTuple):
    """One attribute: its values, float32 or int64 [N], and a line about it."""

    description: AttributeDescription
    values: Tensor

    @property
    def line(self) -> str:
        count = int(is_missing(self.values).sum())
        return f"{self.description}{f' ({count} missing)' if count else ''}"


def _parsed(
    name: str, column: Column, stated: Kind | None, train: Tensor, title: Callable[[int], str]
) -> _Parsed:
    """Return one attribute; UsageError as `attributes`."""
    if column.names is not None:
        return _of_classes(name, column.cells, column.names, stated)
    cells = [plain_cell(value) for value in column.cells]
    rows = [row for row, cell in enumerate(cells) if cell is not None]
    if not rows:
        raise UsageError(KEY, name, *ALL_MISSING)
    kind = stated or _inferred(name, cells, rows, title)
    values = {row: PARSERS[kind](cells[row]) for row in rows}
    if wrong := [row for row, value in values.items() if value is None]:
        shown = name if stated is None else f"{{{name}: {stated}}}"
        remedy = "correct them" if stated is None else "correct them, or state another type"
        raise UsageError(KEY, shown, _rows(wrong, WRONG[kind], cells, title), remedy)
    if len({*values.values()}) == 1:
        raise UsageError(KEY, name, f"has one value only, {str(cells[rows[0]])[:40]!r}", "leave it out")
    if kind == "number":
        return _numbers(name, cells, values, train, title)
    names = ("no", "yes") if kind == "yes_no" else _in_order({*values.values()})
    index = {value: number for number, value in enumerate((0, 1) if kind == "yes_no" else names)}
    labels = torch.full((len(cells),), -1)
    labels[rows] = torch.tensor([index[value] for value in values.values()])
    return _Parsed(AttributeDescription(name=name, kind=kind, values=names), labels)


def _numbers(
    name: str,
    cells: Sequence[Any],
    values: Mapping[int, float],
    train: Tensor,
    title: Callable[[int], str],
) -> _Parsed:
    """Return the attribute of numbers by row.

    Raises:
        UsageError: float32 rounds an integer, or the numbers of the training images are missing or equal.
    """
    numbers = torch.full((len(cells),), math.nan)
    numbers[[*values]] = torch.tensor([*values.values()], dtype=torch.float32)
    stored = zip(values, numbers[[*values]].tolist(), strict=True)
    if rounded := [row for row, number in stored if _is_rounded(cells[row], number)]:
        remedy = "subtract or divide, so that they are smaller"
        raise UsageError(
            KEY,
            name,
            _rows(rounded, ROUNDED, cells, title),
            f"{remedy}, or state {_stating(name, 'category')}",
        )
    seen = numbers[train][~is_missing(numbers[train])].unique()
    if len(seen) < 2:
        found = f"one value only, {seen.item():.6g}" if len(seen) else "no value"
        raise UsageError(
            KEY, name, f"has {found} in the training images", "complete the column, or leave it out"
        )
    low, high = seen.min().item(), seen.max().item()
    return _Parsed(AttributeDescription(name=name, kind="number", low=low, high=high), numbers)


def _of_classes(name: str, cells: Sequence[Any], names: tuple[str, ...], stated: Kind | None) -> _Parsed:
    """Return the attribute of a column of class numbers with their names."""
    if stated not in (None, "category"):
        problem = f"has class names such as {names[0]!r:.80}, so it is a category, not {stated}"
        raise UsageError(KEY, name, problem, "leave out its type")
    labels = torch.tensor([-1 if cell is None else int(cell) for cell in cells])
    if not (labels >= 0).any():
        raise UsageError(KEY, name, *ALL_MISSING)
    return _Parsed(AttributeDescription(name=name, kind="category", values=names), labels)


def plain_cell(value: Any) -> Any:
    """Return a cell as a stripped text, a number or a boolean; None if it is missing."""
    if isinstance(value, str):
        text = composed(value.strip())
        return None if text.lower() in MISSING else text
    return None if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _inferred(name: str, cells: Sequence[Any], rows: Sequence[int], title: Callable[[int], str]) -> Kind:
    """Return the type of a column without a stated one; UsageError if some of its values are numbers."""
    if all(_yes_no(cells[row]) is not None and _number(cells[row]) is None for row in rows):
        return "yes_no"
    numbers = [row for row in rows if _number(cells[row]) is not None]
    others = [row for row in rows if _number(cells[row]) is None]
    if not others:
        return "number"
    dates = [str(cells[row]) for row in others if DATE.fullmatch(str(cells[row]))]
    if dates and len(dates) == len(others):
        remedy = "write numbers, such as years, or days since the first date"
        if isinstance(cells[others[0]], str):
            remedy += f", or state {_stating(name, 'category')}"
        raise UsageError(KEY, name, f"has dates such as {examples(dates[:1])}", remedy)
    commas = [str(cells[row]) for row in others if DECIMAL_COMMA.fullmatch(str(cells[row]))]
    if commas and len(commas) == len(others):
        problem = f"has a decimal comma in {examples(commas)}"
        raise UsageError(
            KEY, name, problem, f"write numbers with a point, or state {_stating(name, 'category')}"
        )
    if numbers:
        few, are = (others, WRONG["number"]) if len(others) <= len(numbers) else (numbers, ARE_NUMBERS)
        raise UsageError(
            KEY, name, f"{_rows(few, are, cells, title)}, unlike the others",
            f"correct them, or state {_stating(name, 'category')}",
        )  # fmt: skip
    return "category"


def _rows(
    rows: Sequence[int], words: tuple[str, str], cells: Sequence[Any], title: Callable[[int], str]
) -> str:
    """Return how many rows are wrong, with examples, such as: 3 rows are not numbers: 'old' in a.png, ..."""
    shown = ", ".join(f"{str(cells[row])[:40]!r} in {title(row)}" for row in rows[:NAMED])
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f"{counted(len(rows), 'row')} {words[len(rows) > 1]}: {shown}{more}"


def _stating(name: str, kind: Kind) -> str:
    return f"{KEY}={{{name}: {kind}}}"


def _number(cell: Any) -> float | None:
    """Return a cell as a number of at most 1e37; None if it is none."""
    if isinstance(cell, str) and not NUMBER.fullmatch(cell):
        return None
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        return None
    try:
        number = float(cell)
    except OverflowError:
        return None
    return number if abs(number) <= LARGEST_NUMBER else None


def _is_rounded(cell: Any, stored: float) -> bool:
    """Return whether a cell is an integer, also one written as a decimal, and not the stored number."""
    if abs(stored) < EXACT:
        return False
    whole = bool(INTEGER.fullmatch(cell)) if isinstance(cell, str) else isinstance(cell, int)
    # All numbers above 2**53 that Python has are integers, also measurements.
    whole |= isinstance(cell, float) and cell.is_integer() and abs(cell) <= 2**53
    return whole and Decimal(cell) != Decimal(stored)


def _yes_no(cell: Any) -> int | None:
    """Return 1 for yes, true and 1, and 0 for no, false and 0; None for others."""
    if isinstance(cell, bool):
        return int(cell)
    if isinstance(cell, str) and cell.lower() in YES_NO:
        return YES_NO[cell.lower()]
    number = _number(cell)
    return int(number) if number in (0, 1) else None


def category_name(cell: Any) -> str | None:
    """Return the name of a class; None for lists and mappings."""
    if isinstance(cell, bool):
        return str(cell).lower()
    return str(cell) if isinstance(cell, str | int | float) else None


def _in_order(names: set[str]) -> tuple[str, ...]:
    """Return class names in numeric order if all are numbers, else in alphabetical order."""
    if all(_number(name) is not None for name in names):
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    return tuple(sorted(names))


PARSERS: dict[Kind, Callable[[Any], Any]] = {"number": _number, "yes_no": _yes_no, "category": category_name}
"""Functions that return the value of a cell; None for a cell that the type does not have."""

"""Conditions as plain data: one mapping of names to values for each image, as users write and files store them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_cli.conditions.condition import TEXT, Condition, is_missing
from diffusion_cli.conditions.description import LARGEST_NUMBER, AttributeDescription, Conditions
from diffusion_cli.errors import FormatError

LONGEST_NAME = 28  # characters of a text in the name of a row
FEWEST_SPREAD, MOST_SPREAD = 100, 2**15
"""Smallest and largest number of rows of `spread_rows` with several attributes; more values in turn have a row each."""
FEWEST_ROUNDS = 8
"""Smallest number of rows for each value in turn, unless they are more than `MOST_SPREAD` together."""
Row = dict[str, Any]
"""Values of one image: the name of a category, "yes" or "no", a number, or a text. A name that is absent is missing."""
Encode = Callable[[Sequence[str]], Tensor]
"""Encodes texts as tokens, int64 [B, L], or as features, float32 [B, L, D]."""


class ConditionRows(Protocol):
    """Conditions by row, such as a `Condition`."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def rows(self, index: Tensor) -> Condition:
        """Return the condition of rows, int64 [B]."""
        ...

    def get(self, name: str) -> Tensor | None:
        """Return the values of a name in all rows, or None if they are not at hand."""
        ...


def in_turn(numbers: Sequence[int], count: int) -> Tensor:
    """Return the row of each image if `count` rows are repeated: number mod count, int64 [B]."""
    return torch.tensor([number % count for number in numbers], dtype=torch.int64)


def attributes_of(
    condition: ConditionRows, index: Tensor, attributes: Sequence[AttributeDescription]
) -> Condition:
    """Return the attributes of rows, int64 [B], without texts and images."""
    columns = {attribute.name: condition.get(attribute.name) for attribute in attributes}
    return Condition({name: column[index] for name, column in columns.items() if column is not None})


def encoded_rows(rows: Sequence[Row], conditions: Conditions, encode: Encode | None = None) -> Condition:
    """Return the condition of some rows.

    Args:
        rows: values of the B images.
        conditions: description of the values.
        encode: encoder of texts; needed if a row has a text.

    Returns:
        The condition with all described attributes, and with the text if one is described; without the image.
    """
    values = {attribute.name: _column(rows, attribute) for attribute in conditions.attributes}
    if conditions.text is not None and encode is not None:
        values[TEXT] = _texts([row.get(TEXT) for row in rows], encode)
    return Condition(values)


def attribute_rows(condition: Condition, attributes: Sequence[AttributeDescription]) -> list[Row]:
    """Return the attributes of each image of a condition, as `encoded_rows` takes them; missing values are absent."""
    rows: list[Row] = [{} for _ in range(len(condition))]
    for attribute in attributes:
        value = condition.values[attribute.name]
        for row, number, missing in zip(rows, value.tolist(), is_missing(value).tolist(), strict=True):
            if not missing:
                row[attribute.name] = number if attribute.kind == "number" else attribute.values[number]
    return rows


def spread_rows(attributes: Sequence[AttributeDescription]) -> list[Row]:
    """Return rows that cover the values of all attributes evenly.

    The first category has its values in turn. Of the d other attributes, number j = 1..d has in round m of value k the
    fraction `(1/2 + m / g^j + k j sqrt(2)) mod 1` of its range, where `g^(d+1) = g + 1`: a Kronecker sequence
    of low discrepancy for each value of the category, from another start.

    Args:
        attributes: descriptions of the attributes.

    Returns:
        A multiple of the number of values in turn; with other attributes at least 100 rows, and 8 for each such value.

    Source: Roberts 2018, "The unreasonable effectiveness of quasirandom sequences".
    """
    turn = next((attribute for attribute in attributes if attribute.kind == "category"), None)
    others = [attribute for attribute in attributes if attribute is not turn]
    period = 1 if turn is None else len(turn.values)
    ratio = _ratio(len(others))
    rows: list[Row] = []
    for around in range(_rounds(period, len(others))):
        for number in range(period):
            row: Row = {} if turn is None else {turn.name: turn.values[number]}
            for place, attribute in enumerate(others, start=1):
                fraction = (0.5 + around / ratio**place + number * place * math.sqrt(2)) % 1
                row[attribute.name] = _at(attribute, fraction)
            rows.append(row)
    return rows


def texts_of_rows(rows: Sequence[Row]) -> list[str | None] | None:
    """Return the text of each row, None for a row without; None if no row has one."""
    texts = [row.get(TEXT) for row in rows]
    return texts if any(text is not None for text in texts) else None


def known_rows(rows: Sequence[Row], attributes: Sequence[AttributeDescription]) -> list[Row]:
    """Return rows without the values that these attributes cannot have; texts stay."""
    known = {attribute.name: attribute for attribute in attributes}
    return [
        {
            name: value
            for name, value in row.items()
            if name == TEXT or (name in known and _is_possible(known[name], value))
        }
        for row in rows
    ]


def rows_of_texts(
    columns: Mapping[str, Sequence[str]], attributes: Sequence[AttributeDescription]
) -> list[Row]:
    """Return rows in columns of texts, such as those of a table in CSV, by name; an empty cell is a missing value.

    Raises:
        FormatError: a number is malformed.
    """
    used = [TEXT, *(attribute.name for attribute in attributes)]
    numbers = {attribute.name for attribute in attributes if attribute.kind == "number"}
    rows: list[Row] = [{} for _ in next(iter(columns.values()), ())]
    for name in used:
        for row, cell in zip(rows, columns.get(name, ()), strict=False):
            if cell:
                row[name] = _number(name, cell) if name in numbers else cell
    return rows


def row_name(row: Row, attributes: Sequence[AttributeDescription]) -> str:
    """Return the name of a row, such as "frog, age 20, no glasses"; a long text is cut."""
    names = [_named(attribute, row[attribute.name]) for attribute in attributes if attribute.name in row]
    text = str(row.get(TEXT, ""))
    names += (
        [text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 3].rstrip()}..."] if text else []
    )
    return ", ".join(names) or "none"


def are_rows(value: Any) -> bool:
    """Return whether plain data, possibly of an untrusted file, is a list of rows."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(row, Mapping) and all(map(_is_value, row.items())) for row in value)
    )


def _is_value(item: tuple[Any, Any]) -> bool:
    name, value = item
    is_number = type(value) in (int, float) and abs(value) <= LARGEST_NUMBER
    return isinstance(name, str) and (isinstance(value, str) or is_number)


def _number(name: str, cell: str) -> float:
    """Return the number in a cell of a table; FormatError for other texts."""
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not abs(number) <= LARGEST_NUMBER:
        raise FormatError(f"has {cell[:40]!r} in the column {name}, which is no number; repair it")
    return number


def _is_possible(attribute: AttributeDescription, value: Any) -> bool:
    return not isinstance(value, str) if attribute.kind == "number" else value in attribute.values


def _column(rows: Sequence[Row], attribute: AttributeDescription) -> Tensor:
    """Return the values of an attribute in some rows, [B]."""
    found = [row.get(attribute.name) for row in rows]
    if attribute.kind == "number":
        return torch.tensor([math.nan if value is None else float(value) for value in found])
    places = {name: place for place, name in enumerate(attribute.values)}
    return torch.tensor([-1 if value is None else places[value] for value in found])


def _texts(texts: Sequence[str | None], encode: Encode) -> Tensor:
    """Return encoded texts; those that are None are missing."""
    given = list(dict.fromkeys(text for text in texts if text is not None)) or [""]
    places = {text: place for place, text in enumerate(given)}
    value = encode(given)[torch.tensor([places[text] if text is not None else 0 for text in texts])]
    missing = torch.tensor([text is None for text in texts])
    return Condition({TEXT: value}).dropped(where=missing).values[TEXT]


def _rounds(period: int, others: int) -> int:
    """Return the number of rows of each of `period` values in turn, beside a number of other attributes."""
    if not others:
        return 1
    # The slowest attribute needs about 1.44 (others + 1) rounds to pass its whole range.
    wanted = max(math.ceil(FEWEST_SPREAD / period), FEWEST_ROUNDS, 2 * (others + 1))
    return max(1, min(wanted, MOST_SPREAD // period))


def _ratio(count: int) -> float:
    """Return the root g > 1 of g^(count + 1) = g + 1."""
    ratio = 2.0
    for _ in range(64):
        ratio = (1 + ratio) ** (1 / (count + 1))
    return ratio


def _at(attribute: AttributeDescription, fraction: float) -> str | float:
    """Return the value of an attribute at a fraction of its range."""
    if attribute.kind == "number":
        return attribute.low + fraction * (attribute.high - attribute.low)
    return attribute.values[int(fraction * len(attribute.values))]


def _named(attribute: AttributeDescription, value: Any) -> str:
    if attribute.kind == "number":
        return f"{attribute.name} {value:.4g}"
    if attribute.kind == "yes_no":
        return attribute.name if value == attribute.values[1] else f"no {attribute.name}"
    return str(value)

"""Read the conditions of samples from `label=`, `prompt=` and `prompts=`: one row of values for each image in turn."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

from diffusion_cli.commands.class_labels import class_number, class_place
from diffusion_cli.conditions.condition import IMAGE, LABEL, TEXT
from diffusion_cli.conditions.description import LARGEST_NUMBER, AttributeDescription
from diffusion_cli.conditions.rows import Row, spread_rows
from diffusion_cli.config import did_you_mean
from diffusion_cli.config.mapping_words import NUMBER
from diffusion_cli.config.values import LONGEST_PROMPT, Label
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError, counted, examples, format_value
from diffusion_cli.runs.schema import CheckpointInfo
from diffusion_cli.system.untrusted import read, reason

MOST_ROWS = 100_000
"""Most rows of values that a command takes."""
LONGEST_FILE = 2**24  # bytes of a file of prompts, which the manifest repeats
YES = ("yes", "true", "1")
NO = ("no", "false", "0")


def rows_of_label(label: Label, attributes: Sequence[AttributeDescription]) -> list[Row]:
    """Return the rows that `label=` asks for; no rows for no label.

    A mapping with lists gives all combinations, the last name the fastest. `all` gives the values of all attributes
    evenly. A value without a name is the class, or the only attribute.

    Args:
        label: value of `label=`; not null.
        attributes: descriptions of the attributes of the model.

    Raises:
        UsageError: for an unknown attribute or value, or too many rows.
    """
    if label == []:
        return []
    if label in ("none", "all") and not is_class(label, attributes):
        return rows_of_word("all" if label == "all" else "none", attributes)
    rows: list[Row] = []
    for item in label if isinstance(label, list) else [label]:
        named = item if isinstance(item, Mapping) else {_only(item, attributes): item}
        rows += _combinations(named, attributes)
        if len(rows) > MOST_ROWS:
            raise UsageError("label", NO_VALUE, f"gives more than {MOST_ROWS} rows", "use fewer values")
    return rows


def rows_of_word(word: Literal["all", "none"], attributes: Sequence[AttributeDescription]) -> list[Row]:
    """Return the rows of `all`, values of all attributes evenly, or those of `none`, no rows."""
    return spread_rows(attributes) if word == "all" else []


def is_class(label: Label, attributes: Sequence[AttributeDescription]) -> bool:
    """Return whether a value without a name is a class, or a category of the only attribute."""
    attribute = _unnamed(attributes)
    return (
        isinstance(label, str) and attribute is not None and class_place(label, attribute.values) is not None
    )


def about(key: str, error: UsageError) -> UsageError:
    """Return an error of `rows_of_label` as one of the key that has the values."""
    names = {problem.key: str(problem.key) for problem in error.problems}
    return error.renamed(
        {each: key + name.removeprefix(LABEL) for each, name in names.items() if name.startswith(LABEL)}
    )


def read_prompts(path: str) -> list[str]:
    """Return the prompts in the lines of a file; empty lines are left out.

    Raises UsageError for a file that is missing, too large, empty or not UTF-8, or has too many or too long lines.
    """
    file = Path(path).expanduser()
    try:
        text = read(file, LONGEST_FILE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError("prompts", path, f"not UTF-8 in line {line}", "save it as UTF-8") from error
    except (FormatError, OSError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise UsageError("prompts", path, why, "give a text file with one prompt in each line") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UsageError("prompts", path, "has no text", "write one prompt in each line")
    if len(prompts) > MOST_ROWS:
        raise UsageError("prompts", path, f"has more than {MOST_ROWS} prompts", "split it into several files")
    if any(len(prompt) > LONGEST_PROMPT for prompt in prompts):
        raise UsageError(
            "prompts", path, f"has a line of more than {LONGEST_PROMPT} characters", "shorten it"
        )
    return prompts


def with_prompts(rows: Sequence[Row], prompts: Sequence[str]) -> list[Row]:
    """Return rows of attributes together with prompts, each in turn.

    Raises UsageError if one number is not a multiple of the other.
    """
    if not rows or not prompts:
        return [*rows] or [{TEXT: prompt} for prompt in prompts]
    count = max(len(rows), len(prompts))
    if count % len(rows) or count % len(prompts):
        problem = f"{counted(len(prompts), 'prompt')} for {counted(len(rows), 'row')} of label="
        raise UsageError("prompt", NO_VALUE, problem, "make one number a multiple of the other")
    return [rows[at % len(rows)] | {TEXT: prompts[at % len(prompts)]} for at in range(count)]


def outside_of_training(rows: Sequence[Row], attributes: Sequence[AttributeDescription]) -> list[str]:
    """Return a remark for each number that has values outside the range of the training images."""
    remarks: list[str] = []
    for attribute in attributes:
        found = {row[attribute.name] for row in rows if attribute.name in row}
        if attribute.kind != "number":
            continue
        outside = sorted(value for value in found if not attribute.low <= value <= attribute.high)
        if outside:
            shown = examples([f"{value:.6g}" for value in outside]).replace("'", "")
            remarks.append(
                f"label.{attribute.name}={shown}: outside the range of the training images, "
                f"{attribute.low:.6g} to {attribute.high:.6g}; the samples are arbitrary"
            )
    return remarks


def never_left_out(rows: Iterable[Row], info: CheckpointInfo) -> list[str]:
    """Return a remark if rows lack single values that the network always got together with others.

    Rows without any value are those of training by `objective.label_dropout`. The image is left out: only the command
    knows whether it is given.
    """
    if info.conditions is None or info.dropouts.alone > 0:
        return []
    learned = {*info.missing_conditions, IMAGE}
    names = [name for name in info.conditions.names if name not in learned]
    given = [{name for name, value in row.items() if value != ""} for row in rows]
    lacking = [name for name in names if any(row and name not in row for row in given)]
    if not lacking:
        return []
    keys = [{TEXT: "prompt", LABEL: LABEL}.get(name, f"label.{name}") for name in lacking]
    return [
        f"{', '.join(keys)}: left out, but in training all conditions came together (objective.single_dropout=0); the "
        "samples are arbitrary"
    ]


def _only(value: Any, attributes: Sequence[AttributeDescription]) -> str:
    """Return the attribute that a value without a name is for."""
    if (attribute := _unnamed(attributes)) is not None:
        return attribute.name
    names = [attribute.name for attribute in attributes]
    fitting = next((attribute.name for attribute in attributes if _is_of(attribute, value)), None)
    pair = f"{names[0]}: <value>" if fitting is None else f"{fitting}: {format_value(value)}"
    raise UsageError(
        "label", value, f"the model has the attributes {', '.join(names)}", f"write label={{{pair}}}"
    )


def _unnamed(attributes: Sequence[AttributeDescription]) -> AttributeDescription | None:
    """Return the attribute that values without a name are for: the class, or the only one; None without."""
    if len(attributes) == 1:
        return attributes[0]
    return next((attribute for attribute in attributes if attribute.name == LABEL), None)


def _is_of(attribute: AttributeDescription, value: Any) -> bool:
    """Return whether a value is one of an attribute."""
    try:
        _value(attribute, value)
    except UsageError:
        return False
    return True


def _combinations(named: Mapping[str, Any], attributes: Sequence[AttributeDescription]) -> list[Row]:
    """Return the rows of a mapping: all combinations of the values in its lists."""
    known = {attribute.name: attribute for attribute in attributes}
    unknown = [name for name in named if name not in known]
    if unknown:
        remedy = did_you_mean(unknown[0], [*known])
        raise UsageError(f"label.{unknown[0]}", NO_VALUE, "the model has no such attribute", remedy)
    columns = [
        [_value(known[name], value) for value in (values if isinstance(values, list) else [values])]
        for name, values in named.items()
    ]
    if empty := [name for name, column in zip(named, columns, strict=True) if not column]:
        raise UsageError(f"label.{empty[0]}", "[]", "has no values", "give one, or leave it out")
    if math.prod(map(len, columns)) > MOST_ROWS:
        raise UsageError("label", NO_VALUE, f"gives more than {MOST_ROWS} rows", "use fewer values")
    return [
        {name: value for name, value in zip(named, values, strict=True) if value is not None}
        for values in product(*columns)
    ]


def _value(attribute: AttributeDescription, value: Any) -> str | float | None:
    """Return a value of an attribute: a category or "yes" or "no" by name, or a number; None for a missing one."""
    key = "label" if attribute.name == "label" else f"label.{attribute.name}"
    if value is None or (value == "null" and "null" not in attribute.values):
        return None
    if attribute.kind == "number":
        return _number(key, value)
    if attribute.kind == "yes_no":
        word = format_value(value).lower()
        if word not in YES + NO:
            raise UsageError(key, value, "must be yes or no")
        return attribute.values[word in YES]
    return attribute.values[class_number(format_value(value), attribute.values, key)]


def _number(key: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, str) and NUMBER.fullmatch(value.strip())):
        raise UsageError(key, value, "must be a number")
    if not abs(float(value) if isinstance(value, str) else value) <= LARGEST_NUMBER:
        raise UsageError(key, value, "must be a number from -1e37 to 1e37")
    return float(value)

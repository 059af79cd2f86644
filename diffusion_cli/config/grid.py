"""From lists of values on a command line to a configuration for each of their combinations."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from diffusion_cli.config.compose import parse
from diffusion_cli.config.key_types import takes_one
from diffusion_cli.config.loading import load
from diffusion_cli.config.mapping_words import NUMBER, is_of_label
from diffusion_cli.config.schema import Config
from diffusion_cli.config.typed import as_shown, as_typed
from diffusion_cli.errors import NO_VALUE, Problem, UsageError, format_value

Value = str | int | float | bool | None


class Variant(NamedTuple):
    """One point of a grid."""

    values: dict[str, Value]
    """Its value on each axis, by key, in the order written."""
    config: Config


class _Axis(NamedTuple):
    """A list of values for a key that takes one."""

    key: str
    values: list[Value]
    overrides: list[str]
    """`key=value` for each of the values."""


def load_grid(command: str, overrides: Sequence[str], dirs: Sequence[Path] = ()) -> list[Variant]:
    """The configurations of all combinations of the lists given for keys that take one value, the last the fastest.

    Raises UsageError with those of all variants at once, and for lists that are empty or name a value twice.
    """
    overrides = as_typed(command, overrides, dirs, lists=True)
    singles = [text for text in overrides if takes_one(command, _key(text), overrides, dirs)]
    axes = {axis.key: axis for axis in map(_axis, singles) if axis is not None}
    mistakes = [line for axis in axes.values() for line in _wrong(axis, overrides)]
    fixed = [text for text in overrides if _key(text) not in axes]
    filled = [axis for axis in axes.values() if axis.values]
    variants: list[Variant] = []
    for point in product(*(range(len(axis.values)) for axis in filled)):
        places = list(zip(filled, point, strict=True))
        try:
            config = load(command, [*fixed, *(axis.overrides[place] for axis, place in places)], dirs)
        except UsageError as found:
            mistakes += found.problems
        else:
            variants.append(Variant({axis.key: axis.values[place] for axis, place in places}, config))
    if mistakes:
        raise UsageError.several(mistakes)
    return variants


def _key(text: str) -> str:
    return text.partition("=")[0]


def _axis(text: str) -> _Axis | None:
    """The axis that an override with a list writes, or None for another one."""
    try:
        item = parse(text)
    except UsageError:  # `load` reports it
        return None
    values = None if item.is_sweep_override() else item.value()
    if not isinstance(values, list):
        return None
    key = item.key_or_group
    listed = item.get_value_element_as_str()[1:-1]
    several = len(values) > 1
    words = parse(f"{key}={listed}").sweep_string_iterator() if several else [listed] * len(values)
    overrides = [f"{key}={word}" for word in words]
    return _Axis(key, list(map(_number, values)) if is_of_label(key) else values, overrides)


def _number(value: Value) -> Value:
    """A value of an attribute, which is text on a command line, as a number if it spells one."""
    if not isinstance(value, str) or not NUMBER.fullmatch(value):
        return value
    return int(value) if value.lstrip("+-").isdecimal() else float(value)


def _wrong(axis: _Axis, overrides: Sequence[str]) -> list[Problem]:
    """What is wrong with an axis, apart from its values."""
    written = [as_shown(text) for text in overrides if _key(text) == axis.key]
    twice = [value for value in axis.values if axis.values.count(value) > 1]
    if len(written) > 1:
        return [Problem(written[-1], NO_VALUE, f"{axis.key} is given twice", "write one list")]
    if twice:
        return [Problem(written[0], NO_VALUE, f"contains {format_value(twice[0])} twice", "leave one out")]
    return [] if axis.values else [Problem(written[0], NO_VALUE, "is empty", "give at least one value")]

"""From lists of values on a command line to a configuration for each of their combinations."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml

from diffusion_cli.config.catalogue import chosen, defaults, lineage, options
from diffusion_cli.config.compose import load, parse
from diffusion_cli.config.runs import flatten
from diffusion_cli.config.schema import COMMANDS, Config
from diffusion_cli.config.signature import signature
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
    singles = [text for text in overrides if _takes_one(command, _key(text), overrides, dirs)]
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
    return _Axis(key, values, [f"{key}={word}" for word in words])


def _wrong(axis: _Axis, overrides: Sequence[str]) -> list[Problem]:
    """What is wrong with an axis, apart from its values."""
    written = [text for text in overrides if _key(text) == axis.key]
    twice = [value for value in axis.values if axis.values.count(value) > 1]
    if len(written) > 1:
        return [Problem(written[-1], NO_VALUE, f"{axis.key} is given twice", "write one list")]
    if twice:
        return [Problem(written[0], NO_VALUE, f"names {format_value(twice[0])} twice", "leave one out")]
    return [] if axis.values else [Problem(written[0], NO_VALUE, "is empty", "give at least one value")]


def _takes_one(command: str, key: str, overrides: Sequence[str], dirs: Sequence[Path]) -> bool:
    """Whether a key is known, and takes one value rather than a list."""
    groups = defaults(command)
    if key in groups:
        return not isinstance(groups[key], list)
    kinds = _kinds(command, key, overrides, dirs)
    return bool(kinds) and not any(map(_takes_list, kinds))


def _kinds(command: str, key: str, overrides: Sequence[str], dirs: Sequence[Path]) -> list[Any]:
    """The types of a key: the schema's, or those in the chosen options that have it."""
    node, _, argument = key.rpartition(".")
    fields = COMMANDS[command].model_fields
    if not node:
        return [fields[key].annotation] if key in fields else []
    group = key.partition(".")[0]
    option = chosen(command, overrides, dirs).get(group)
    names = option if isinstance(option, list) else [option]
    files = (options(group, dirs).get(str(name)) for name in names)
    types = [_arguments(file, node) for file in files if file is not None]
    return [arguments[argument] for arguments in types if argument in arguments]


def _arguments(file: Path, node: str) -> dict[str, Any]:
    """The types of the arguments of a node, such as `metric.fid`, by name, as an option file has it."""
    content: dict[str, Any] = {}
    for part in lineage(file):
        content |= flatten(yaml.safe_load(part.read_text()) or {})
    # Files of the global package write the key of a node in full, others from their group on.
    full = f"{node}._target_"
    target = content.get(full) or content.get(full.partition(".")[2], "")
    return signature(target) or {}


def _takes_list(kind: Any) -> bool:
    return get_origin(kind) is list or kind is list or any(map(_takes_list, get_args(kind)))

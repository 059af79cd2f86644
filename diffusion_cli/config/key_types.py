"""Types of configuration keys, read without importing the classes that have them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from diffusion_cli.config import libraries
from diffusion_cli.config.catalogue import Choice, chosen, content, defaults, lineage, options
from diffusion_cli.config.mapping_words import LABEL, is_of_label
from diffusion_cli.config.runs import flatten
from diffusion_cli.config.schema import COMMANDS, GRIDS, SlurmConfig
from diffusion_cli.config.signature import arguments
from diffusion_cli.config.values import CLASS_KEYS, TEXT_KEYS, Class

MAPPINGS = frozenset((dict, Mapping, Any))


def takes_one(command: str, key: str, overrides: Sequence[str], dirs: Sequence[Path]) -> bool:
    """Return whether a key or a group is known and has one value, not a list."""
    groups = defaults(command)
    if key in groups:
        return not isinstance(groups[key], list)
    types = _types(command, key, overrides, dirs)
    return bool(types) and list not in kinds(types)


def takes_list(command: str, key: str, overrides: Sequence[str], dirs: Sequence[Path]) -> bool:
    """Return whether a key or a group is known and accepts a list."""
    groups = defaults(command)
    if key in groups:
        return isinstance(groups[key], list)
    return list in kinds(_types(command, key, overrides, dirs))


def takes_mapping(command: str, key: str, overrides: Sequence[str], dirs: Sequence[Path]) -> bool:
    """Return whether a key accepts a mapping of names to values, also in a list, or has no known type."""
    if key in CLASS_KEYS:
        return True
    types = _types(command, key, overrides, dirs)
    return key not in TEXT_KEYS and (not types or bool((kinds(types) | item_kinds(types)) & MAPPINGS))


def kinds(types: Sequence[Any]) -> frozenset[Any]:
    """Return the plain types that some types accept: `str`, `int`, `list`, `NoneType` and others."""
    return frozenset(kind for of in types for kind, _ in _members(of))


def item_kinds(types: Sequence[Any]) -> frozenset[Any]:
    """Return the plain types that the lists among some types contain."""
    return kinds([item for of in types for kind, items in _members(of) if kind is list for item in items])


def types_of(
    command: str, key: str, chosen: Callable[[], Mapping[str, Choice]] | None, dirs: Sequence[Path]
) -> list[Any]:
    """Return the types of a key in the schema of a command, or in options of its group.

    Args:
        command: name of the command.
        key: dotted key.
        chosen: the option of each group; None: all options of the group.
        dirs: folders with options of the user.
    """
    key = key.removeprefix("hydra.")
    group, _, rest = key.partition(".")
    if group == "launcher":
        return _of_model(SlurmConfig, rest)
    if is_of_label(key) and LABEL in COMMANDS[command].model_fields:
        return [Class | None] if command in GRIDS else [Class | list[Class] | None]
    if group not in defaults(command) or not rest:
        return _of_model(COMMANDS[command], key)
    node, _, argument = key.rpartition(".")
    files = options(group, dirs)
    option = [*files] if chosen is None else chosen()[group]
    names = option if isinstance(option, list) else [option]
    return [
        kind
        for name in names
        if str(name) in files
        for kind in _of_option(files[str(name)], group, node, argument)
    ]


def _of_option(file: Path, group: str, node: str, argument: str) -> list[Any]:
    """The type of an argument of a node such as `metric.fid` in an option file."""
    target = nodes(file, group).get(node, "")
    if libraries.is_named(target):  # without an import: the type of its value
        value = _values(file, group).get(f"{node}.{argument}")
        return [] if value is None else [type(value)]
    of = arguments(target)
    return [of[argument][0]] if argument in of else []


def nodes(file: Path, group: str) -> dict[str, str]:
    """Return the class of each node of an option file of a group that names one, by the dotted key of the node."""
    return {
        key.rpartition(".")[0]: target
        for key, target in _values(file, group).items()
        if key.rpartition(".")[2] == "_target_" and isinstance(target, str)
    }


def _values(file: Path, group: str) -> dict[str, Any]:
    """The values of an option file of a group and of the files that it includes, by dotted key."""
    values: dict[str, Any] = {}
    for part in lineage(file):
        values |= flatten(content(part))
    prefix = "" if "@package _global_" in file.read_text() else f"{group}."
    return {f"{prefix}{key}": value for key, value in values.items()}


def _types(command: str, key: str, overrides: Sequence[str], dirs: Sequence[Path]) -> list[Any]:
    return types_of(command, key, lambda: chosen(command, overrides, dirs), dirs)


def _of_model(model: type[BaseModel], key: str) -> list[Any]:
    """The type of a dotted key of a model, or of a model within it."""
    name, _, rest = key.partition(".")
    if name not in model.model_fields:
        return []
    annotation = model.model_fields[name].annotation
    if not rest:
        return [annotation]
    return (
        _of_model(annotation, rest)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel)
        else []
    )


def few_values(types: Sequence[Any]) -> list[Any]:
    """Return the values of the types that accept only a few: literals, true and false, and null beside them."""
    members = [member for of in types for member in _members(of)]
    found = [value for kind, values in members if kind is Literal for value in values]
    found += [True, False] if any(kind is bool for kind, _ in members) else []
    return [*found, None] if found and any(kind is NoneType for kind, _ in members) else found


def _members(kind: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield each plain type that a type accepts, with its arguments."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from _members(arguments[0])
    elif origin in (Union, UnionType):
        for member in arguments:
            yield from _members(member)
    else:
        yield origin or kind, arguments

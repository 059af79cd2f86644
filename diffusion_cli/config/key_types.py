"""Types of configuration keys, read without importing the classes that have them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from diffusion_cli.config import libraries
from diffusion_cli.config.catalogue import Choice, chosen, content, defaults, lineage, options
from diffusion_cli.config.runs import flatten
from diffusion_cli.config.schema import COMMANDS, SlurmConfig
from diffusion_cli.config.signature import arguments


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
    if group not in defaults(command) or not rest:
        return _of_model(COMMANDS[command], key)
    node, _, argument = key.rpartition(".")
    files = options(group, dirs)
    option = [*files] if chosen is None else chosen()[group]
    names = option if isinstance(option, list) else [option]
    found = (_arguments(files[str(name)], node) for name in names if str(name) in files)
    return [types[argument] for types in found if argument in types]


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


def _arguments(file: Path, node: str) -> dict[str, Any]:
    """The argument types, by name, of a node such as `metric.fid` in an option file."""
    values: dict[str, Any] = {}
    for part in lineage(file):
        values |= flatten(content(part))
    # Files of the global package write the key of a node in full, others from their group on.
    full = f"{node}._target_"
    inside = full if full in values else full.partition(".")[2]
    target = values.get(inside, "")
    if isinstance(target, str) and libraries.is_named(target):  # without an import: the types of its values
        prefix = inside.removesuffix("_target_")
        own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        return {name: type(value) for name, value in own.items() if "." not in name and value is not None}
    return {name: kind for name, (kind, _) in arguments(target).items()}


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

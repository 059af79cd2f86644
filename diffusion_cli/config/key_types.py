"""Types of configuration keys, read without importing the classes that have them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from diffusion_cli.config.catalogue import chosen, content, defaults, lineage, options
from diffusion_cli.config.runs import flatten
from diffusion_cli.config.schema import COMMANDS
from diffusion_cli.config.signature import signature


def takes_one(command: str, key: str, overrides: Sequence[str], dirs: Sequence[Path]) -> bool:
    """Return whether a key or a group is known and has one value, not a list."""
    groups = defaults(command)
    if key in groups:
        return not isinstance(groups[key], list)
    types = _types(command, key, overrides, dirs)
    return bool(types) and not any(map(_accepts_list, types))


def takes_list(command: str, key: str, overrides: Sequence[str], dirs: Sequence[Path]) -> bool:
    """Return whether a key or a group is known and accepts a list."""
    groups = defaults(command)
    if key in groups:
        return isinstance(groups[key], list)
    return any(map(_accepts_list, _types(command, key, overrides, dirs)))


def _types(command: str, key: str, overrides: Sequence[str], dirs: Sequence[Path]) -> list[Any]:
    """The types of a key in the schema of a command, or in the chosen options."""
    node, _, argument = key.rpartition(".")
    fields = COMMANDS[command].model_fields
    if not node:
        return [fields[key].annotation] if key in fields else []
    group = key.partition(".")[0]
    option = chosen(command, overrides, dirs).get(group)
    names = option if isinstance(option, list) else [option]
    files = (options(group, dirs).get(str(name)) for name in names)
    arguments = [_arguments(file, node) for file in files if file is not None]
    return [types[argument] for types in arguments if argument in types]


def _arguments(file: Path, node: str) -> dict[str, Any]:
    """The argument types, by name, of a node such as `metric.fid` in an option file."""
    values: dict[str, Any] = {}
    for part in lineage(file):
        values |= flatten(content(part))
    # Files of the global package write the key of a node in full, others from their group on.
    full = f"{node}._target_"
    target = values.get(full) or values.get(full.partition(".")[2], "")
    return signature(target) or {}


def _accepts_list(kind: Any) -> bool:
    return get_origin(kind) is list or kind is list or any(map(_accepts_list, get_args(kind)))

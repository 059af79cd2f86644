"""Keys and options that a command does not have: each error shows the word that was probably meant."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion_cli.config import plugins
from diffusion_cli.config.catalogue import GROUPS, defaults, options
from diffusion_cli.config.key_types import kinds, types_of
from diffusion_cli.config.option_keys import option_keys
from diffusion_cli.config.schema import UNSWEPT
from diffusion_cli.config.typed import as_text
from diffusion_cli.config.words import OTHER_NAMES, nearest_key, nearest_option
from diffusion_cli.errors import NO_VALUE, Problem


def unknown_key(command: str, shown: str, keys: Sequence[str]) -> Problem:
    """Return the problem of a word with a key that the chosen options do not have.

    Args:
        command: name of the command.
        shown: the word `key=value`, as a user writes it.
        keys: keys and groups of the command with its chosen options.
    """
    key, _, value = shown.partition("=")
    if having := _options_with(key, command):
        remedy = f"add {having[0]}" if len(having) == 1 else "choose one of them"
        return Problem(shown, NO_VALUE, f"applies only to {' or '.join(having)}", remedy)
    near = next((of for of in OTHER_NAMES.get(key, "").split() if _options_with(of, command)), None)
    if command not in UNSWEPT and key.partition(".")[0] == "sweeper":
        near = f"hydra/{shown}" if key == "sweeper" else f"hydra.{key}"
    near = near or nearest_key(key, keys, value=value)
    parent, _, name = key.rpartition(".")
    if (
        parent in keys
        and parent not in GROUPS
        and kinds(types_of(command, parent, None, ())) & {dict, Mapping}
    ):
        return Problem(shown, NO_VALUE, "unknown key", f"write {parent}={{{name}: {value or '<value>'}}}")
    beside = [of for of in keys if of.startswith(f"{parent}.") and not of.endswith("_target_")]
    hint = f"see diffuse {command} --help" if not beside else f"choose from {', '.join(beside)}"
    return Problem(shown, NO_VALUE, "unknown key", f"did you mean {near}?" if near else hint)


def unknown_option(command: str, group: str, name: str, dirs: Sequence[Path]) -> Problem:
    """Return the problem of an option that a group of a command does not have.

    Args:
        command: name of the command.
        group: name of the group.
        name: name of the option.
        dirs: the user's folders of options, besides those of plugins.
    """
    if group == "dataset" and re.search("[/.]", name):
        remedy = _path_as_dataset(name)
    elif name == "null" and isinstance(defaults(command)[group], list):
        remedy = f"write {group}=[]"
    else:
        remedy = _misplaced(group, name, dirs) or nearest_option(group, name, [*options(group, dirs)])
    return Problem(group, name, "unknown option", remedy)


def _path_as_dataset(path: str) -> str:
    """The remedy for a path in place of an option of `dataset`."""
    option = "array" if path.endswith((".npy", ".npz")) else "folder"
    return f"write dataset={option} {as_text('dataset.path', path)}"


def _misplaced(group: str, name: str, dirs: Sequence[Path]) -> str:
    """The remedy for an option file of the user that is not read; empty if there is none."""
    for folder in (Path(plugins.OPTIONS), *Path().glob(f"*/{plugins.OPTIONS}")):
        if re.fullmatch(r"\w+", name) and (folder / group / f"{name}.yaml").is_file():
            package = folder.parent.name
            return f"add plugins=[{package}] if you trust it" if package else f"add --config-dir {folder}"
    roots = (*plugins.folders(), *dirs)
    found = [file for root in roots for file in root.glob("*/*.yaml") if file.stem == name]
    lost = [file for file in found if file.parent.name not in GROUPS]
    return f"move {lost[0]} to {lost[0].parent.with_name(group)}" if lost else ""


def _options_with(key: str, command: str) -> list[str]:
    """The options, as `group=option`, that have a key: the group's own ones."""
    group = key.partition(".")[0]
    if group == key or group not in defaults(command):
        return []
    return [
        f"{group}={name}"
        for name, file in options(group).items()
        if any(of.key == key for of in option_keys(file, group))
    ]

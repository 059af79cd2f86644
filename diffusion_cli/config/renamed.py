"""Words of earlier versions on a command line and in a user's option files: an error gives the new word."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_cli.config.catalogue import brought_by, chosen, defaults, options
from diffusion_cli.config.runs import flatten
from diffusion_cli.config.schema import COMMANDS
from diffusion_cli.errors import NO_VALUE, Problem, format_value
from diffusion_cli.runs.migrate import (
    KEYS_OF_FORMAT_5,
    KEYS_OF_FORMAT_6,
    SPLITS_OF_FORMAT_5,
    had_moved_keys,
    is_ours,
)

NAMING_SPLITS = ("input", "split")
"""Last names of the keys that take splits of a dataset."""


def renamed_split(key: str, value: Any) -> Problem | None:
    """Return the problem of a word `key=value` with a split of an earlier version, or None if it has none."""
    if key.rpartition(".")[2] in NAMING_SPLITS and isinstance(value, str) and value in SPLITS_OF_FORMAT_5:
        split = SPLITS_OF_FORMAT_5[value]
        return Problem(key, value, f"renamed to {split}", f"use {key}={split}")
    return None


def renamed_key(command: str, key: str, value: Any) -> Problem | None:
    """Return the problem of a word `key=value` with a key of an earlier version, or None if it has none.

    Args:
        command: name of the command.
        key: group or dotted key that the chosen options lack.
        value: option, or value.
    """
    if key in KEYS_OF_FORMAT_6 and command == "train":
        return _moved(key, value)
    new, known = _new_key(key), {*defaults(command), *COMMANDS[command].model_fields}
    return _problem(key, value) if new != key and new.partition(".")[0] in known else None


def renamed_in_files(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> list[Problem]:
    """Return the problems of earlier names of groups in folders of options: their subfolders, and `override` lines.

    Args:
        command: name of the command.
        overrides: words of the command line.
        dirs: the user's folders of options.
    """
    folders = [(root / old, new) for root in dirs for old, new in KEYS_OF_FORMAT_5.items()]
    problems = [
        Problem(folder, NO_VALUE, f"renamed to {new}", f"rename the folder to {new}")
        for folder, new in folders
        if new in defaults(command) and folder.is_dir()
    ]
    for group, option in chosen(command, overrides, dirs).items() if dirs else ():
        for name in option if isinstance(option, list) else [option]:
            file = options(group, dirs).get(str(name))
            problems += [
                Problem(file, NO_VALUE, f"{old} is renamed to {new}", f"write override /{new}: {brought}")
                for old, brought in (brought_by(file) if file else {}).items()
                if (new := _new_key(old)) != old
            ]
    return problems


def renamed_keys(config: Mapping[str, Any], parent: str = "") -> list[Problem]:
    """Return the problems of keys that a configuration has by their earlier and their present names.

    Args:
        config: a composed configuration, before it is migrated; a user's option file may have set the earlier ones.
        parent: dotted key of `config` with a dot at its end; empty for all of it.
    """
    problems = []
    for name, item in config.items():
        if KEYS_OF_FORMAT_5.get(name) in config and is_ours(config):
            problems += [_problem(parent + key, value) for key, value in flatten({name: item}).items()]
        elif isinstance(item, Mapping):
            problems += renamed_keys(item, f"{parent}{name}.")
    return problems


def renamed_beside(config: Mapping[str, Any], words: Sequence[str]) -> list[Problem]:
    """Return the problems of moved keys in an option file, if words of the command line set the present ones.

    Without such words the keys of the file are migrated.

    Args:
        config: a composed configuration, before it is migrated.
        words: words of the command line.
    """
    if not had_moved_keys(config.get("optimizer")):
        return []
    values = {key: value for key, value in flatten(config).items() if key in KEYS_OF_FORMAT_6}
    said = {word.partition("=")[0].partition(".")[0] for word in words}
    return [
        _moved(key, value) for key, value in values.items() if KEYS_OF_FORMAT_6[key].partition(".")[0] in said
    ]


def _moved(key: str, value: Any) -> Problem:
    """Return the problem of one of `KEYS_OF_FORMAT_6`."""
    new = KEYS_OF_FORMAT_6[key]
    constant = new == "lr_schedule.decay_steps" and value is None
    remedy = "use lr_schedule=constant" if constant else f"use {new}={format_value(value)}"
    return Problem(key, value, f"renamed to {new}", remedy)


def _new_key(key: str) -> str:
    """The present name of a dotted key."""
    return ".".join(KEYS_OF_FORMAT_5.get(part, part) for part in key.split("."))


def _problem(key: str, value: Any) -> Problem:
    """The problem of a key that has another name."""
    name = next(KEYS_OF_FORMAT_5[part] for part in key.split(".") if part in KEYS_OF_FORMAT_5)
    return Problem(key, value, f"renamed to {name}", f"use {_new_key(key)}={format_value(value)}")

"""The keys of an option: those that its file lists, and the arguments of its class that the file leaves out.

Options of this package list every argument, with a comment. An option of a user may leave arguments out: they have the
default of the class, and the words of its docstring as help.
"""

import ast
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_cli.config import libraries
from diffusion_cli.config.catalogue import CONF, PACKAGE, chosen, documented, options, summary
from diffusion_cli.config.key_types import nodes
from diffusion_cli.config.recipe import AUTO
from diffusion_cli.config.signature import Argument, arguments, constructor, imported, is_foreign, literal
from diffusion_cli.config.typed import quoted
from diffusion_cli.errors import UsageError, format_value

REQUIRED = "???"
"""Value of a key without a default, as in YAML."""


class OptionKey(NamedTuple):
    """A key of an option, for the help."""

    key: str
    value: str
    comment: str


def option_keys(file: Path, group: str) -> list[OptionKey]:
    """Return the keys of an option of a group: those of its file, and then the others of its class.

    A key without a comment in the file has the words of the docstring. Imports no class that is readable from source.
    """
    listed = [OptionKey(*found) for found in documented(file, group)]
    if file.is_relative_to(CONF):
        return listed
    described = {
        f"{node}.{name}": setting
        for node, target in nodes(file, group).items()
        for name, setting in (
            _described(target, group) if is_foreign(target) else _own_settings(group, target, str)
        ).items()
    }
    known = [
        key if key.comment or key.key not in described else key._replace(comment=described[key.key].comment)
        for key in listed
    ]
    return known + [
        setting._replace(key=key) for key, setting in described.items() if not _has([*listed], key)
    ]


def option_summary(file: Path, group: str) -> str:
    """Return the description of an option: the first comment of its file, else the first line of its docstring."""
    if (text := summary(file)) or file.is_relative_to(CONF):
        return text
    found = (constructor(target) for target in nodes(file, group).values())
    texts = (text for each in found if each is not None for text in each.docstrings[:1])
    return next((text.splitlines()[0].rstrip(".") for text in texts), "")


def defaults_left_out(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> list[str]:
    """Return words for Hydra, `++key=value`, that give the arguments that the chosen options of a user leave out.

    Args:
        command: name of the command.
        overrides: words of the command line.
        dirs: all folders with options of the user.
    """
    files = [
        (group, file)
        for group, option in chosen(command, overrides, dirs).items()
        for name in (option if isinstance(option, list) else [option])
        if (file := options(group, dirs).get(str(name))) is not None
    ]
    given = [key for group, file in files for key in documented(file, group)]
    return [
        f"++{node}.{name}={value}"
        for group, file in files
        if not file.is_relative_to(CONF)
        for node, target in nodes(file, group).items()
        for name, value in _defaults(group, target).items()
        if value is not None and not _has(given, f"{node}.{name}")
    ]


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with the arguments that classes of plugins have gained since, at their defaults."""

    def missing(node: Any) -> dict[str, Any]:
        if not isinstance(node, Mapping) or not is_foreign(str(node.get("_target_"))):
            return {}
        found = {name: value for name, (_, value) in arguments(node["_target_"]).items() if name not in node}
        return {
            name: json.loads(json.dumps(value)) for name, value in found.items() if as_word(value) is not None
        }

    return {key: {**node, **new} if (new := missing(node)) else node for key, node in config.items()}


def _has(keys: Sequence[tuple[str, str, str]], key: str) -> bool:
    """Whether a key, or one within it, is among some keys."""
    return any(other == key or other.startswith(f"{key}.") for other, _, _ in keys)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _defaults(group: str, target: str) -> dict[str, str | None]:
    """The default of each argument of a class in the syntax of Hydra; None for one that is no plain data."""
    if is_foreign(target):
        try:
            found = arguments(target)
        except (UsageError, KeyError):  # reported where the node is checked
            return {}
        return {
            name: REQUIRED if value is ... else as_word(value, quoted) for name, (_, value) in found.items()
        }
    return {name: setting.value for name, setting in _own_settings(group, target, quoted).items()}


def _own_settings(group: str, target: str, text: Callable[[str], str]) -> dict[str, OptionKey]:
    """The arguments of a class of this package by name; `text` writes default values that are text."""
    found = constructor(target) if target.startswith(f"{PACKAGE}.") else None
    if found is None:
        return {}
    ours, settings = _own_keys(group).get(target, {}), {}
    for name, argument in found.keywords.items():
        default = argument.default
        value = REQUIRED if default is None else as_word(literal(default, found.module), text)
        listed = ours.get(name, OptionKey(name, "", ""))
        if value in (REQUIRED, "null", "0") and (listed.value == AUTO or listed.value.startswith("${")):
            value = listed.value  # a whole command resolves it
        settings[name] = OptionKey(name, str(value), listed.comment)
    return settings


@cache
def _own_keys(group: str) -> Mapping[str, Mapping[str, OptionKey]]:
    """The arguments of each class of this package, by class and by name, as its first option lists them."""
    found: dict[str, dict[str, OptionKey]] = {}
    for file in sorted((CONF / group).glob("*.yaml")):
        for node, target in nodes(file, group).items():
            for key, value, comment in documented(file, group):
                if key.rpartition(".")[0] == node:
                    found.setdefault(target, {}).setdefault(_last(key), OptionKey(_last(key), value, comment))
    return found


@cache
def _described(target: str, group: str) -> dict[str, OptionKey]:
    """The arguments of a class of a plugin or a library by name, as `_own_settings`.

    They are read from the source, or from the imported class if its constructor is elsewhere.
    """
    import docstring_parser

    found = constructor(target)
    if found is None:
        texts, written = _inspected(target)
    else:
        supplied = libraries.LIBRARIES[group].supplied if group in libraries.LIBRARIES else None
        positional = [] if supplied is None else [*found.positional.items()][supplied:]
        texts, written = found.docstrings, dict(_written({**dict(positional), **found.keywords}))
    parsed = [docstring_parser.parse(text) for text in texts]
    words = {param.arg_name: param.description or "" for docs in parsed for param in docs.params}
    settings = {}
    for name, (kind, value) in written.items():
        text = " ".join(words.get(name, "").split()).rstrip(".")
        settings[name] = OptionKey(name, value, f"{text} ({kind})".strip() if kind else text)
    return settings


def _written(found: Mapping[str, Argument]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the name, type and default of each argument, as the source writes them."""
    for name, (annotation, default) in found.items():
        kind = "" if annotation is None else ast.unparse(annotation)
        if default is None:
            yield name, (kind, REQUIRED)
            continue
        try:
            value = as_word(ast.literal_eval(default))
        except ValueError:  # an expression
            value = None
        yield name, (kind, ast.unparse(default) if value is None else value)


def _inspected(target: str) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """Return the docstring of a class, and the type and default of its arguments, by importing it."""
    try:
        docstring, found = inspect.getdoc(imported(target)), arguments(target)
    except (UsageError, KeyError):  # reported where the node is checked
        return [], {}
    return [docstring or ""], {
        name: (
            "" if kind is Any else inspect.formatannotation(kind),
            REQUIRED if value is ... else as_word(value) or repr(value),
        )
        for name, (kind, value) in found.items()
    }


def as_word(value: Any, text: Callable[[str], str] = str) -> str | None:
    """Return plain data in the syntax of a command line, with `text` for texts; None for other values."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, list | tuple):
        items = [as_word(item, text) for item in value]
        return None if None in items else f"[{','.join(map(str, items))}]"
    if isinstance(value, Mapping):
        pairs = {str(key): as_word(item, text) for key, item in value.items()}
        return (
            None
            if None in pairs.values()
            else f"{{{','.join(f'{key}:{item}' for key, item in pairs.items())}}}"
        )
    return format_value(value) if value is None or isinstance(value, bool | int | float) else None

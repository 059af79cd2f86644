"""The pages of `diffuse --help`, `diffuse <command> --help` and `diffuse <command> <group>=help`."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_cli import __version__
from diffusion_cli.config.catalogue import (
    CONF,
    DESCRIBED,
    GROUPS,
    chosen,
    defaults,
    documented,
    groups,
    options,
    summary,
)
from diffusion_cli.config.hydra_words import is_of_hydra
from diffusion_cli.config.launcher import LAUNCHERS, split_launcher
from diffusion_cli.config.option_keys import REQUIRED, option_keys, option_summary
from diffusion_cli.config.overrides import OF_RUNS, RUN_DATA
from diffusion_cli.config.renamed import renamed_key
from diffusion_cli.config.schema import COMMANDS, FIRST_WORDS, UNSWEPT
from diffusion_cli.config.typed import SWEEPS
from diffusion_cli.config.unknown import unknown_key, unknown_option
from diffusion_cli.config.words import known_keys
from diffusion_cli.errors import Problem
from diffusion_cli.system.untrusted import escaped

WIDTH = 100
"""Columns of a page; only a word that is longer exceeds them."""


def overview() -> str:
    """Return the page of `diffuse --help`."""
    commands = {name: summary(CONF / f"{name}.yaml") for name in COMMANDS}
    commands["completion"] = "Print a completion script for bash, zsh or fish"
    listed = "\n".join(line for name, text in commands.items() for line in _entry(f"  {name}", text, 14))
    return f"""diffuse {__version__}: train, sample, edit and evaluate diffusion models.

Usage: diffuse <command> [group=option ...] [key=value ...]

Commands
{listed}

Help
  diffuse <command> --help          groups, options and keys of a command
  diffuse <command> <group>=help    options of a group, such as diffuse train model=help
  ... <group>=<option> --help       also the keys of an option: diffuse train dataset=folder --help

Flags
  --cfg job           print the configuration and exit; hydra: Hydra's settings; all: both
  --resolve           with --cfg: print values in place of references ${{...}}
  -p, --package KEY   with --cfg: print a part, such as model
  --info [WHAT]       print what Hydra composes: defaults, defaults-tree, searchpath, plugins, config or all
  --config-dir DIR    folder with options of your own: DIR/<group>/<option>.yaml
  plugins=[MODULE]    modules with classes and options of your own
  -m, --multirun      one run for each combination of values: diffuse train -m seed=0,1,2
  --version           print the version and exit

First steps
  diffuse train                      # train on 8x8 handwritten digits, in minutes on a laptop
  diffuse sample num_samples=64      # sample from the newest run
  diffuse eval                       # evaluate the newest run"""


def command_help(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> str:
    """Return the page of `diffuse <command> --help`: groups, options, and keys with their comments."""
    listed = _groups(command, overrides, dirs)
    words = "[group=option ...] [key=value ...]" if groups(command) else "[key=value ...]"
    words = " ".join([*(f"[{key}]" for key in FIRST_WORDS.get(command, ())), words])
    file = CONF / f"{command}.yaml"
    lines = [*_wrapped(f"diffuse {command}: {summary(file)}"), "", f"Usage: diffuse {command} {words}"]
    if listed:
        lines += ["", f"Groups (* selected; diffuse {command} GROUP=help describes the options of a group)"]
    for group, options_of_group in listed.items():
        lines += _entry(f"  {group}", GROUPS[group], 20)
        lines += (_described if group in DESCRIBED[command] else _named)(options_of_group)
    lines += ["", "Keys", *_keys(documented(file))]
    for group, options_of_group in listed.items():
        for option in options_of_group:
            if option.selected:
                heading = f"{group}={option.name}  {option.summary}"
                lines += ["", *_wrapped(heading), *_keys(option_keys(option.file, group))]
    return "\n".join(lines)


def groups_asked(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> list[str]:
    """Return the groups of the words `group=help`; an option of a user with the name `help` has precedence."""
    launcher, others = split_launcher(overrides)
    asked = {text.removesuffix("=help") for text in (*others, *launcher) if text.endswith("=help")}
    return [
        group
        for group, options_of_group in (_groups(command, (), dirs) if asked else {}).items()
        if group in asked and all(option.name != "help" for option in options_of_group)
    ]


def ignored_words(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> list[Problem]:
    """Return the problems of unknown keys and options, which a page of help leaves out."""
    given = [
        text for text in split_launcher(overrides)[1] if not (is_of_hydra(text) or text.endswith("=help"))
    ]
    keys = [*known_keys(command, given, dirs), *(RUN_DATA if command in OF_RUNS else ())]
    problems = []
    for key, _, value in (text.partition("=") for text in given):
        if key not in defaults(command):
            found = any(other == key or other.startswith(f"{key}.") for other in keys)
            renamed = renamed_key(command, key, value)
            problems += [] if found else [renamed or unknown_key(command, f"{key}={value}", keys)]
        elif not value.startswith(SWEEPS):
            names = [name for name in value.strip("[]").split(",") if name not in ("", "null")]
            known = options(key, dirs)
            problems += [unknown_option(command, key, name, dirs) for name in names if name not in known]
    return problems


def group_help(command: str, group: str, overrides: Sequence[str], dirs: Sequence[Path]) -> str:
    """Return the page of `diffuse <command> <group>=help`: the options of a group with their descriptions."""
    rest = [text for text in overrides if not text.endswith("=help")]
    lines = [*_wrapped(f"diffuse {command} {group}=OPTION: {GROUPS[group]}"), "", "Options (* selected)"]
    lines += _described(_groups(command, rest, dirs)[group])
    return "\n".join([*lines, "", f"Keys of an option: diffuse {command} {group}=OPTION --help"])


class _Option(NamedTuple):
    """An option of a group, whether a command line selects it, and its description."""

    name: str
    file: Path
    selected: bool
    summary: str


def _groups(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> dict[str, list[_Option]]:
    """Return the options of each group of a command, in the order of the help; with `launcher` if it can sweep."""
    selected = chosen(command, overrides, dirs)
    files = {group: options(group, dirs) for group in groups(command)}
    if command not in UNSWEPT:
        words = (text.partition("=") for text in split_launcher(overrides)[0])
        selected["launcher"] = next((name for key, _, name in words if key == "launcher"), "local")
        files["launcher"] = options(LAUNCHERS, dirs)
    return {
        group: [
            _Option(
                name,
                file,
                name in (names if isinstance(names, list) else [names]),
                option_summary(file, group),
            )
            for name, file in files[group].items()
            for names in [selected[group]]
        ]
        for group in files
    }


def _described(listed: Sequence[_Option]) -> Iterator[str]:
    """Yield a line for each option of a group, with its description."""
    column = 6 + max(len(option.name) for option in listed)
    for option in listed:
        yield from _entry(f"{'   *' if option.selected else '    '}{option.name}", option.summary, column)


def _named(listed: Sequence[_Option]) -> list[str]:
    """Return the names of the options of a group, wrapped."""
    return _wrapped(
        " ".join(f"{'*' * option.selected}{option.name}" for option in listed), " " * 20, " " * 20
    )


def _keys(keys: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """Yield a line for each key, with its value and comment."""
    for key, value, comment in keys:
        required = value == REQUIRED
        yield from _entry(f"  {key}={'' if required else value}", f"{comment}{'; required' * required}", 40)


def _entry(name: str, text: str, column: int) -> list[str]:
    """Return a name and its text; the text begins at a column, or two blanks after a longer name."""
    return _wrapped(f"{name:<{column - 2}}  {text}".rstrip(), "", " " * column)


def _wrapped(text: str, first: str = "", rest: str = "  ") -> list[str]:
    """Return the lines of a text, wrapped at `WIDTH` columns, with an indent of the first and one of the others."""
    return textwrap.wrap(
        escaped(text),
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )

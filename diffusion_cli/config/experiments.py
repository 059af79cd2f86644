"""Experiment files of a user: an error names the file."""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from diffusion_cli.config.catalogue import CONF, chosen, content, defaults, did_you_mean, lineage, options
from diffusion_cli.config.runs import flatten
from diffusion_cli.config.words import nearest_option
from diffusion_cli.errors import NO_VALUE, Problem

HEADER = "# @package _global_"
"""Line by which the keys of a file are those of the command, not of its group."""


def experiment_problems(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> list[Problem]:
    """Return the problems of the chosen experiment that Hydra would report without its file, or not at all.

    Args:
        command: name of the command.
        overrides: words of the command line.
        dirs: the user's folders of options, besides those of plugins.
    """
    return [
        Problem(file, NO_VALUE, *problem)
        for file in _files(command, overrides, dirs)
        for problem in _problems(command, file, dirs)
    ]


def named_by_file(
    command: str, overrides: Sequence[str], dirs: Sequence[Path], problems: Sequence[Problem]
) -> list[Problem]:
    """Return problems of a configuration; those of keys that the chosen experiment sets name its file.

    Args:
        command: name of the command.
        overrides: words of the command line, which replace the values of an experiment.
        dirs: the user's folders of options, besides those of plugins.
        problems: what is wrong with the configuration.
    """
    given = {text.partition("=")[0] for text in overrides}
    files = {key: file for file in _files(command, overrides, dirs) for key in flatten(content(file))}
    return [
        Problem(files[key], NO_VALUE, problem.cause, problem.remedy)
        if (key := str(problem.key).partition("=")[0]) in files.keys() - given
        else problem
        for problem in problems
    ]


def _files(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> list[Path]:
    """The file of the chosen experiment, after those that it includes; none for one of this package."""
    name = chosen(command, overrides, dirs).get("experiment")
    file = options("experiment", dirs).get(name[0] if isinstance(name, list) else str(name))
    return [part for part in lineage(file) if not part.is_relative_to(CONF)] if file else []


def _problems(command: str, file: Path, dirs: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """The problems and remedies of an experiment file."""
    comments = takewhile(lambda line: line.startswith("#") or not line, file.read_text().split("\n"))
    if not any(line.split() == HEADER.split() for line in comments):
        yield f"has no line {HEADER}", "write it as the first line"
    groups, found = defaults(command), content(file)
    for group, option in found.items():
        if group in groups and isinstance(option, str | list):
            yield f"{group}: {_listed(option)}: an option outside of defaults", _override(group, option)
    for entry in found.get("defaults") or []:
        for name, option in entry.items() if isinstance(entry, dict) else ():
            yield from _of_entry(command, str(name), option, dirs)


def _of_entry(command: str, name: str, option: Any, dirs: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """The problem and the remedy of an entry `name: option` of the defaults of an experiment."""
    groups, overrides = defaults(command), name.startswith("override ")
    group = name.removeprefix("override ").strip().removeprefix("/")
    if group in groups and name != f"override /{group}":
        yield f"defaults: {name}: {_listed(option)}: does not override the option", _override(group, option)
    elif group in groups:
        known = options(group, dirs)
        for each in option if isinstance(option, list) else [option]:
            if each is not None and str(each) not in known and "${" not in str(each):
                yield f"defaults: {group}={each}: unknown option", nearest_option(group, str(each), [*known])
    elif overrides and not group.startswith("hydra/"):
        yield f"defaults: {group}: unknown group", did_you_mean(group, [*groups])


def _override(group: str, option: Any) -> str:
    """The remedy for an option that does not override the one of the command."""
    return f"write - override /{group}: {_listed(option)} below defaults:"


def _listed(option: Any) -> str:
    """An option or a list of them, as YAML writes it in one line."""
    return f"[{', '.join(map(str, option))}]" if isinstance(option, list) else str(option)

"""What there is to choose: groups, options and keys, read off the YAML files."""

import difflib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

PACKAGE = "diffusion_cli"
HERE = Path(__file__).resolve().parent.parent
# Beside the package when installed from a wheel, at the top of a checkout.
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"

Choice = str | list[str] | None


@cache
def defaults(command: str) -> dict[str, Choice]:
    """The groups of a command and the option that each has unless told otherwise."""
    return brought_by(CONF / f"{command}.yaml")


def brought_by(file: Path) -> dict[str, Choice]:
    """The options that a YAML file chooses for groups: its `group: option` and `override /group: option` lines."""
    entries = (entry for part in lineage(file) for entry in _entries(part) if isinstance(entry, dict))
    pairs = (pair for entry in entries for pair in entry.items())
    return {group.removeprefix("override ").removeprefix("/"): option for group, option in pairs}


def lineage(file: Path) -> list[Path]:
    """A YAML file after those of its folder that its `defaults` take over by their bare names."""
    names = (entry for entry in _entries(file) if isinstance(entry, str) and entry != "_self_")
    parents = (file.with_name(f"{name}.yaml") for name in names)
    return [*(part for parent in parents if parent.is_file() for part in lineage(parent)), file]


def _entries(file: Path) -> list[Any]:
    return (yaml.safe_load(file.read_text()) or {}).get("defaults", [])


def chosen(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> dict[str, Choice]:
    """The option of each group that a command line makes, with what options choose for other groups."""
    groups = defaults(command)
    words = (word.partition("=") for word in overrides)
    asked = {
        group: [name.strip() for name in option.strip("[]").split(",")]
        for group, _, option in words
        if group in groups
    }
    result: dict[str, Choice] = {**groups, **asked}
    for _ in groups:  # an option may bring one that brings another
        before = dict(result)
        for option_of, option in before.items():
            for name in option if isinstance(option, list) else [option]:
                file = options(option_of, dirs).get(str(name))
                brought = brought_by(file) if file else {}
                result |= {other: brought[other] for other in brought if other not in asked}
        if result == before:
            break
    return result


def options(group: str, dirs: Sequence[Path] = ()) -> dict[str, Path]:
    """The options of a group by name, the user's own folders included."""
    files = (file for root in (CONF, *dirs) for file in sorted((root / group).glob("*.yaml")))
    return dict(sorted((file.stem, file) for file in files))


def documented(file: Path, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """The (key, value, comment) of every line `key: value  # comment` of a YAML file, keys in full.

    Those that it takes over from other files come first, with its own values where it gives them anew.
    """
    lines = (line for part in lineage(file) for line in _documented(part, prefix))
    yield from {key: (key, value, comment) for key, value, comment in lines}.values()


def _documented(file: Path, prefix: str) -> Iterator[tuple[str, str, str]]:
    text = file.read_text()
    parents: list[tuple[int, str]] = [] if "@package _global_" in text or not prefix else [(-1, prefix)]
    skipping = False
    for line in text.splitlines():
        match = re.match(r"(\s*)(\w+):\s*(.*?)\s*(?:#\s*(.*))?$", line)
        if not match:
            continue
        indent, key, value, comment = len(match[1]), match[2], match[3], match[4] or ""
        skipping = key == "defaults" if not indent else skipping
        if skipping or key == "_target_":
            continue
        while parents and parents[-1][0] >= indent:
            parents.pop()
        path = ".".join([name for _, name in parents] + [key])
        if value or comment:
            yield path, value, comment
        if not value:
            parents.append((indent, key))


def summary(file: Path) -> str:
    """The first comment of a YAML file, which says what it is."""
    comments = re.findall(r"(?:^|\s)# +([^@\s].*)", file.read_text())
    return comments[0] if comments else ""


def did_you_mean(word: str, words: Sequence[str]) -> str:
    """ "; did you mean X?" where a word is near, else the list of them."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(words)}"

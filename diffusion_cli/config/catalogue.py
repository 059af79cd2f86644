"""What there is to choose: groups, options and keys, read off the YAML files."""

import difflib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import yaml

PACKAGE = "diffusion_cli"
HERE = Path(__file__).resolve().parent.parent
# Beside the package when installed from a wheel, at the top of a checkout.
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"


@cache
def defaults(command: str) -> dict[str, str | list[str] | None]:
    """The groups of a command and the option that each has unless told otherwise."""
    entries = yaml.safe_load((CONF / f"{command}.yaml").read_text())["defaults"]
    return {group: option for entry in entries if isinstance(entry, dict) for group, option in entry.items()}


def options(group: str, dirs: Sequence[Path] = ()) -> dict[str, Path]:
    """The options of a group by name, the user's own folders included."""
    files = (file for root in (CONF, *dirs) for file in sorted((root / group).glob("*.yaml")))
    return dict(sorted((file.stem, file) for file in files))


def documented(file: Path, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """The (key, value, comment) of every line `key: value  # comment` of a YAML file, keys in full."""
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

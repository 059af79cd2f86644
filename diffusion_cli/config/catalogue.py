"""Groups, options and keys of the commands, as the YAML files under `conf` define them."""

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from diffusion_cli.config import plugins
from diffusion_cli.errors import NO_VALUE, UsageError, format_value

PACKAGE = "diffusion_cli"
HERE = Path(__file__).resolve().parent.parent
# Beside the package when installed from a wheel, at the top of a checkout.
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"

OWN_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Parser of this package's own YAML files."""

Choice = str | list[str] | None

GROUPS = {
    "action": "operation on a dataset",
    "figure": "figure to draw",
    "edit": "edit to apply",
    "format": "files to write",
    "preset": "published model, for a file of weights of improved-diffusion or guided-diffusion",
    "dataset": "dataset, with training settings that suit it; eval and compare default to that of the run",
    "model": "network architecture",
    "condition": "image that the model is conditioned on",
    "text": "text condition: encoder of captions and prompts",
    "augmentation": "random transforms of training images, which samples do not have",
    "schedule": "noise schedule",
    "parameterization": "prediction target of the network",
    "objective": "training loss",
    "sampler": "sampling method",
    "guidance": "guidance method",
    "restoration": "inverse-problem method: keeps samples consistent with the input",
    "measurement": "measurement of the inputs of edit=restore",
    "optimizer": "optimizer",
    "lr_schedule": "learning-rate schedule",
    "trainer": "device and parallel training",
    "task": "kind of model to train",
    "experiment": "recipe, often of a paper: a set of options and values",
    "metric": "metrics of evaluations; several as metric=[fid,kid]",
    "features": "feature extractor of the metrics",
    "logger": "training logs; several as logger=[csv,tensorboard]",
    "callback": "callbacks of training; several as callback=[a,b]",
    "reference": "real images that the metrics compare samples with",
    "time_sampling": "distribution of training times",
    "launcher": "launcher of the runs of a sweep (-m)",
}
"""Description of each group, for the help; the most needed group first."""
DESCRIBED = {
    "train": ["dataset", "model"],
    "sample": ["sampler", "guidance"],
    "edit": ["edit", "restoration", "measurement"],
    "eval": ["metric"],
    "compare": ["sampler", "guidance"],
    "report": [],
    "plot": ["figure"],
    "data": ["action", "dataset"],
    "ema": [],
    "runs": [],
    "new": [],
    "import": ["preset", "dataset"],
    "export": ["format"],
    "push": ["format"],
}
"""Groups that the help of a command lists first, with a description of each option."""


@cache
def defaults(command: str) -> dict[str, Choice]:
    """Return the default option of each group of a command."""
    return brought_by(CONF / f"{command}.yaml")


def groups(command: str) -> list[str]:
    """Return the groups of a command, the most needed first."""
    return sorted(defaults(command), key=[*DESCRIBED[command], *GROUPS].index)


def brought_by(file: Path) -> dict[str, Choice]:
    """Return the options that a YAML file selects by its `group: option` and `override /group: option` lines."""
    entries = (entry for part in lineage(file) for entry in _entries(part) if isinstance(entry, dict))
    pairs = (pair for entry in entries for pair in entry.items())
    return {group.removeprefix("override ").removeprefix("/"): option for group, option in pairs}


def lineage(file: Path) -> list[Path]:
    """Return the files that a YAML file includes from its folder by bare names in `defaults`, then the file itself."""
    names = (entry for entry in _entries(file) if isinstance(entry, str) and entry != "_self_")
    parents = (file.with_name(f"{name}.yaml") for name in names)
    return [*(part for parent in parents if parent.is_file() for part in lineage(parent)), file]


def _entries(file: Path) -> list[Any]:
    return content(file).get("defaults") or []


def content(file: Path) -> dict[str, Any]:
    """Return the keys of an option file; UsageError if it is not YAML, as a file of a user may be."""
    try:
        value = copy.deepcopy(_parsed(file.read_text(), CONF in file.parents)) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise invalid_yaml(file, error) from error
    if not isinstance(value, dict):
        raise UsageError(file, NO_VALUE, "not a mapping", "write one key: value per line")
    if not isinstance(value.get("defaults") or [], list):
        raise UsageError(file, NO_VALUE, "defaults is not a list", "write defaults: [name]")
    return value


@cache
def _parsed(text: str, own: bool) -> Any:
    """Parse YAML; a command reads most option files several times, and parsing takes far longer than reading.

    Files of this package are parsed by libyaml where PyYAML has it, in an eighth of the time. Its errors have other
    words, so it does not read files of users.
    """
    return yaml.load(text, OWN_LOADER if own else yaml.SafeLoader)


def invalid_yaml(file: Path | str, error: Exception) -> UsageError:
    """Return the error of a file that is not YAML, with the line if the parser named one."""
    mark = getattr(error, "problem_mark", None)
    place = f" at line {mark.line + 1}: {getattr(error, 'problem', None)}" if mark else ""
    return UsageError(file, NO_VALUE, f"not valid YAML{place}", "correct the file")


def chosen(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> dict[str, Choice]:
    """Return the option of each group for a command line, with the options that selected options bring along."""
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
    """Return the YAML file of each option of a group, including those of plugins and in folders of the user."""
    found = dict(_own_options(group))
    for root in (*plugins.folders(), *dirs):
        for file in sorted((root / group).glob("*.yaml")):
            if file.is_file() and not file.samefile(found.setdefault(file.stem, file)):
                remedy = "rename it, because Hydra would use the other one"
                raise UsageError(
                    file, NO_VALUE, f"{group}={file.stem} is an option of {found[file.stem]}", remedy
                )
    return dict(sorted(found.items()))


@cache
def _own_options(group: str) -> dict[str, Path]:
    """Return the file of each option of this package; a command asks for those of a group several times."""
    return {file.stem: file for file in sorted((CONF / group).glob("*.yaml"))}


def option_of(group: str, node: Mapping[str, Any]) -> str | None:
    """Return the option of a group with the class of a node and the most of its values; None if no option has it."""
    equal: dict[str, int] = {}
    for name, file in options(group).items():
        values = _values(group, file)
        if values.get("_target_") == node.get("_target_"):
            equal[name] = sum(node.get(key) == value for key, value in values.items())
    return max(equal, key=lambda name: equal[name]) if equal else None


def option_words(group: str, node: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that choose a node of this package: its option, and other values."""
    option = option_of(group, node)
    if option is None:
        return []
    usual = _values(group, options(group)[option])
    others = [
        f"{group}.{key}={format_value(value)}" for key, value in node.items() if usual.get(key) != value
    ]
    return [f"{group}={option}", *others]


def is_exactly(group: str, option: str, node: Mapping[str, Any]) -> bool:
    """Return whether a node has every value that an option states."""
    values = _values(group, options(group)[option])
    return all(node.get(key) == value for key, value in values.items() if value != "auto")


def _values(group: str, file: Path) -> dict[str, Any]:
    """Return the values of a group's node that an option file and the files that it includes state."""
    found: dict[str, Any] = {}
    for part in lineage(file):
        value = content(part)
        found |= value[group] if isinstance(value.get(group), Mapping) else value
    found.pop("defaults", None)
    return {key: value for key, value in found.items() if not str(value).startswith("${")}


def documented(file: Path, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the full key, value and comment of each line `key: value  # comment` of a YAML file.

    Keys of included files come first; a value of the file itself replaces an included one.
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
    """Return the description of a YAML file, its first comment."""
    comments = re.findall(r"(?:^|\s)# +([^@\s].*)", file.read_text(errors="replace"))
    return comments[0] if comments else ""


def did_you_mean(word: str, words: Sequence[str], prefix: str = "") -> str:
    """Return the remedy "did you mean X?" if a word is close, whatever its case, or the beginning of one word.

    Otherwise "choose from" and all words. Each word has a prefix in the remedy.
    """
    spelt = {known.lower(): known for known in words}
    near = difflib.get_close_matches(word.lower(), spelt, n=1, cutoff=0.6)
    longer = [known for known in spelt if len(word) > 2 and known.startswith(word.lower())]
    near = near or (longer if len(longer) == 1 else [])
    if near:
        return f"did you mean {prefix}{spelt[near[0]]}?"
    return f"choose from {', '.join(f'{prefix}{known}' for known in words)}"

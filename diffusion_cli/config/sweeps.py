"""From words with several values each to the jobs of a sweep."""

from collections.abc import Sequence
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Glob

from diffusion_cli.config.catalogue import defaults, options
from diffusion_cli.config.compose import parse
from diffusion_cli.config.continued import may_change
from diffusion_cli.config.loading import load
from diffusion_cli.config.schema import Config
from diffusion_cli.config.searches import tag_problem
from diffusion_cli.config.seeds import shared_seeds
from diffusion_cli.config.typed import as_shown, as_typed
from diffusion_cli.errors import NO_VALUE, Problem, UsageError

IMAGES = (
    "run", "step", "steps", "sampler", "guidance", "label", "weights", "clip_x0", "edit", "restoration", "measurement",
)  # fmt: skip
"""Keys and groups that change the images of all seeds, so that a folder has images of one value."""


class Sweep(NamedTuple):
    """The words of a sweep: for each of them, one override per value."""

    command: str
    words: list[list[str]]
    asked: list[str]
    """The words as Hydra's sweeper expands them."""

    @property
    def jobs(self) -> list[list[str]]:
        """The overrides of each job: all combinations of values, the last word's the fastest."""
        return [list(job) for job in product(*self.words)]

    @property
    def variants(self) -> list[list[str]]:
        """Jobs that have each value at least once: enough to check every one of them."""
        first = [values[0] for values in self.words]
        others = (
            [*first[:place], value, *first[place + 1 :]]
            for place, values in enumerate(self.words)
            for value in values[1:]
        )
        return [first, *others]

    @property
    def keys(self) -> list[str]:
        """The keys and groups with several values."""
        return [_key(values[0]) for values in self.words if len(values) > 1]

    def values_of(self, job: Sequence[str]) -> list[str]:
        """The values of a job for `keys`, as a user writes them."""
        values = {_key(text): as_shown(text).partition("=")[2] for text in job}
        return [values.get(key, "") for key in self.keys]


def expand(
    command: str,
    overrides: Sequence[str],
    dirs: Sequence[Path] = (),
    *,
    intervals: bool = False,
    closed_ranges: bool = False,
) -> Sweep:
    """Return the jobs of a sweep; of a key that is given twice, the last word counts.

    Args:
        command: name of the command.
        overrides: words of the command line.
        dirs: folders with options of the user.
        intervals: whether the sweeper chooses values between the ends of an interval or a range; jobs then have its
            ends.
        closed_ranges: whether such a range includes its end, unlike Hydra's own.

    Raises:
        UsageError: for words that have no list of values.
    """
    last = {_key(text): text for text in as_typed(command, overrides, dirs)}
    words = [
        _values(command, text, dirs, intervals=intervals, closed_ranges=closed_ranges)
        for text in last.values()
    ]
    asked = [
        text
        if intervals and "glob(" not in text
        else f"{_key(text)}={','.join(_value(word) for word in values)}"
        for text, values in zip(last.values(), words, strict=True)
    ]
    return Sweep(command, words, asked)


def load_sweep(sweep: Sweep, dirs: Sequence[Path] = ()) -> list[Config]:
    """Return the configurations of `sweep.variants`; UsageError with the problems of all of them."""
    configs: list[Config] = []
    mistakes: list[Problem] = []
    for variant in sweep.variants:
        try:
            configs.append(load(sweep.command, variant, dirs))
        except UsageError as found:
            mistakes += found.problems
    mistakes += [*_shared_name(sweep), *_shared_output(sweep), *shared_seeds(configs)]
    if mistakes:
        raise UsageError.several(mistakes)
    return configs


def _key(text: str) -> str:
    return text.partition("=")[0]


def _value(text: str) -> str:
    return text.partition("=")[2]


def _values(
    command: str, text: str, dirs: Sequence[Path], *, intervals: bool, closed_ranges: bool
) -> list[str]:
    """An override for each value of a word, or for some of the values that the sweeper may choose."""
    from hydra.core.override_parser.types import Glob

    item, key = parse(text), _key(text)
    if not item.is_sweep_override():
        return [text]
    value: Any = item.value()
    if isinstance(value, Glob):
        return [f"{key}={name}" for name in _matching(command, text, value, dirs)]
    if item.is_interval_sweep():
        if not intervals:
            remedy = f"add hydra/sweeper=optuna, or write {key}={value.start:g},{value.end:g}"
            raise UsageError(text, NO_VALUE, "an interval is not a list of values", remedy)
        inner = (
            []
            if isinstance(value.start, int) and isinstance(value.end, int)
            else [(2 * value.start + value.end) / 3]
        )
        return [f"{key}={number}" for number in (value.start, *inner, value.end)]
    if value.tags and not intervals:
        raise UsageError.several([tag_problem(text, value.tags, interval=False)])
    words = [f"{key}={word}" for word in item.sweep_string_iterator()]
    if not words:
        raise UsageError(text, NO_VALUE, "has no values", "give a start below the end")
    if not (intervals and item.is_range_sweep()) or value.shuffle:
        return words
    start, stop, step = (Decimal(str(number)) for number in (value.start, value.stop, value.step))
    return [words[0], f"{key}={stop - (stop - start) % step}" if closed_ranges else words[-1]]


def _matching(command: str, text: str, glob: "Glob", dirs: Sequence[Path]) -> list[str]:
    """The options of a group that match `group=glob(pattern)`."""
    key = _key(text)
    if key not in defaults(command):
        raise UsageError(text, NO_VALUE, "glob lists options of a group only", f"write {key}=1,2,3")
    known = list(options(key, dirs))
    if names := glob.filter(known):
        return names
    raise UsageError(text, NO_VALUE, "matches no option", f"choose from {', '.join(known)}")


def _shared_name(sweep: Sweep) -> list[Problem]:
    """The problem of a name that several trainings with different configurations have."""
    names = next((words for words in reversed(sweep.words) if _key(words[0]) == "name"), None)
    if sweep.command != "train" or names is None or names == ["name=null"]:
        return []
    swept = [key for key in sweep.keys if key != "name" and not may_change(key)]
    missing = [key for key in swept if any(f"${{{key}}}" not in name for name in names)]
    if not missing:
        return []
    name = ",".join(as_shown(text).partition("=")[2] for text in names)
    problem = f"jobs with other values of {' and '.join(missing)} would train in the same folder"
    return [Problem("name", name, problem, _own_places("train", "name", names, missing))]


def _shared_output(sweep: Sweep) -> list[Problem]:
    """The problem of a folder for the images of several jobs that differ in more than their seeds."""
    outputs = next((words for words in reversed(sweep.words) if _key(words[0]) == "output"), None)
    if sweep.command not in ("sample", "edit") or outputs is None or outputs == ["output=null"]:
        return []
    swept = [key for key in sweep.keys if key.partition(".")[0] in IMAGES]
    missing = [key for key in swept if any(f"${{{key}}}" not in output for output in outputs)]
    if not missing:
        return []
    output = ",".join(as_shown(text).partition("=")[2] for text in outputs)
    problem = f"images of other values of {' and '.join(missing)} would be in the same folder"
    return [Problem("output", output, problem, _own_places(sweep.command, "output", outputs, missing))]


def _own_places(command: str, key: str, words: Sequence[str], missing: Sequence[str]) -> str:
    """The remedy for one folder of several jobs: no folder, or one named by the jobs' values of the missing keys."""
    remedy = "leave it out, and each job has its own"
    if len(words) > 1 or any(name in defaults(command) for name in missing):
        return remedy
    values = "_".join(f"${{{name}}}" for name in missing)
    return f"{remedy}, or write '{as_shown(words[0])}_{values}'"

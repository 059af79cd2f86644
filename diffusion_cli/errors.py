"""Errors of a user, each shown as one line; every other exception is a fault of the machine or a bug."""

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple


class Missing(Enum):
    """The value of a key, a file or a word that has none."""

    NO_VALUE = ""


NO_VALUE = Missing.NO_VALUE


class Problem(NamedTuple):
    """One thing that is wrong with what a user asked for or gave, as `key=value: problem; remedy`."""

    key: Any
    """Dotted key of the configuration, word of the command line, or path."""
    value: Any
    """Value of the key, or NO_VALUE."""
    problem: str
    """What is wrong with it."""
    remedy: str = ""
    """What to do instead."""

    def __str__(self) -> str:
        named = f"{self.key}" if self.value is NO_VALUE else f"{self.key}={format_value(self.value)}"
        return f"{named}: {self.problem}" + (f"; {self.remedy}" if self.remedy else "")


class UsageError(ValueError):
    """A request is invalid, for one reason or several.

    Args:
        key: dotted key of the configuration, word of the command line, or path.
        value: value of the key; NO_VALUE for a word or a path.
        problem: what is wrong with it.
        remedy: what to do instead.
    """

    def __init__(self, key: Any, value: Any, problem: str, remedy: str = "") -> None:
        super().__init__(key, value, problem, remedy)
        self.problems: tuple[Problem, ...] = (Problem(key, value, problem, remedy),)

    @classmethod
    def several(cls, problems: Iterable[Problem]) -> "UsageError":
        """Return one error with several problems, each once, in their order."""
        first, *others = {str(problem): problem for problem in problems}.values()
        error = cls(*first)
        error.problems = (first, *others)
        return error

    def renamed(self, keys: Mapping[Any, str]) -> "UsageError":
        """Return the error with other keys, such as the one by which the user named a folder, for some of its own."""
        return UsageError.several(item._replace(key=keys.get(item.key, item.key)) for item in self.problems)

    @property
    def lines(self) -> tuple[str, ...]:
        """A line for each problem."""
        return tuple(str(problem) for problem in self.problems)

    def __str__(self) -> str:
        return "\n".join(self.lines)


class FormatError(ValueError):
    """Malformed content of a file or a value; the caller adds its name."""


class MachineError(OSError):
    """A disk, data that changed, or another process failed; one sentence says how."""


def format_value(value: Any) -> str:
    """Return a value as one writes it on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def first_line(error: Exception) -> str:
    """What an error says first; where it says nothing, its kind."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

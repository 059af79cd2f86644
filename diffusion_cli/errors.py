"""The exceptions that are shown as one line per problem. Any other exception is a bug."""

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

USER_ERROR, INTERNAL_ERROR = 2, 1
"""Exit codes of a request or a machine that fails, and of a bug."""


class Missing(Enum):
    """Marks a problem without a value, because None is a value."""

    NO_VALUE = ""


NO_VALUE = Missing.NO_VALUE


class Problem(NamedTuple):
    """One problem with a request, printed as `key=value: problem; remedy`."""

    key: Any
    """Dotted key of the configuration, word of the command line, or path."""
    value: Any
    """Value of the key, or NO_VALUE."""
    problem: str
    """What is wrong with it."""
    remedy: str = ""
    """What to do instead."""

    @property
    def cause(self) -> str:
        """The line without the remedy, to quote in another message."""
        named = f"{self.key}" if self.value is NO_VALUE else f"{self.key}={format_value(self.value)}"
        return f"{named}: {self.problem}"

    def __str__(self) -> str:
        return self.cause + (f"; {self.remedy}" if self.remedy else "")


class UsageError(ValueError):
    """An invalid request, with one or more problems.

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
        """Return one error with several problems, without duplicates, in their order."""
        first, *others = {str(problem): problem for problem in problems}.values()
        error = cls(*first)
        error.problems = (first, *others)
        return error

    def renamed(self, keys: Mapping[Any, str]) -> "UsageError":
        """Return a copy with keys replaced, for example a folder by the option that named it."""
        return UsageError.several(item._replace(key=keys.get(item.key, item.key)) for item in self.problems)

    @property
    def lines(self) -> tuple[str, ...]:
        """One line per problem."""
        return tuple(str(problem) for problem in self.problems)

    def __str__(self) -> str:
        return "\n".join(self.lines)


class FormatError(ValueError):
    """Malformed content of a file or a value. The caller adds the name of the file or key.

    Args:
        problem: what is wrong with it.
        remedy: what to do instead, if only the place of the problem can name it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.remedy = remedy


class MachineError(OSError):
    """A failure of the disk, the data or another process, described in one line."""


def lines_of(error: UsageError | MachineError) -> tuple[str, ...]:
    """Return the lines to print for an error, one per problem."""
    return error.lines if isinstance(error, UsageError) else (" ".join(str(error).split()),)


def format_value(value: Any) -> str:
    """Return a value in the syntax of the command line."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {format_value(item)}' for key, item in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def class_name(node: Mapping[str, Any]) -> str:
    """Return the class name of the `_target_` of a node."""
    return str(node.get("_target_")).rpartition(".")[2]


def option_name(name: str) -> str:
    """Return the name of the option that most likely has a class, such as log_normal for LogNormal."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def counted(number: int, noun: str) -> str:
    """Return a number with a noun in the singular or the plural, such as 1 image or 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def examples(names: Sequence[str]) -> str:
    """Return the first three of some names in quotes, each of at most 80 letters, and the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name[:80]) for name in names[:3]) + more


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if the message is empty."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""Values of a command line as Hydra's grammar writes them: text is taken as it is typed.

Hydra reads `1e3` as 1000.0, `2024_05` as 202405, `true` as a boolean and `null` as None, but a folder or a class may
have any of these names. Its grammar rejects `~`, `=`, parentheses, brackets, `;` and letters outside ASCII.
"""

import os
import re
import shlex
from collections.abc import Callable, Sequence
from decimal import Decimal
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from types import NoneType
from typing import Any

from diffusion_cli.config.catalogue import chosen
from diffusion_cli.config.key_types import item_kinds, kinds, types_of
from diffusion_cli.config.mapping_words import (
    MARK,
    as_mapping,
    double_quoted,
    has_mapping,
    is_of_label,
    quoted,
    separated,
    with_mappings,
)
from diffusion_cli.config.values import CLASS_KEYS, TEXT_KEYS
from diffusion_cli.system.compat import parse_override

OPENING, CLOSING = "[", "]"
SWEEPS = ("choice(", "range(", "interval(", "glob(", "shuffle(", "sort(", "tag(")
KEY = re.compile(r"[\w$/.@-]+", re.ASCII)
LARGE_NUMBER = re.compile(r"\d[\d_]*(\.\d*)?([eE]\+?\d{1,2})?")
"""Numbers in decimal or scientific notation, as counts may be written."""
SPECIAL = re.compile(r"""[,'"\\$\[\]{}]|^\s|\s$|^(null|)$""", re.IGNORECASE)
"""Text that needs quotes to be a single text on a command line."""


def as_typed(
    command: str, overrides: Sequence[str], dirs: Sequence[Path] = (), *, lists: bool = False
) -> list[str]:
    """Quote the text in overrides `key=value`, by the types of the keys, and write counts such as 1e5 in full.

    Commas separate the values of a sweep or a list. A leading `~` becomes the home directory, which shells expand at
    the beginning of a word only. A value with `${...}` or one of Hydra's functions is left to Hydra, and so is text
    with a backslash that Hydra can read.

    Args:
        command: name of the command.
        overrides: words of the command line.
        dirs: folders with options of the user.
        lists: whether brackets make a list of values also for keys that take one.
    """
    options = cache(lambda: chosen(command, overrides, dirs))

    def types(key: str) -> list[Any]:
        return types_of(command, key, options, dirs) or types_of(command, key, None, dirs)

    return [_typed(text, types, lists) for text in overrides]


def as_text(key: str, value: str) -> str:
    """Return the word, as it is written in a shell, that gives a key a text."""
    if not SPECIAL.search(value) and not value.startswith(SWEEPS):
        return shlex.quote(f"{key}={value}")
    return shlex.quote(f"{key}={double_quoted(value)}")


def as_shown(override: str) -> str:
    """Return an override without the quotes that `as_typed` added, for messages."""
    key, equals, value = override.partition("=")
    if value[:1] not in ("'", OPENING):
        return override
    return f"{key}{equals}" + re.sub(r"'([^'\\]*)'", lambda text: as_mapping(text[1]), value)


def as_pasted(override: str) -> str:
    """Return the word of a shell for an override."""
    key, _, value = override.partition("=")
    text = re.fullmatch(r"'([^'\\]*)'", value)
    return as_text(key, text[1]) if text else shlex.quote(override)


def misspelt_function(value: str) -> str | None:
    """Return the function of a sweep that a value such as `choise(1,2)` misspells; None for other values."""
    called = re.fullmatch(r"(\w+)\(.*\)", value.strip())
    if called is None or value.strip().startswith(SWEEPS) or readable(f"key={value}"):
        return None
    functions = [function.removesuffix("(") for function in SWEEPS]
    return next(iter(get_close_matches(called[1].lower(), functions, n=1, cutoff=0.7)), None)


def _typed(override: str, types: Callable[[str], list[Any]], lists: bool) -> str:
    key, equals, value = override.partition("=")
    if not equals or "${" in value or value.strip().startswith(SWEEPS) or not KEY.fullmatch(key):
        return override
    if value.startswith((f"'{MARK}", f"['{MARK}")):
        return override  # as this function wrote it
    if key in TEXT_KEYS and value[:1] not in ("'", '"', OPENING):
        return override if "\\" in value and readable(override) else f"{key}={_whole_text(value)}"
    of_classes = key in CLASS_KEYS or is_of_label(key)
    found = [] if of_classes else types(key)
    if (of_classes or dict in kinds(found)) and has_mapping(value):
        return f"{key}={with_mappings(key, value, as_text=of_classes)}"
    if of_classes:
        return override if "\\" in value else f"{key}={_each(value, quoted, quoted)}"
    if misspelt_function(value) and ("," in value or not _is_text(kinds(found))):
        return override  # so that Hydra's grammar refuses it
    is_mapping = dict in kinds(found) and value.strip().startswith("{")
    if ("\\" in value or is_mapping) and readable(override):
        return override
    single, listed = (partial(_written, accepted=of(found)) for of in (kinds, item_kinds))
    may_list = lists or list in kinds(found) or not _is_text(kinds(found))
    return f"{key}={_each(value, single, listed if may_list else None)}"


def _whole_text(value: str) -> str:
    """Write a text with its commas; `null` stays as it is."""
    return value if value.strip().lower() == "null" else quoted(value)


def _each(value: str, single: Callable[[str], str], listed: Callable[[str], str] | None) -> str:
    """Write each of the values that commas separate; without `listed`, brackets belong to a text."""
    return ",".join(_item(part, single, listed) for part in separated(value))


def _item(value: str, single: Callable[[str], str], listed: Callable[[str], str] | None) -> str:
    text = value.strip()
    if listed is not None and text.startswith(OPENING) and text.endswith(CLOSING):
        return f"[{_each(text[1:-1], listed, listed)}]"
    if not text or (text[0] in "'\"" and readable(f"key={text}")):
        return value
    return single(text)


def _written(text: str, accepted: frozenset[Any]) -> str:
    """Write one value of a key that accepts some kinds."""
    if _is_text(accepted):
        is_null = NoneType in accepted and text.lower() == "null"
        return text if is_null else quoted(_with_home(text))
    if int in accepted and float not in accepted and LARGE_NUMBER.fullmatch(text) and not text.isdecimal():
        number = Decimal(text)
        return str(int(number)) if number == int(number) else text
    if text[0] in "[{" or readable(f"key={text}"):
        return text
    return quoted(_with_home(text))


def _with_home(text: str) -> str:
    """Replace a leading `~` by the home directory; without such a user it is the name of a file."""
    expanded = os.path.expanduser(text)  # noqa: PTH111 - Path would also normalize other text
    return str(Path.cwd() / text) if expanded.startswith("~") else expanded


def _is_text(kinds: frozenset[Any]) -> bool:
    return str in kinds and not kinds & {int, float, bool}


def readable(override: str) -> bool:
    """Whether Hydra's grammar accepts an override."""
    try:
        parse_override(override)
    except Exception:  # antlr's and Hydra's own classes
        return False
    return True

"""Quoting of values on a command line, so that Hydra reads them as text.

YAML reads `1e3` as 1000.0, `true` as a boolean and `null` as None, but a class may have any of these names. Hydra's
grammar rejects `~`, `=`, parentheses, brackets, `;` and letters outside ASCII, but a path may contain them.
"""

import os
import re
import shlex
from collections.abc import Callable

from diffusion_cli.config.values import CLASS_KEYS
from diffusion_cli.system.compat import parse_override

OPENING, CLOSING = "[", "]"
SWEEPS = ("choice(", "range(", "interval(", "glob(", "shuffle(", "sort(", "tag(")
KEY = re.compile(r"[\w$/.@-]+", re.ASCII)


def as_typed(override: str) -> str:
    """Quote what Hydra would not read as typed in an override `key=value`: class names, and text that it rejects.

    Commas separate the values of a sweep or a list. A leading `~` becomes the home directory, which shells expand at
    the beginning of a word only. A value with `${...}` or one of Hydra's functions is left to Hydra, and so is a class
    name with quotes or a backslash.
    """
    key, equals, value = override.partition("=")
    if not equals or "${" in value or value.strip().startswith(SWEEPS):
        return override
    if key in CLASS_KEYS:
        return override if "\\" in value else f"{key}={_each(value, quoted)}"
    if not KEY.fullmatch(key) or _readable(override):
        return override
    return f"{key}={_each(value, _quoted_if_rejected)}"


def quoted(text: str) -> str:
    """A text in quotes. Hydra reads backslashes as they are, unless a quote follows them."""
    return "'" + re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + match[2].replace("'", r"\'"), text) + "'"


def as_text(key: str, value: str) -> str:
    """Return the word for a shell that gives a key a text which Hydra would read otherwise."""
    return (
        f"""'{key}="{value}"'""" if not set(value) & set("'\"\\$") else shlex.quote(f"{key}={quoted(value)}")
    )


def separated(value: str) -> list[str]:
    """Split a value at the commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in value:
        if letter == "," and depth == 0 and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not parts[-1].strip(" ["):
            quote = letter
        depth += (letter == OPENING) - (letter == CLOSING) if not quote else 0
        parts[-1] += letter
    return parts


def _each(value: str, quote: Callable[[str], str]) -> str:
    """Quote each of the values that commas separate, also within a list."""
    return ",".join(_item(part, quote) for part in separated(value))


def _item(value: str, quote: Callable[[str], str]) -> str:
    text = value.strip()
    if text.startswith(OPENING) and text.endswith(CLOSING):
        return f"[{_each(text[1:-1], quote)}]"
    return value if not text or text[0] in "'\"" else quote(text)


def _quoted_if_rejected(text: str) -> str:
    if text[0] in "[{" or _readable(f"key={text}"):
        return text
    return quoted(os.path.expanduser(text))  # noqa: PTH111 - Path would also normalize other text


def _readable(override: str) -> bool:
    """Whether Hydra's grammar accepts an override."""
    try:
        parse_override(override)
    except Exception:  # antlr's and Hydra's own classes
        return False
    return True

"""Mappings on a command line: `label={species: frog, age: 40}`, and `label.age=[0,20]` for one of its names.

Hydra's grammar reads few letters in the names of a mapping. A mapping is therefore one quoted text for Hydra: JSON
after a mark. It is read back after the composition.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_cli.errors import NO_VALUE, Problem, UsageError, format_value
from diffusion_cli.system.compat import parse_override

LABEL = "label"
MARK = "json:"
OPENING, CLOSING, QUOTES = "[{", "]}", "'\""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
PLAIN = {"true": True, "false": False, "null": None}


def is_of_label(key: str) -> bool:
    """Return whether a key is one name of the label, such as `label.age`."""
    return key.startswith(f"{LABEL}.") and len(key) > len(LABEL) + 1


def has_mapping(value: str) -> bool:
    """Return whether a value, or an item of a list, is a mapping."""
    parts = [part.strip() for part in separated(value)]
    items = [item.strip() for part in parts if part.startswith("[") for item in separated(part[1:-1])]
    return any(part.startswith("{") for part in (*parts, *items))


def with_mappings(key: str, value: str, as_text: bool) -> str:
    """Return values, lists and mappings, which commas separate, as Hydra's grammar reads them.

    Args:
        key: key of the value, for errors.
        value: the value as it is typed.
        as_text: whether values in a mapping are text, such as names of classes, also if they look like numbers.

    Raises:
        UsageError: for a mapping that is not closed, has a name twice, or a name without a value.
    """
    return ",".join(_word(key, part.strip(), as_text) for part in separated(value))


def encoded(value: Mapping[str, Any]) -> str:
    """Return a mapping as text that `decoded` reads."""
    return MARK + json.dumps(value, ensure_ascii=False)


def decoded(value: Any) -> Any:
    """Return plain data with the mappings that they contain as text."""
    if isinstance(value, dict):
        return {key: decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, str) or not value.startswith(MARK + "{"):
        return value
    try:
        return json.loads(value.removeprefix(MARK))
    except json.JSONDecodeError:
        return value


def as_mapping(text: str) -> str:
    """Return text as a user writes it, with the mappings that it contains in braces."""
    value = decoded(text)
    if not isinstance(value, dict):
        return text
    pairs = (f"{name}: {_shown(item)}" for name, item in value.items())
    return f"{{{', '.join(pairs)}}}"


def with_one_label(overrides: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Return overrides with one `label=` for all words `label.<name>=`, and a problem for each conflict.

    Args:
        overrides: words of a command line as Hydra reads them. Several values of a sweep are left as they are.
    """
    named = [text for text in overrides if is_of_label(_key(text))]
    values = {text: found for text in named if (found := _parsed(text)) is not None}
    if not values:
        return [*overrides], []
    whole = [text for text in overrides if _key(text) == LABEL]
    stated = _parsed(whole[-1]) if whole else ({},)
    base = None if stated is None else decoded(stated[0])
    others = [text for text in overrides if text not in values]
    if not isinstance(base, dict):
        conflict = f"conflicts with {LABEL}={format_value(base)}"
        return others, [Problem(_key(named[0]), NO_VALUE, conflict, "leave one of them out")]
    label = {**base, **{_key(text).removeprefix(f"{LABEL}."): found for text, (found,) in values.items()}}
    return [text for text in others if text not in whole] + [f"{LABEL}={quoted(encoded(label))}"], []


def quoted(text: str) -> str:
    """A text in quotes. Hydra reads backslashes as they are, unless a quote follows them."""
    return "'" + re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + match[2].replace("'", r"\'"), text) + "'"


def double_quoted(text: str) -> str:
    """A text in double quotes, which a shell leaves unchanged within single ones; as `quoted` where that cannot be."""
    return quoted(text) if set(text) & set("'\"\\$") else f'"{text}"'


def separated(value: str) -> list[str]:
    """Split a value at the commas outside of brackets, braces and quotes; a quote begins a value."""
    parts, depth, quote = [""], 0, ""
    for letter in value:
        if letter == "," and depth == 0 and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if letter == quote and not _is_escaped(parts[-1]) else quote
        elif letter in QUOTES and parts[-1].rstrip()[-1:] in ("", ":", ",", *OPENING):
            quote = letter
        elif letter in OPENING + CLOSING:
            depth = max(0, depth + (1 if letter in OPENING else -1))
        parts[-1] += letter
    return parts


def _is_escaped(text: str) -> bool:
    """Whether a quote after a text is part of it, by an odd number of backslashes."""
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def _key(text: str) -> str:
    return text.partition("=")[0]


def _parsed(text: str) -> tuple[Any] | None:
    """Return the value of an override in a tuple, or None for a sweep and for text that Hydra cannot read."""
    try:
        override = parse_override(text)
    except Exception:  # antlr's and Hydra's own classes
        return None
    return None if override.is_sweep_override() else (override.value(),)


def _word(key: str, text: str, as_text: bool) -> str:
    """Return one value as Hydra's grammar reads it."""
    if text.startswith("[") and text.endswith("]"):
        items = separated(text[1:-1]) if text[1:-1].strip() else []
        return f"[{','.join(_word(key, item.strip(), as_text) for item in items)}]"
    return quoted(encoded(_mapping(key, text, as_text)) if text.startswith("{") else _unquoted(text))


def _mapping(key: str, text: str, as_text: bool) -> dict[str, Any]:
    """Return the mapping that a text in braces is."""
    pairs = [_pair(pair) for pair in separated(text[1:-1])] if text[1:-1].strip() else []
    if not text.endswith("}") or not all(name and colon for name, colon, _ in pairs):
        raise UsageError(key, text, "not a mapping of names to values", f"write {key}={{name: value}}")
    names = [name for name, _, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(key, text, f"contains {twice[0]} twice", "leave one out")
    return {name: _plain(value.strip(), as_text) for name, _, value in pairs}


def _pair(pair: str) -> tuple[str, str, str]:
    """Split `name: value`; a name in quotes may contain a colon."""
    text = pair.strip()
    if found := re.match(r"""(["'])(.*?)\1\s*:""", text):
        return found[2], ":", text[found.end() :]
    name, colon, value = text.partition(":")
    return name.strip(), colon, value


def _plain(text: str, as_text: bool) -> Any:
    """Return one value in a mapping: a list, text, or what the text spells."""
    if text.startswith("[") and text.endswith("]"):
        items = separated(text[1:-1]) if text[1:-1].strip() else []
        return [_plain(item.strip(), as_text) for item in items]
    if as_text or text[:1] in ("'", '"'):
        return None if text == "null" else _unquoted(text)
    if text in PLAIN:
        return PLAIN[text]
    if NUMBER.fullmatch(text):
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    return text


def _unquoted(text: str) -> str:
    is_quoted = len(text) > 1 and text[0] in QUOTES and text[-1] == text[0]
    return text[1:-1].replace(f"\\{text[0]}", text[0]) if is_quoted else text


def _shown(value: Any) -> str:
    return f"[{', '.join(map(format_value, value))}]" if isinstance(value, list) else format_value(value)

"""Values that are names of classes, read as they are typed.

YAML turns `1e3` into 1000.0, and `true` and `null` into values that are no text. Only the data set decides whether a
class has such a name.
"""

from diffusion_cli.config.values import CLASS_KEYS

OPENING, CLOSING = "[", "]"
SWEEPS = ("choice(", "range(", "interval(", "glob(", "shuffle(", "sort(", "tag(")


def as_typed(override: str) -> str:
    """An override `key=value` with each name of a class in quotes, so that Hydra reads it as text.

    Commas separate the values of a sweep or a list. A value with quotes, a backslash, a `${...}` or one of Hydra's
    functions is left to Hydra.
    """
    key, equals, value = override.partition("=")
    if key not in CLASS_KEYS or "\\" in value or "${" in value or value.strip().startswith(SWEEPS):
        return override
    return f"{key}{equals}{','.join(map(_quoted, _parts(value)))}"


def _quoted(value: str) -> str:
    text = value.strip()
    if text.startswith(OPENING) and text.endswith(CLOSING):
        return f"[{','.join(map(_quoted, _parts(text[1:-1])))}]"
    if not text or text[0] in "'\"":
        return value
    return "'" + text.replace("'", r"\'") + "'"


def _parts(value: str) -> list[str]:
    """What commas separate, outside of brackets and quotes."""
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

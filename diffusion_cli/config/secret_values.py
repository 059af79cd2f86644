"""Secrets in a configuration, which would be stored and shown with every run."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_cli.errors import NO_VALUE, Problem

NAME = re.compile(r"(api_?key|token|password|secret)$", re.IGNORECASE)
"""End of the name of a setting of a logger or a callback that is a secret."""
QUERY_NAME = re.compile(r"(api_?key|token|password|secret|signature|\bsig|\bkey|\bauth)$", re.IGNORECASE)
"""End of the name of a query parameter that is a secret, as in X-Amz-Signature."""
PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]*@")
PARAMETER = re.compile(r"[?&;]([\w.-]+)=[^&\s]")
LIBRARIES = "logger.", "callback."
LIBRARY = "set the variable of its library"
FILES = "set FSSPEC_HTTPS, or use the login of the provider"


def secrets_in(composed: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for each secret: a setting of a logger or a callback, or a part of any URL."""
    return [
        Problem(key, NO_VALUE, f"{problem}, which config.yaml would store", remedy)
        for key, value in _values(composed)
        if (problem := _problem(key, value))
        for remedy in [LIBRARY if key.startswith(LIBRARIES) else FILES]
    ]


def _problem(key: str, value: Any) -> str | None:
    if key.startswith(LIBRARIES) and NAME.search(key) and value is not None:
        return "a secret"
    if not isinstance(value, str) or "://" not in value:
        return None
    if PASSWORD.search(value):
        return "contains a password"
    names = PARAMETER.findall(value.partition("://")[2])
    found = next(filter(QUERY_NAME.search, names), None)
    return found and f"contains the secret {found}=..."


def _values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values in nested mappings and lists."""
    if isinstance(value, Mapping):
        for name, nested in value.items():
            yield from _values(nested, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for nested in value:
            yield from _values(nested, key)
    else:
        yield key, value

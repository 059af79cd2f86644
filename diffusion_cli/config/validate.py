"""Validation of values, against the schema of a command or the constructor that a node names."""

import difflib
import importlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, create_model

from diffusion_cli.config.catalogue import CONF, PACKAGE, did_you_mean
from diffusion_cli.config.signature import signature
from diffusion_cli.config.values import FORMS, STRICT
from diffusion_cli.errors import Problem, UsageError, format_value


@cache
def classes(group: str) -> frozenset[str]:
    """The classes that nodes of a group may name: those of the group's option files."""
    contents = (yaml.safe_load(file.read_text()) for file in (CONF / group).glob("*.yaml"))
    return frozenset(target for content in contents for target in _targets(content))


def _targets(node: Any) -> Iterator[str]:
    """Yield every `_target_` in the content of an option file."""
    if isinstance(node, Mapping):
        yield from ([node["_target_"]] if "_target_" in node else [])
        for item in node.values():
            yield from _targets(item)


def check_node(key: str, node: Mapping[str, Any]) -> list[Problem]:
    """Check a node `{_target_: class, argument: value, ...}` of a group and return its problems.

    Only `classes(group)` are allowed, so that an untrusted checkpoint cannot name any other class.
    """
    arguments = {str(name): value for name, value in node.items() if name != "_target_"}
    group, target = key.partition(".")[0], node.get("_target_")
    types = signature(target) if isinstance(target, str) and target in classes(group) else None
    if types is None:
        return [
            Problem(
                f"{key}._target_",
                format_value(target)[:80],
                f"is not a class of {PACKAGE} for {group}",
                "only those are built",
            )
        ]
    fields: dict[str, Any] = {name: (kind, ...) for name, kind in types.items()}
    return validate(create_model(key, __config__=STRICT, **fields), arguments, key)[1]


def validate(
    model: type[BaseModel], values: Mapping[str, Any], prefix: str = ""
) -> tuple[Any, list[Problem]]:
    """Build a pydantic model of values; return it, or None and one problem a key."""
    try:
        return model.model_validate(dict(values)), []
    except ValidationError as error:
        problems: list[Problem] = []
        wrong: dict[str, tuple[Any, list[str]]] = {}
        for detail in error.errors(include_url=False):
            reason = detail.get("ctx", {}).get("error")
            if isinstance(reason, UsageError):
                problems += reason.problems
                continue
            path, value = _path(values, detail["loc"], prefix)
            wrong.setdefault(path, (value, []))[1].append(_remedy(detail, model))
        return None, [
            Problem(path, value, " or ".join(dict.fromkeys(what)).replace(" or should be ", " or "))
            for path, (value, what) in wrong.items()
        ] + problems


def _path(values: Any, location: tuple[int | str, ...], prefix: str) -> tuple[str, Any]:
    """Return the dotted key of an error, without names of union members, and its value."""
    keys = [prefix] if prefix else []
    for part in location:
        if isinstance(values, Mapping) and part not in values and len(keys) > bool(prefix):
            break
        if not isinstance(values, Mapping | list) or (isinstance(values, list) and not isinstance(part, int)):
            break
        keys.append(str(part))
        values = (
            values.get(part)
            if isinstance(values, Mapping)
            else values[part]
            if isinstance(part, int)
            else None
        )
    return ".".join(keys), values


def _remedy(detail: Any, model: type[BaseModel]) -> str:
    kind, message, value = detail["type"], detail["msg"], detail["input"]
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(str(detail['loc'][-1]), list(model.model_fields))}"
    if kind == "missing":
        return "missing; give it a value"
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'|(\d+)", detail["ctx"]["expected"])
        expected = [word or number for word, number in expected]
        near = difflib.get_close_matches(str(value), expected, n=1)
        return f"should be {' or '.join(expected)}" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "string_pattern_mismatch":
        return f"should be {FORMS[detail['ctx']['pattern']]}"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind == "too_short":
        return f"should have at least {detail['ctx']['min_length']}"
    return message.replace("Input should be", "should be")


def build(node: Mapping[str, Any] | None, *supplied: Any) -> Any:
    """Build the object of a checked node, `target(*supplied, **arguments)`; None for no node."""
    if node is None:
        return None
    module, _, name = node["_target_"].rpartition(".")
    assert module.split(".")[0] == PACKAGE, node
    target = getattr(importlib.import_module(module), name)
    return target(*supplied, **{str(key): value for key, value in node.items() if key != "_target_"})

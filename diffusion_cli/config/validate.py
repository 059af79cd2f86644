"""Validation of values, against the schema of a command or the constructor that a node names."""

import difflib
import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from diffusion_cli.config import libraries, plugins
from diffusion_cli.config.catalogue import CONF, PACKAGE, content, did_you_mean
from diffusion_cli.config.recipe import DERIVED
from diffusion_cli.config.signature import arguments, imported, is_foreign
from diffusion_cli.config.values import FORMS, NAME, STRICT
from diffusion_cli.errors import NO_VALUE, Problem, UsageError, format_value
from diffusion_cli.system.untrusted import reason

ANY_TYPE = STRICT | ConfigDict(arbitrary_types_allowed=True)
NOT_ALLOWED = "is not a class of an allowed plugin"


IMPORTED = {"model": f"{PACKAGE}.networks.VQModel"}
"""Class without an option file, by group, because only imported models have it."""


@cache
def classes(group: str) -> frozenset[str]:
    """The classes that nodes of a group may name: those of the group's option files, and `IMPORTED`."""
    files = (CONF / group).glob("*.yaml")
    named = {target for file in files for target in _targets(content(file))}
    return frozenset(named | ({IMPORTED[group]} if group in IMPORTED else set()))


def _targets(node: Any) -> Iterator[str]:
    """Yield every `_target_` in the content of an option file."""
    if isinstance(node, Mapping):
        yield from ([node["_target_"]] if "_target_" in node else [])
        for item in node.values():
            yield from _targets(item)


def check_node(key: str, node: Mapping[str, Any]) -> list[Problem]:
    """Check a node `{_target_: class, argument: value, ...}` of a group and return its problems.

    Only `classes(group)`, those of allowed plugins and those of the group's library are built, so that an untrusted
    checkpoint cannot name another.
    """
    given = {str(name): value for name, value in node.items() if name != "_target_"}
    group, target = key.partition(".")[0], node.get("_target_")
    if not isinstance(target, str):
        return [_not_built(f"{key}._target_", target, group)]
    try:
        if problem := _unsuitable(f"{key}._target_", target, group):
            return [problem]
        fields: dict[str, Any] = arguments(target)
    except UsageError as error:
        return list(error.problems)
    functions = [
        name for name, (kind, value) in fields.items() if value is ... and libraries.is_function(kind)
    ]
    if functions:
        problem = "needs a function, which a configuration cannot give"
        remedy = f"derive a class in a plugin, or use another {group}"
        return [Problem(f"{key}.{name}", NO_VALUE, problem, remedy) for name in functions]
    if target in classes(group) and not is_foreign(target):
        model = _own_model(key, target)
    else:
        open_ended = is_foreign(target) and libraries.takes_others(imported(target))
        extra = ConfigDict(extra="allow") if open_ended else ConfigDict()
        model = create_model(key, __config__=ANY_TYPE | extra, **fields)
    # The default of a class is valid, even if its type does not say so (`depth: int = None`).
    given = {name: value for name, value in given.items() if fields.get(name, (None, ...))[1] != value}
    positional = plugins.positional(target) if plugins.is_allowed(target) else []
    return [
        problem._replace(problem="not keyword-only", remedy=f"write *, before it in __init__ of {target}")
        if problem.key in {f"{key}.{name}" for name in positional}
        else problem
        for problem in validate(model, given, key)[1]
    ]


@cache
def _own_model(key: str, target: str) -> type[BaseModel]:
    """Return the model of the arguments of a class of this package."""
    fields: dict[str, Any] = arguments(target)
    return create_model(key, __config__=ANY_TYPE, **fields)


def _unsuitable(key: str, target: str, group: str) -> Problem | None:
    """Return the problem of a class that nodes of a group may not name; None for one that they may."""
    if plugins.is_allowed(target):
        return plugins.suits(target, group)
    if libraries.is_named(target, group):
        module, _, name = target.rpartition(".")
        known = [*libraries.exported(module)]
        problem = f"not a class of {module} for {group}"
        return None if name in known else Problem(key, target, problem, did_you_mean(name, known))
    return None if target in classes(group) else _not_built(key, target, group)


def _not_built(key: str, target: Any, group: str) -> Problem:
    """The problem of a class that is neither one of ours nor of an allowed plugin."""
    module = target.partition(".")[0] if isinstance(target, str) and "." in target else PACKAGE
    if module == PACKAGE or module in sys.stdlib_module_names:
        problem = f"not a class of {PACKAGE} for {group}"
        return Problem(key, format_value(target)[:80], problem, "use the _target_ of an option")
    remedy = f"add plugins=[{module[:80]}] if you trust this module"
    return Problem(key, format_value(target)[:80], NOT_ALLOWED, remedy)


def validate(
    model: type[BaseModel], values: Mapping[str, Any], prefix: str = ""
) -> tuple[Any, list[Problem]]:
    """Build a pydantic model of values; return it, or None and one problem for each key."""
    try:
        return model.model_validate(dict(values)), []
    except ValidationError as error:
        problems: list[Problem] = []
        details: dict[str, tuple[Any, list[Any]]] = {}
        for detail in error.errors(include_url=False):
            cause = detail.get("ctx", {}).get("error")
            if isinstance(cause, UsageError):
                problems += cause.problems
                continue
            path, value = _path(values, detail["loc"], prefix)
            details.setdefault(path, (value, []))[1].append(detail)
        for path in [*details]:
            # A value in a mapping is the mistake; that the mapping is no text is none.
            if isinstance(details[path][0], Mapping) and any(each.startswith(f"{path}.") for each in details):
                del details[path]
        return None, [
            Problem(path, _shown(value, found), *_problem(path, value, found, model))
            for path, (value, found) in details.items()
        ] + problems


def _shown(value: Any, details: Sequence[Any]) -> Any:
    """Return the value of a key with errors; none for a missing key."""
    return NO_VALUE if any(detail["type"] == "missing" for detail in details) else value


def _path(values: Any, location: tuple[int | str, ...], prefix: str) -> tuple[str, Any]:
    """Return the dotted key of an error, without names of union members, and its value."""
    keys = [prefix] if prefix else []
    for place, part in enumerate(location):
        if isinstance(values, Mapping) and part not in values and len(keys) > bool(prefix):
            if any(later in values for later in location[place + 1 :]):
                continue
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


def _problem(key: str, value: Any, details: Sequence[Any], model: type[BaseModel]) -> tuple[str, str]:
    """The problem and the remedy of a value that pydantic rejects, from the errors of all members of its type."""
    kinds = {detail["type"]: detail for detail in details}
    if "missing" in kinds:
        return "missing", f"add {key}=<value>"
    if detail := kinds.get("extra_forbidden"):
        *parents, name = map(str, detail["loc"])
        fields = getattr(_annotation(model, parents), "model_fields", {})
        return "unknown key", did_you_mean(name, list(fields), "".join(f"{parent}." for parent in parents))
    if detail := kinds.get("value_error"):
        return str(detail["ctx"]["error"]), ""
    location = details[0]["loc"]
    annotation = _annotation(model, location)
    if "model_type" in kinds and (fields := getattr(annotation, "model_fields", {})):
        return "not a single value", f"set {' or '.join(f'{key}.{name}' for name in fields)}"
    of_mapping = any(get_origin(kind) is dict for kind in (annotation, *get_args(annotation)))
    if isinstance(value, list) and value and of_mapping and not {"dict_type", "list_type"} & {*kinds}:
        mapping, _, name = key.rpartition(".")
        return "must be one value, not a list", f"write {mapping}={{{name}: {format_value(value[0])}}}"
    accepted = [name for detail in details for name in _accepted(detail)]
    words = [name for detail in details for name in _literals(detail)]
    accepted += ["auto"] if key in DERIVED else []
    fields = getattr(_annotation(model, location[:-1]), "model_fields", {})
    is_item = any(isinstance(part, int) for part in location) or (
        key.endswith(f".{location[-1]}") and location[-1] not in fields
    )
    accepted += ["null"] if not is_item and NoneType in get_args(annotation) else []
    *others, last = dict.fromkeys(accepted)
    problem = f"must be {', '.join(others)} or {last}" if others else f"must be {last}"
    if others and key not in DERIVED and (numbers := _numbers(annotation)):
        problem = f"must be {numbers}, or null"
    near = difflib.get_close_matches(
        OTHER_WORDS.get(value, str(value).lower()) if isinstance(value, str) else "", words, n=1
    )
    if near:
        return problem, f"did you mean {near[0]}?"
    if value == "":
        return f"no value; {problem}", ""
    if FORMS[NAME] in accepted and (name := re.sub(r"[^\w.+-]+", "_", str(value)).strip("._+-")):
        return problem, f"write {key}={name}"
    if "string_type" in kinds and isinstance(value, int | float):
        return problem, f'quote it in its file: {key.rpartition(".")[2]}: "{format_value(value)}"'
    if "list_type" in kinds and not isinstance(value, Mapping):
        return problem, f"write {key}=[{format_value(value)}]"
    return problem, ""


def _numbers(annotation: Any) -> str:
    """Return the range of real numbers and an example, if null is the only other value of a type; else an empty text.

    For example: a number greater than 0 and less than 1, such as 0.5.
    """
    kind, *others = get_args(annotation) or [None]
    if others != [NoneType] or get_args(kind)[:1] != (float,):
        return ""
    constraints = [each for item in get_args(kind)[1:] for each in getattr(item, "metadata", [item])]
    found = {
        name: bound
        for name in BOUNDS
        for each in constraints
        if (bound := getattr(each, name, None)) is not None
    }
    low, high = found.get("gt", found.get("ge")), found.get("lt", found.get("le"))
    if low is None:
        return ""
    example = low + 1 if high is None else (low + high) / 2
    return f"a number {' and '.join(f'{BOUNDS[name]} {bound:g}' for name, bound in found.items())}, such as {example:g}"


BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
"""Words for the bounds of a type, by pydantic's name."""
OTHER_WORDS = {"gpu": "cuda"}
"""Literal values by their names in other programs."""
PLAIN = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping {{key: value}}",
    "model_type": "a mapping {{key: value}}",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of {min_length} or more values",
    "too_long": "a list of at most {max_length} values",
}
"""What a value must be, by the type of pydantic's error and with the fields of its context."""


def _accepted(detail: Any) -> list[str]:
    """The values that one member of a type accepts, given its error."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "literal_error":
        return _literals(detail)
    if kind == "bool_type":
        return ["true", "false"]
    if kind == "string_pattern_mismatch":
        return [FORMS[context["pattern"]]]
    plain = PLAIN.get(kind)
    bounds = {
        name: int(bound) if bound == int(bound) else bound
        for name, bound in context.items()
        if isinstance(bound, int | float)
    }
    return [plain.format_map(bounds) if plain else detail["msg"].removeprefix("Input should be ")]


def _literals(detail: Any) -> list[str]:
    """The values of a literal type."""
    if detail["type"] != "literal_error":
        return []
    found = re.findall(r"'([^']*)'|(\d+|True|False)", detail["ctx"]["expected"])
    return [word or other.lower() for word, other in found]


def _annotation(model: type[BaseModel], location: Sequence[int | str]) -> Any:
    """The type of a key of a model, or of a model within it."""
    annotation: Any = model
    for name in location:
        fields = getattr(annotation, "model_fields", {})
        if name not in fields:
            break
        annotation = fields[name].annotation
    return annotation


def target(node: Mapping[str, Any]) -> Any:
    """Return the class, or the function, that a checked node names."""
    if is_foreign(node["_target_"]):
        return imported(node["_target_"])
    module, _, name = node["_target_"].rpartition(".")
    assert module.split(".")[0] == PACKAGE, node
    return getattr(importlib.import_module(module), name)


def build_user(key: str, node: Mapping[str, Any]) -> Any:
    """Build the object of a node that a user chose; UsageError, about `key`, for an error of its class."""
    try:
        return build(node)
    except UsageError:
        raise
    except Exception as error:  # libraries raise errors of many types
        problem = f"{type(error).__name__}: {reason(error)}"
        raise UsageError(key, NO_VALUE, problem, "correct its values, or leave it out") from error


def build(node: Mapping[str, Any] | None, *supplied: Any) -> Any:
    """Build the object of a checked node, `target(*supplied, **arguments)`; None for no node."""
    if node is None:
        return None
    given = {str(key): value for key, value in node.items() if key != "_target_"}
    if plugins.is_allowed(node["_target_"]):
        plugins.check_call(node["_target_"], supplied, given)
    return target(node)(*supplied, **given)

"""Values against types: those of a command's schema, and those of the class that a node names.

What an argument may be is said once, by the annotation of the class; it is read from the source, so that a
mistake costs no import.
"""

import ast
import difflib
import importlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
)

from diffusion_cli.config.catalogue import CONF, HERE, PACKAGE, did_you_mean
from diffusion_cli.config.values import FORMS, STRICT
from diffusion_cli.errors import Problem, UsageError, format_value

# What annotations of configurable arguments may be made of.
VOCABULARY = {
    "int": int, "float": float, "bool": bool, "str": str, "list": list, "dict": dict, "Sequence": list,
    "Literal": Literal, "Annotated": Annotated, "Field": Field,
    "PositiveInt": PositiveInt, "NonNegativeInt": NonNegativeInt,
    "PositiveFloat": PositiveFloat, "NonNegativeFloat": NonNegativeFloat,
}  # fmt: skip


@cache
def _definitions(module: str) -> dict[str, ast.AST]:
    """The top-level names of a module of this package, each with the node that makes it; not imported."""
    path = HERE.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        return {}
    found: dict[str, ast.AST] = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            found |= {alias.asname or alias.name: node for alias in node.names}
    return found


def _find(module: str, name: str) -> tuple[str, ast.AST] | None:
    """Where a name is defined, following imports within the package."""
    node = _definitions(module).get(name)
    if isinstance(node, ast.ImportFrom):
        return _find(node.module or "", name)
    return None if node is None else (module, node)


class _Names(dict[str, Any]):
    """The vocabulary, and the names that a module gives to types made of it (`Fraction = Annotated[...]`)."""

    def __init__(self, module: str) -> None:
        super().__init__(VOCABULARY)
        self.module = module

    def __missing__(self, name: str) -> Any:
        found = _find(self.module, name)
        if found is None or not isinstance(found[1], ast.Assign):
            raise NameError(f"{self.module}: {name} is not a word for annotations")
        return _type(found[1].value, found[0])


def _type(annotation: ast.expr, module: str) -> Any:
    """What an annotation in a module means, its names looked up without importing anything."""
    return eval(compile(ast.Expression(annotation), module, "eval"), {}, _Names(module))


def signature(target: str) -> dict[str, Any] | None:
    """The configurable (keyword-only) arguments of a class of this package by name, with their types.

    None if there is no such class. The source is read, nothing is imported.
    """
    found = _find(*target.rpartition(".")[::2]) if target.startswith(f"{PACKAGE}.") else None
    if found is None:
        return None
    module, node = found
    if isinstance(node, ast.Assign):
        return None
    if isinstance(node, ast.ClassDef):
        inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        if not inits:
            bases = (signature(f"{module}.{base.id}") for base in node.bases if isinstance(base, ast.Name))
            return next((arguments for arguments in bases if arguments is not None), {})
        node = inits[0]
    assert isinstance(node, ast.FunctionDef)
    return {
        argument.arg: _type(argument.annotation, module)
        for argument in node.args.kwonlyargs
        if argument.annotation is not None
    }


@cache
def classes(group: str) -> frozenset[str]:
    """What nodes of a group may name: what its own option files do."""
    contents = (yaml.safe_load(file.read_text()) for file in (CONF / group).glob("*.yaml"))
    return frozenset(target for content in contents for target in _targets(content))


def _targets(node: Any) -> Iterator[str]:
    """Every `_target_` in the content of an option file."""
    if isinstance(node, Mapping):
        yield from ([node["_target_"]] if "_target_" in node else [])
        for item in node.values():
            yield from _targets(item)


def check_node(key: str, node: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with a node `{_target_: class, argument: value, ...}` of a group, one line each.

    Nothing but `classes(group)` is ever built, whatever a checkpoint of a stranger names.
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
    """The model made of values, or None and what is wrong with them, one problem a key."""
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
    """The dotted key that an error is about, and its value; a union's member names are left out."""
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
    """Make what a checked node names: `target(*supplied, **arguments)`; None of a part that there is not."""
    if node is None:
        return None
    module, _, name = node["_target_"].rpartition(".")
    assert module.split(".")[0] == PACKAGE, node
    target = getattr(importlib.import_module(module), name)
    return target(*supplied, **{str(key): value for key, value in node.items() if key != "_target_"})

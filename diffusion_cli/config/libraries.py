"""Classes of torch and Lightning that nodes of some groups may name: `_target_: torch.optim.RAdam`.

Only the classes that the module itself exports can be named. Nothing is imported before a configuration names one.
"""

import collections.abc
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import Field


class Library(NamedTuple):
    """The classes of a library for a group."""

    module: str
    base: str
    """Base class, which the module exports too."""
    supplied: int
    """Number of arguments that the program passes by position."""


LIBRARIES = {
    "optimizer": Library("torch.optim", "Optimizer", 1),
    "lr_schedule": Library("torch.optim.lr_scheduler", "LRScheduler", 1),
    "logger": Library("lightning.pytorch.loggers", "Logger", 0),
    "callback": Library("lightning.pytorch.callbacks", "Callback", 0),
}
"""The library of each group that has one."""
IN_YAML = (int, float, bool, str, list, dict, tuple, NoneType, Path)
"""Types of the values that a configuration can give; libraries accept others beside them, such as tensors."""


def is_named(target: str, group: str | None = None) -> bool:
    """Return whether a path has the form of a class of the group's library, or of any; imports nothing."""
    libraries = LIBRARIES.values() if group is None else [LIBRARIES[group]] if group in LIBRARIES else []
    return target.rpartition(".")[0] in {library.module for library in libraries}


def contains(module: str) -> bool:
    """Return whether a module is one of `LIBRARIES`, inside one, or a package that may export its classes."""
    pairs = ((f"{module}.", f"{library.module}.") for library in LIBRARIES.values())
    return any(of.startswith(other) or other.startswith(of) for of, other in pairs)


def exported(module: str) -> dict[str, Any]:
    """Import a module of `LIBRARIES` and return its classes by name, without the base class and abstract ones."""
    library = next(library for library in LIBRARIES.values() if library.module == module)
    found = importlib.import_module(module)
    base = getattr(found, library.base)
    classes = {name: getattr(found, name) for name in found.__all__}
    return {
        name: kind
        for name, kind in classes.items()
        if inspect.isclass(kind)
        and issubclass(kind, base)
        and kind is not base
        and not inspect.isabstract(kind)
    }


def imported(target: str) -> Any:
    """Import a class of a library; only one that its module exports is found."""
    module, _, name = target.rpartition(".")
    return exported(module)[name]


def parameters(found: Any) -> dict[str, tuple[Any, Any]]:
    """Return the arguments of a class that a configuration may set: type and default by name, `...` for none.

    Those of a class with a base in `LIBRARIES` are all except the first ones, which the program passes; those of
    other classes are the keyword-only ones.
    """
    supplied = _supplied(found)
    types = dict(_types(found.__init__))
    return {
        item.name: (types.get(item.name, Any), ... if item.default is item.empty else item.default)
        for item in [*inspect.signature(found).parameters.values()][supplied or 0 :]
        if item.kind is item.KEYWORD_ONLY
        or (supplied is not None and item.kind is item.POSITIONAL_OR_KEYWORD)
    }


def takes_others(found: Any) -> bool:
    """Return whether a class with a base in `LIBRARIES` also takes arguments of any other name."""
    kinds = {item.kind for item in inspect.signature(found).parameters.values()}
    return _supplied(found) is not None and inspect.Parameter.VAR_KEYWORD in kinds


def is_function(kind: Any) -> bool:
    """Return whether all values of a type are functions, or lists of functions."""
    if get_origin(kind) in (Union, UnionType, list):
        return all(map(is_function, get_args(kind)))
    return (get_origin(kind) or kind) is Callable


def _supplied(found: Any) -> int | None:
    """Return the number of arguments that the program passes to a class; None without a base in `LIBRARIES`."""
    for library in LIBRARIES.values():
        module = sys.modules.get(library.module)  # imported with any class derived from its base
        if module is not None and issubclass(found, getattr(module, library.base)):
            return library.supplied
    return None


def _types(function: Any) -> Iterator[tuple[str, Any]]:
    """Yield the type of each argument; `Any` for one with names that exist for type checkers only.

    Of these names, those of `collections.abc` are found.
    """
    names = vars(collections.abc) | getattr(function, "__globals__", {})
    for name, annotation in getattr(function, "__annotations__", {}).items():
        alone = SimpleNamespace(__annotations__={name: annotation})
        try:
            yield name, _in_yaml(get_type_hints(alone, names, include_extras=True)[name])
        except NameError:
            yield name, Any


def _in_yaml(kind: Any) -> Any:
    """Return a type with lists for its tuples, and a union without members that YAML cannot write."""
    members = get_args(kind)
    if (get_origin(kind) or kind) is tuple:
        items = [item for item in members if item is not ...]
        count = len(items) if ... not in members and items else None
        item = _in_yaml(Union[tuple(items)]) if items else Any  # noqa: UP007 - of any number of members
        return Annotated[list[item], Field(min_length=count, max_length=count)]
    if get_origin(kind) not in (Union, UnionType):
        return kind
    written = [item for item in members if not isinstance(item, type) or item in IN_YAML]
    return Union[tuple(map(_in_yaml, written or members))]  # noqa: UP007 - of any number of members

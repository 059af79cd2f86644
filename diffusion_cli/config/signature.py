"""Constructor signatures, read from the source: checking a value against its annotation imports no class."""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from diffusion_cli.config import libraries, plugins
from diffusion_cli.config.catalogue import HERE, PACKAGE

# The names that annotations of configurable arguments may use; a `Sequence` is a list in YAML.
VOCABULARY = {
    "int": int, "float": float, "bool": bool, "str": str, "list": list, "dict": dict, "Sequence": list,
    "Literal": Literal, "Annotated": Annotated, "Field": Field,
    "PositiveInt": PositiveInt, "NonNegativeInt": NonNegativeInt,
    "PositiveFloat": PositiveFloat, "NonNegativeFloat": NonNegativeFloat,
}  # fmt: skip


class Argument(NamedTuple):
    """An argument, as the source writes it."""

    annotation: ast.expr | None
    default: ast.expr | None
    """None for a required argument."""


class Constructor(NamedTuple):
    """The source of a class, or of a function that makes an object."""

    module: str
    """Module that defines the arguments."""
    keywords: dict[str, Argument]
    """Keyword-only arguments."""
    positional: dict[str, Argument]
    """Positional arguments, without `self`."""
    docstrings: tuple[str, ...]
    """Those of the class and of its `__init__`, or of the function; the class first."""


class _Imported(NamedTuple):
    """A name that a module imports from another."""

    module: str
    name: str
    """Empty for the module itself."""


@cache
def _definitions(module: str) -> dict[str, ast.AST | _Imported]:
    """Parse a module of the package or of a plugin: its top-level names and what defines them."""
    file = _file(module)
    if file is None:
        return {}
    try:
        tree = ast.parse(file.read_bytes())
    except (
        OSError,
        SyntaxError,
        ValueError,
    ):  # a plugin's; Python names the place when it imports the module
        return {}
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found: dict[str, ast.AST | _Imported] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found |= {alias.asname or alias.name: _Imported(origin, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.asname or root: _Imported(alias.name if alias.asname else root, "")
                for alias in node.names
                for root in [alias.name.partition(".")[0]]
            }
    return found


def _file(module: str) -> Path | None:
    """Return the source file of a module of the package, a library or a plugin; None for any other module."""
    if module.partition(".")[0] != PACKAGE:
        readable = plugins.is_allowed(f"{module}.") or libraries.contains(module)
        return plugins.source(module) if readable else None
    path = HERE.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file if file.is_file() else None


def _find(module: str, name: str) -> tuple[str, ast.AST] | None:
    """Find the module and syntax node that define a name, following imports within the package and plugins."""
    node = _definitions(module).get(name)
    if isinstance(node, _Imported):
        return _find(node.module, node.name)
    return None if node is None else (module, node)


class _Names(dict[str, Any]):
    """The vocabulary and the type aliases of a module (`Fraction = Annotated[...]`)."""

    def __init__(self, module: str) -> None:
        super().__init__(VOCABULARY)
        self.module = module

    def __missing__(self, name: str) -> Any:
        found = _find(self.module, name)
        if found is None or not isinstance(found[1], ast.Assign):
            raise NameError(
                f"{self.module}: {name} is not allowed in the annotation of a configurable argument"
            )
        return _type(found[1].value, found[0])


def _type(annotation: ast.expr, module: str) -> Any:
    """Evaluate an annotation of a module without importing the module."""
    return eval(compile(ast.Expression(annotation), module, "eval"), {}, _Names(module))


def constructor(target: str) -> Constructor | None:
    """Read the constructor of a class of the package or of an allowed module, importing nothing.

    Returns None for an unknown class, and for a class of a plugin whose constructor is not in such a module.
    """
    found = _find(*target.rpartition(".")[::2])
    if found is None:
        return None
    module, node = found
    if isinstance(node, ast.FunctionDef):
        return Constructor(module, *_arguments(node), _docstrings(node))
    if not isinstance(node, ast.ClassDef):
        return None
    inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    if inits:
        return Constructor(module, *_arguments(inits[0]), _docstrings(node, inits[0]))
    paths = (_path(module, base) for base in node.bases)  # a base may have the name of the class
    bases = (constructor(path) for path in paths if path != f"{module}.{node.name}")
    inherited = next((base for base in bases if base is not None), None)
    if inherited is not None:
        return inherited._replace(docstrings=(*_docstrings(node), *inherited.docstrings))
    is_ours = module.partition(".")[0] == PACKAGE
    return (
        Constructor(module, {}, {}, _docstrings(node))
        if is_ours or not (node.bases or node.decorator_list)
        else None
    )


def literal(expression: ast.expr, module: str) -> Any:
    """Return the value of a default: a literal, or the name of a constant that is one.

    Args:
        expression: the default, as the source writes it.
        module: module that contains it.

    Raises:
        ValueError: for any other expression.
    """
    found = _find(module, expression.id) if isinstance(expression, ast.Name) else None
    if found is not None and isinstance(found[1], ast.Assign):
        return literal(found[1].value, found[0])
    return ast.literal_eval(expression)


def _path(module: str, base: ast.expr) -> str:
    """The path of a base class that a module writes as `Class` or as `module.Class`."""
    root, _, rest = ast.unparse(base).partition(".")
    origin = _definitions(module).get(root)
    if rest and isinstance(origin, _Imported):
        return ".".join(filter(None, (*origin, rest)))
    return f"{module}.{root}"


def _arguments(function: ast.FunctionDef) -> tuple[dict[str, Argument], dict[str, Argument]]:
    """The keyword-only arguments and the positional ones of a function, without `self`."""
    of = function.args
    names = [*of.posonlyargs, *of.args]
    defaults = [None] * (len(names) - len(of.defaults)) + of.defaults
    positional = [*zip(names, defaults, strict=True)][function.name == "__init__" :]
    keywords = zip(of.kwonlyargs, of.kw_defaults, strict=True)
    return (
        {item.arg: Argument(item.annotation, default) for item, default in keywords},
        {item.arg: Argument(item.annotation, default) for item, default in positional},
    )


def _docstrings(*nodes: ast.ClassDef | ast.FunctionDef) -> tuple[str, ...]:
    return tuple(text for node in nodes if (text := ast.get_docstring(node)))


def signature(target: str) -> dict[str, Any] | None:
    """Read the configurable (keyword-only) arguments of a class of the package: their names and types.

    Returns None for an unknown class.
    """
    found = constructor(target) if target.startswith(f"{PACKAGE}.") else None
    return found and {
        name: _type(argument.annotation, found.module)
        for name, argument in found.keywords.items()
        if argument.annotation is not None
    }


def arguments(target: str) -> dict[str, tuple[Any, Any]]:
    """Return the configurable arguments of an allowed class: type and default by name, `...` for none.

    A stored configuration gives every argument of this package's classes, so their defaults count for nothing.
    """
    if is_foreign(target):
        return libraries.parameters(imported(target))
    return {name: (kind, ...) for name, kind in (signature(target) or {}).items()}


def is_foreign(target: str) -> bool:
    """Return whether a path names a class of an allowed plugin or of a library."""
    return plugins.is_allowed(target) or libraries.is_named(target)


def imported(target: str) -> Any:
    """Import a class of an allowed plugin or of a library."""
    return plugins.imported(target) if plugins.is_allowed(target) else libraries.imported(target)

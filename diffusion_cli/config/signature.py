"""Constructor signatures, read from the source: checking a value against its annotation imports no class."""

import ast
from functools import cache
from typing import Annotated, Any, Literal

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


@cache
def _definitions(module: str) -> dict[str, ast.AST]:
    """Parse a module of the package: its top-level names and the syntax nodes that define them."""
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
    """Find the module and syntax node that define a name, following imports within the package."""
    node = _definitions(module).get(name)
    if isinstance(node, ast.ImportFrom):
        return _find(node.module or "", name)
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


def signature(target: str) -> dict[str, Any] | None:
    """Read the configurable (keyword-only) arguments of a class of the package: their names and types.

    Returns None for an unknown class.
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


def arguments(target: str) -> dict[str, tuple[Any, Any]]:
    """Return the configurable arguments of an allowed class: type and default by name, `...` for none.

    An option of this package gives every argument, so the default of its class counts for nothing.
    """
    if plugins.is_allowed(target):
        return libraries.parameters(plugins.imported(target))
    if libraries.is_named(target):
        return libraries.parameters(libraries.imported(target))
    return {name: (kind, ...) for name, kind in (signature(target) or {}).items()}

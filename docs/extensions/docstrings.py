"""Docstrings of the package as reStructuredText, and links between the objects that they name."""

import re
import typing
from contextlib import suppress

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import ExtensionMetadata

HIDDEN_COLON = "\0"
"""Stands for a colon in the docstring of an attribute, where napoleon would read the words before it as a type."""


def without_constraints(_app: Sphinx, function: object, _bound: bool) -> None:
    """Show a parameter of type `Annotated[float, Field(gt=0)]` as `float`."""
    with suppress(
        NameError, TypeError, AttributeError
    ):  # names of TYPE_CHECKING, objects without annotations
        function.__annotations__ = typing.get_type_hints(function)


def as_rst(_app: Sphinx, what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Mark indented paragraphs below unindented ones as code, and escape asterisks and bars elsewhere."""
    if what in ("attribute", "property") and lines:
        lines[0] = lines[0].replace(": ", HIDDEN_COLON)
    result: list[str] = []
    code = indented_above = False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not indented_above and result and not result[-1]:
            code = True
            result += ["::", ""]
        elif line and not indented:
            code = False
        result.append(line if code else _escaped(line))
        indented_above = indented if line else indented_above
    lines[:] = result


def with_colons(
    _app: Sphinx, _what: str, _name: str, _obj: object, _options: object, lines: list[str]
) -> None:
    """Put back the colons that were hidden from napoleon."""
    lines[:] = [line.replace(HIDDEN_COLON, ": ") for line in lines]


def _escaped(line: str) -> str:
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(
        part if place % 2 else re.sub(r"([*|])", r"\\\1", part) for place, part in enumerate(parts)
    )


def link(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.Node
) -> nodes.Element | None:
    """Link a class of the package that is documented under the name of its folder, not of its module."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("diffusion_cli."):
        return None
    name = target.rpartition(".")[2]
    found = [
        (entry.docname, entry.node_id)
        for known, entry in env.domains.python_domain.objects.items()
        if known.rpartition(".")[2] == name and entry.objtype in ("class", "exception", "function")
    ]
    if len(found) != 1:
        return None
    ((page, anchor),) = found
    return make_refnode(app.builder, node["refdoc"], page, anchor, text, target)


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("autodoc-before-process-signature", without_constraints)
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", with_colons, priority=600)  # after napoleon
    app.connect("missing-reference", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

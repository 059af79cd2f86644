"""The package's own layout: imports run one way, and each name has one place."""

import ast
import re
from collections import Counter
from pathlib import Path

from diffusion_cli.config import HERE

ORDER = [
    "errors", "system", "convert", "runs.migrate", "config", "formats conditions", "data networks", "diffusion",
    "samplers", "runs captions images charts", "generate editing export", "metrics batch_size", "figures", "report",
    "training", "commands", "model cli",
]  # fmt: skip
"""Rooms from the lowest; a room imports only from those before it, and from those beside it."""
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms.split()}
COMPAT = "diffusion_cli.system.compat"
"""The home of private APIs, of Hydra and torch too."""
NATIVE = "diffusion_cli.system.native"
"""Compiles C code of networks, whose functions are used as those of torch."""
MATHEMATICS = {"conditions", "diffusion", "networks", "samplers", "editing"}
SKELETONS = HERE / "skeletons"
"""Files that `diffuse new` copies; no modules of the package."""
TREES = {
    file: ast.parse(file.read_text())
    for file in sorted(HERE.rglob("*.py"))
    if not file.is_relative_to(SKELETONS)
}


def dotted(file: Path) -> str:
    """The name of the module in a file of the package."""
    return ".".join(file.relative_to(HERE.parent).with_suffix("").parts)


def room_of(name: str) -> str:
    """The room of a module of the package, or of a name in one."""
    parts = name.split(".")[1:]
    return next((room for room in (".".join(parts[:2]), *parts[:1]) if room in LEVEL), "")


def imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def broken_laws(file: Path, tree: ast.AST) -> list[str]:
    module = dotted(file)
    room, broken = room_of(module), []
    for name in imports(tree):
        library = name.partition(".")[0]
        if library == HERE.name:
            other = room_of(name)
            upwards = other and LEVEL[other] > LEVEL[room]
            beyond = room in MATHEMATICS and other not in MATHEMATICS | {"errors", ""}
            if upwards or (beyond and not name.startswith((f"{NATIVE}.", f"{COMPAT}."))):
                broken.append(f"{module} imports {name}")
        needs_torch = library in ("torch", "numpy", "lightning")
        if (
            (library in ("hydra", "omegaconf") and room not in ("cli", "config") and module != COMPAT)
            or (library == "lightning" and not (room == "training" or file.name == "train.py"))
            or (needs_torch and room in ("cli", "config", "errors", "runs.migrate"))
        ):
            broken.append(f"{module} imports {name}")
    return broken


def test_imports_run_one_way():
    outside = (HERE / "__init__.py", HERE / "__main__.py")
    files = {file: tree for file, tree in TREES.items() if file not in outside}
    assert [str(file) for file in files if not room_of(dotted(file))] == []
    assert [line for file, tree in files.items() for line in broken_laws(file, tree)] == []


def test_the_root_has_few_modules_and_folders():
    modules = list(HERE.glob("*.py"))
    folders = [path for path in HERE.iterdir() if (path / "__init__.py").is_file()]
    assert len(modules) <= 10
    assert len(folders) <= 17


def test_no_class_name_has_two_places():
    names = Counter(
        node.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_class_names_of_nodes_are_cut_in_one_place():
    """`class_name` of errors.py, which all rooms may import."""
    cut = re.compile(r"""_target_["')\]]+\.(rpartition\("\."\)\[2\]|endswith\()""")
    assert [file.name for file in TREES if cut.search(file.read_text(encoding="utf-8"))] == ["errors.py"]


def test_no_function_takes_more_than_six_positional_arguments():
    many = [
        f"{file.name}: {node.name}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for names in [[each.arg for each in (*node.args.posonlyargs, *node.args.args)]]
        if len(names) - (names[:1] in (["self"], ["cls"])) > 6
    ]
    assert many == []


def test_tests_lie_in_folders_named_like_those_of_the_package():
    folders = {path.parent.name for path in Path(__file__).parent.glob("*/test_*.py")}
    assert folders <= {path.name for path in HERE.iterdir() if path.is_dir()} | {"docs", "scripts"}


def test_test_files_have_at_most_400_lines():
    sizes = {path.name: len(path.read_text().splitlines()) for path in Path(__file__).parent.rglob("*.py")}
    assert {name: size for name, size in sizes.items() if size > 400} == {}

"""The pages: their links lead somewhere, their commands are valid, and their Python names what exists."""

import ast
import doctest
import importlib
import inspect
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import diffusion_cli
from diffusion_cli import cli, config
from diffusion_cli.config import plugins
from diffusion_cli.errors import UsageError
from helpers.plugins import EXAMPLE, forget_modules

ROOT = Path(__file__).parent.parent.parent
GENERATED = ("_build", "commands", "options")
"""Folders of the documentation that a build makes."""
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name not in GENERATED),
]
WITH_OWN_TEST = ROOT / "docs" / "extending.md"  # test_extending.py
FIRST_READ = {"README", "index", "start", "python"}
"""Pages with blocks that the fast tests check; a command takes a quarter of a second to compose."""
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
RUNS = (
    ("teacher", "model.class_conditional=true", "parameterization=v"),
    ("averaged", "ema.profile=power"),
    ("augmented",),
    ("demo",),
)
"""Runs of the commands of the pages: a name, then arguments of `diffuse train`."""
MISTAKES = (UsageError, AssertionError, AttributeError, ImportError, SyntaxError, TypeError)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            text.count("\n", 0, found.start()) + 1, found[2], re.sub(f"^{found[1]}", "", found[3], flags=re.M)
        )
        for found in FENCE.finditer(text)
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block; a command ends where its line and its quotes do."""
    pending = ""
    for line in text.replace("\\\n", " ").splitlines():
        pending += f"{line}\n"
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # an open quote
            continue
        pending = ""
        if words:
            yield words
    assert not pending, f"unfinished: {pending}"


@cache
def stored_runs() -> dict[str, str]:
    """The stored configuration of each run of `RUNS`, by name."""
    return {
        name: yaml.safe_dump(config.load("train", [f"name={name}", *words]).model_dump())
        for name, *words in RUNS
    }


@pytest.fixture
def run_folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with the runs `RUNS`, the plugin `bars` and sources of imports; no command needs SLURM in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(plugins.VARIABLE, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree(EXAMPLE / "bars", tmp_path / "bars")
    forget_modules()
    monkeypatch.setattr("diffusion_cli.config.launcher._missing", list)
    for name, values in stored_runs().items():
        folder = tmp_path / "outputs" / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text(values)
    for source in ("ddpm-cats", "ddpm-digits", "sd/vae"):
        (tmp_path / source).mkdir(parents=True)
    (tmp_path / "256x256_diffusion.pt").touch()
    yield tmp_path
    forget_modules()


def check_command(words: list[str]) -> None:
    """Raise an error unless a command of a page exists and its arguments are valid."""
    for name in ("diffuse", "diffusion_cli"):
        if name in words:
            return check_diffuse(*words[words.index(name) + 1 :])
    for path in re.findall(r"\b(?:scripts|tests)/[\w./]+", " ".join(words)):
        assert (ROOT / path).exists(), f"{path} does not exist"
    if words[0] == "make":
        assert set(words[1:]) <= set(TARGETS), words
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"\w+", "".join(re.findall(r"\[(.*)\]", words[-1])))
        assert set(extras) <= set(PROJECT["optional-dependencies"]), words
    return None


def check_diffuse(*words: str) -> None:
    """Raise AssertionError with the mistakes that `diffuse` reports, or UsageError for those of a sweep."""
    sweep = [word for word in words if word in ("-m", "--multirun")]
    if sweep and "--cfg" not in words:
        config.plan_sweep(words[0], [word for word in words[1:] if word not in sweep])
    elif mistakes := reported(*words):
        raise AssertionError("\n".join(mistakes))


@cache
def reported(*words: str) -> list[str]:
    """The mistakes that `diffuse` reports for a command, which is not run."""
    show = ["--cfg", "job"] if words and words[0] in config.COMMANDS else []
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as printed:
        code = cli.run([*words, *show])
    return printed.getvalue().splitlines() if code else []


def check_python(text: str) -> None:
    """Raise an error unless the code compiles and the names that it uses of the package exist, with such arguments."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusion_cli"):
            module = importlib.import_module(str(node.module))
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = {"diffuse": diffusion_cli, "model": diffusion_cli.Model}.get(node.value.id)
            known = node.attr in getattr(diffusion_cli.Model, "__annotations__", {})
            assert owner is None or known or hasattr(owner, node.attr), ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            check_call(node, node.func)


def check_call(call: ast.Call, function: ast.Attribute) -> None:
    """Raise an error unless a call of the Python API has arguments that the function takes."""
    owner = function.value.id if isinstance(function.value, ast.Name) else ""
    itself = [None] if owner == "model" else []
    called = {"diffuse": diffusion_cli, "model": diffusion_cli.Model}.get(owner)
    if called is None or any(isinstance(value, ast.Starred) for value in call.args):
        return
    keywords = {str(keyword.arg): None for keyword in call.keywords}
    inspect.signature(getattr(called, function.attr)).bind(*itself, *call.args, **keywords)
    words = [str(value.value) for value in call.args if isinstance(value, ast.Constant)]
    if (owner, function.attr) == ("diffuse", "train"):
        config.load("train", words)
    if (owner, function.attr) == ("diffuse", "option"):
        assert words[1] in config.options(words[0]), words


def check_console(text: str) -> None:
    """Raise an error unless each `$ command` is valid, or has the mistakes that are shown below it."""
    for entry in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, *shown = entry.splitlines()
        expected = [printed for printed in shown if printed.startswith("diffuse: ")]
        found = reported(*shlex.split(line, comments=True)[1:])
        assert found == expected, f"{line}: the page shows {expected}, and it prints {found}"


def check_doctest(text: str, page: Path, line: int) -> None:
    example = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), line)
    assert example.examples
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0


def check(page: Path, block: Block) -> None:
    match block.language:
        case "bash":
            for words in commands(block.text):
                check_command(words)
        case "console":
            check_console(block.text)
        case "python":
            check_python(block.text)
            if block.text.startswith("from pathlib import Path\n"):  # a script, which makes files
                exec(compile(block.text, f"{page}:{block.line}", "exec"), {})
        case "pycon":
            check_doctest(block.text, page, block.line)
        case "yaml":
            yaml.safe_load(block.text)
            if named := re.match(
                r"# (\w+/\w+/\w+\.yaml)\n", block.text
            ):  # an option file for the commands below
                Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
                Path(named[1]).write_text(block.text)
        case "text":
            assert not re.search(r"^\$? ?diffuse \w+( |$)", block.text, re.MULTILINE), (
                "a command is a bash block"
            )
        case language:
            assert re.fullmatch(r"\{.+\}.*", language), (
                f"unknown language {language!r}"
            )  # a directive of MyST


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page.stem in FIRST_READ else pytest.mark.slow)
        for page in PAGES
        if page != WITH_OWN_TEST
    ],
    ids=name_of,
)
def test_every_block_is_valid(page, run_folder):
    wrong = []
    for block in blocks(page):
        try:
            check(page, block)
        except MISTAKES as error:
            wrong.append(f"{page.name}:{block.line}: {error}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_is_indented(page):
    """Only fenced blocks are checked."""
    assert re.findall(r"\n\n {4}\S.*", FENCE.sub("", page.read_text())) == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name_of)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCE.sub("", page.read_text()))
    lost = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    built = [link for link in lost if Path(link).parent.name in GENERATED]
    assert [link for link in lost if link not in built] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\ndiffuse train scheduel=cosine\n```", "did you mean schedule"),
        ("```bash\ndiffuse train \\\n    dataset=digts\n```", "did you mean digits"),
        ("```bash\nsrun --nodes=2 diffuse train seed=-1\n```", "seed=-1"),
        ("```bash\ndiffuse train -m seed=0,x launcher=slurm\n```", "seed=x"),
        ("```bash\ndiffuse compare steps=[10,x]\n```", "steps=x"),
        ("```bash\npython scripts/missing.py\n```", "does not exist"),
        ("```bash\nmake coffee\n```", "coffee"),
        ("```bash\npip install 'diffuse-cli[missing]'\n```", "missing"),
        ("```bash\necho 'open\n```", "unfinished"),
        ("```console\n$ diffuse train seed=-1\ndiffuse: seed=-1: another message\n```", "another message"),
        ("```console\n$ diffuse train\ndiffuse: seed=-1: no such mistake\n```", "and it prints []"),
        ("```python\nimport diffusion_cli as diffuse\ndiffuse.lode('x')\n```", "lode"),
        ("```python\nmodel.sample(4, smapler='ddim')\n```", "smapler"),
        ("```python\ndiffuse.train('max_step=4')\n```", "did you mean max_steps"),
        ("```python\ndiffuse.option('sampler', 'ddmi', schedule)\n```", "ddmi"),
        ("```python\nfrom diffusion_cli.samplers import DDMI\n```", "DDMI"),
        ("```python\nx = (\n```", "never closed"),
        ("```pycon\n>>> 1 + 1\n3\n```", "assert 1 == 0"),
        ("```text\ndiffuse train\n```", "a command is a bash block"),
        ("```fortran\nEND\n```", "unknown language"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_block_is_found(text, message, run_folder):
    page = run_folder / "page.md"
    page.write_text(f"# Title\n\n{text}\n")
    with pytest.raises(MISTAKES, match=re.escape(message)):
        check(page, *blocks(page))

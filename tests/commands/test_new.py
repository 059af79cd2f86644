"""`diffuse new`: the plugins that it writes work as they are, and wrong words are one line."""

import ast
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion_cli import config
from diffusion_cli.cli import run
from diffusion_cli.commands.new import NEXT, SKELETONS
from diffusion_cli.config import plugins
from helpers.plugins import forget_modules

SHORT = {
    "train": ["max_steps=2", "preview_steps=2", "batch_size=8", "trainer=cpu"],
    "sample": ["num_samples=2", "steps=2"],
    "edit": ["steps=2"],
    "eval": ["num_samples=80", "steps=2", "cache_dir=cache"],
    "plot": [],
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """A working folder, from which modules are forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(plugins.VARIABLE, "")
    forget_modules("mine")
    yield tmp_path
    forget_modules("mine")


def test_every_group_that_plugins_extend_has_a_skeleton():
    assert set(NEXT) == {file.parent.name for file in SKELETONS.glob("*/*.py")} == set(plugins.BASES)
    for name in NEXT:
        files = {path.name for path in (SKELETONS / name).iterdir() if path.is_file()}
        assert files == {"example.py", "example.yaml", "test_example.py"}


@pytest.mark.parametrize("group", plugins.BASES)
def test_the_files_have_the_names_of_the_option(folder, capsys, group):
    assert run(["new", group, "mine"]) == 0
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    names = ("mine/__init__.py", "mine/mine.py", f"mine/conf/{group}/mine.yaml", "test_mine.py")
    assert paths == set(map(Path, names))
    for path in paths:
        text = path.read_text()
        assert "example" not in text.lower().replace("for example", "")
        if path.suffix == ".py":
            assert ast.get_docstring(ast.parse(text))
    assert capsys.readouterr().out.splitlines()[-1].startswith("  diffuse ")
    plugins.allow(["mine"])
    assert "mine" in config.options(group)


def test_another_option_joins_a_package(folder, capsys):
    assert run(["new", "dataset", "mine"]) == 0
    assert run(["new", "sampler", "big_step", "plugin=mine"]) == 0
    assert "class BigStep(Sampler)" in (folder / "mine" / "big_step.py").read_text()
    assert (folder / "mine" / "conf" / "sampler" / "big_step.yaml").is_file()
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [
        "  diffuse train name=demo",
        "  diffuse sample run=demo 'plugins=[mine]' sampler=big_step",
    ]


def test_a_command_that_uses_a_run_names_the_one_that_is_trained_first(folder, capsys):
    for number, group in enumerate(NEXT):
        assert run(["new", group, f"mine_{number}", *["plugin=mine_0"] * (number > 0)]) == 0
        *_, before, line = map(shlex.split, capsys.readouterr().out.splitlines())
        trains = before[:2] == ["diffuse", "train"]
        assert trains == (line[1] in ("sample", "edit", "eval"))
        assert ("name=demo" in before, "run=demo" in line) == (trains, trains)


def test_the_folder_of_the_output_is_made(folder, capsys):
    assert run(["new", "dataset", "mine", "output=a b"]) == 0
    assert (folder / "a b" / "test_mine.py").is_file()
    assert "  cd 'a b'\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "group: missing; add group=<value>\ndiffuse: name: missing; add name=<value>"),
        (["dataset"], "name: missing; add name=<value>"),
        (["datset", "mine"], "callback; did you mean dataset?"),
        (["experiment", "mine"], "group=experiment: must be dataset, model,"),
        (["dataset", "My-Data"], "no word of Python; write name=my_data"),
        (["dataset", "class"], "name=class: must be lower-case letters, digits and _, and no word of Python"),
        (["dataset", "3"], "no word of Python; choose another name"),
        (["dataset", "digits"], "name=digits: dataset=digits exists already; choose another name"),
        (["dataset", "json"], "name=json: is the name of an installed module; choose another name"),
        (["dataset", "torch"], "name=torch: "),
        (["dataset", "numpy"], "name=numpy: is the name of an installed module; choose another name"),
        (["sampler", "sampler"], "name=sampler: Sampler is a class of diffuse or a library; choose another name"),
        (["dataset", "here"], "here: exists already; choose another name, or add plugin=here to extend this package"),
        (["dataset", "taken", "plugin=here"], "here/taken.py: exists already; choose another name or output"),
        (["dataset", "mine", "plugin=there"], "plugin=there: no such package in .; leave it out for a new package"),
        (["dataset", "mine", "plugin=../x"], "plugin=../x: no such package in .; leave it out for a new package"),
        (["dataset", "mine", "output=file"], "file"),
        (["dataset", "mine", "-m"], "--multirun: new has no sweeps; leave it out"),
        (["dataset", "mine", "x"], "x: not key=value; see diffuse new --help"),
    ],
)  # fmt: skip
def test_wrong_words_are_one_line_and_write_nothing(folder, capsys, words, line):
    (folder / "here").mkdir()
    (folder / "here" / "taken.py").write_text("mine")
    (folder / "file").touch()
    assert run(["new", *words]) == 2
    printed = capsys.readouterr().err
    assert line in printed
    assert printed.count("\n") == 1 + line.count("\n")
    assert sorted(path.name for path in folder.rglob("*")) == ["file", "here", "taken.py"]
    assert (folder / "here" / "taken.py").read_text() == "mine"


def test_groups_are_completed():
    assert config.complete(["new", "sa"]) == ["sampler"]
    assert config.complete(["new", "group=sa"]) == ["group=sampler"]
    assert config.complete(["new", "sampler", "pl"]) == ["plugin="]


def test_it_imports_no_torch(folder):
    code = (
        "import sys; from diffusion_cli.cli import run; code = run(sys.argv[1:]);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    for words in (["new", "--help"], ["new", "model", "mine"]):
        assert subprocess.run([sys.executable, "-c", code, *words]).returncode == 0


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_every_skeleton_is_tidy_passes_its_test_and_is_used_by_the_printed_commands(folder, capsys):
    assert run(["train", *SHORT["train"]]) == 0
    (folder / "mine").mkdir()
    capsys.readouterr()
    for group in plugins.BASES:
        assert run(["new", group, f"my_{group}", "plugin=mine"]) == 0
        commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  diffuse ")]
        assert len(commands) == 1, "there is a run already"
        _, command, *words = shlex.split(commands[0])
        assert run([command, *words, *SHORT[command]]) == 0, commands
        capsys.readouterr()
    for check in (
        ["ruff", "check", "--isolated", "--line-length=120"],
        ["pytest", "-q", "-p", "no:cacheprovider"],
    ):
        done = subprocess.run([sys.executable, "-m", *check, "."], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout

"""The mutants: each applies to the present code, and the runner distinguishes caught ones from survivors."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mutate import Mutant, digest, read_table, write_table

ROOT = Path(__file__).parents[2]
TABLE = read_table(ROOT / "scripts" / "mutants.toml")


@pytest.mark.parametrize("mutant", TABLE.mutants, ids=lambda mutant: mutant.mistake)
def test_every_mutant_applies_once_and_is_still_a_program(mutant):
    changed = mutant.applied(ROOT)
    assert changed is not None, f"{mutant.file}: {mutant.text!r} should occur exactly once"
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse((ROOT / mutant.file).read_text()))


def test_every_mutant_names_tests_that_exist():
    names = {name for mutant in TABLE.mutants for name in mutant.tests}
    functions = {
        file: {
            node.name
            for node in ast.parse((ROOT / file).read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        for file in {name.split("::")[0] for name in names}
    }
    lost = [name for name in names if name.split("::")[1].split("[")[0] not in functions[name.split("::")[0]]]
    assert lost == []
    assert all(mutant.tests for mutant in TABLE.mutants)


def test_no_two_mutants_are_the_same():
    changes = [(mutant.file, mutant.text, mutant.becomes) for mutant in TABLE.mutants]
    assert len(set(changes)) == len(changes) >= 60
    assert len({mutant.mistake for mutant in TABLE.mutants}) == len(changes)


def test_the_page_shows_every_mutant_and_no_survivor():
    page = (ROOT / "docs" / "results" / "mutants.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    cells = [line.split(" | ") for line in lines[1:]]
    assert [row[0].removeprefix("| ") for row in cells] == [mutant.mistake for mutant in TABLE.mutants]
    assert {row[-2] for row in cells} == {"caught"}


# --- The runner, on a made-up package --------------------

PROGRAM = {
    "pyproject.toml": "[tool.pytest.ini_options]\n",
    "sums/__init__.py": "def plus(a, b):\n    return a + b\n\n\ndef half(a):\n    return a / 2\n",
    "tests/test_sums.py": (
        "import sums\n\n\n"
        "def test_plus():\n    assert sums.plus(2, 1) == 3\n\n\n"
        "def test_half():\n    assert sums.half(0) == 0\n\n\n"
        "def test_wrong():\n    assert sums.plus(1, 1) == 3\n"
    ),
}


@pytest.fixture
def program(tmp_path) -> Path:
    for name, text in PROGRAM.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def row(mistake: str, text: str, becomes: str, test: str) -> str:
    fields = {"file": "sums/__init__.py", "mistake": mistake, "text": text, "becomes": becomes}
    lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(["[[mutant]]", *lines, f'tests = ["tests/test_sums.py::{test}"]', ""])


def mutate(root: Path, rows: list[str], *words: str) -> subprocess.CompletedProcess:
    """Run the script on a program, in a process of its own, as it forks."""
    head = 'copied = ["sums", "tests", "pyproject.toml"]\nimported = []\n'
    (root / "mutants.toml").write_text(head + "\n".join(rows))
    command = [
        sys.executable,
        str(ROOT / "scripts" / "mutate.py"),
        f"--root={root}",
        f"--mutants={root}/mutants.toml",
    ]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    return subprocess.run([*command, *words], capture_output=True, text=True, env=env)


MINUS = row("The sum is a difference.", "a + b", "a - b", "test_plus")
THIRD = row("Half is a third.", "a / 2", "a / 3", "test_half")
LOST = row("The product is a sum.", "a * b", "a + b", "test_plus")
BROKEN = row(
    "The module cannot be imported.", "def half", "import nothing_of_the_kind\n\ndef half", "test_half"
)


def test_mutants_are_caught_survive_or_are_stale(program):
    done = mutate(program, [MINUS, THIRD, LOST, BROKEN])
    assert done.returncode == 1, done.stderr
    *_, survived, stale, unclear, counts = done.stdout.splitlines()
    assert survived == "survived: sums/__init__.py: Half is a third."
    assert stale == "stale: sums/__init__.py: The product is a sum."
    assert unclear == "unclear: sums/__init__.py: The module cannot be imported."
    assert counts == "1 caught, 1 survived, 1 stale, 1 unclear"
    assert (program / "sums" / "__init__.py").read_text() == PROGRAM["sums/__init__.py"]


def test_a_stopped_run_continues_and_other_code_starts_anew(program):
    page = program / "page.md"
    page.write_text("# Mutants\n\nWords.\n")
    assert mutate(program, [MINUS]).returncode == 0
    again = mutate(program, [MINUS], f"--table={page}")
    assert again.stdout.splitlines() == ["1 caught, 0 survived, 0 stale, 0 unclear"]  # nothing is run again
    text = page.read_text()
    assert text.startswith("# Mutants\n\nWords.\n\n| mistake |")
    assert (
        "| The sum is a difference. | `sums/__init__.py` | `a + b` | `a - b` | caught | `test_plus` |" in text
    )
    code = (program / "sums" / "__init__.py").read_text()
    (program / "sums" / "__init__.py").write_text(code + "\n\ndef double(a):\n    return 2 * a\n")
    assert "1/1 caught: The sum is a difference." in mutate(program, [MINUS]).stdout


def test_only_new_mutants_run_and_the_others_keep_their_rows(program):
    page = program / "page.md"
    page.write_text("# Mutants\n")
    assert mutate(program, [MINUS], f"--table={page}").returncode == 0
    (program / "outputs" / "mutants.json").unlink()
    half = row("Half is the number.", "a / 2", "a + 1", "test_half")
    done = mutate(program, [half, MINUS], f"--table={page}", "--new")
    assert done.stdout.splitlines()[-1] == "1 caught, 0 survived, 0 stale, 0 unclear"
    assert [line.split(" | ")[0] for line in page.read_text().splitlines()[4:]] == [
        "| Half is the number.",
        "| The sum is a difference.",
    ]
    changed = row("The sum is a difference.", "a + b", "b - a", "test_plus")
    assert "1/1 caught: The sum" in mutate(program, [half, changed], f"--table={page}", "--new").stdout


def test_tests_that_fail_without_a_mistake_prove_nothing(program):
    wrong = row("The sum is a difference.", "a + b", "a - b", "test_wrong")
    done = mutate(program, [wrong])
    assert done.returncode == 2
    assert "tests/test_sums.py::test_wrong: do not pass on the unchanged code" in done.stderr


def test_a_table_replaces_the_one_before(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\nB | c.\n")
    for lines in (["| x |", "|---|"], ["| y |", "|---|", "| z |"]):
        write_table(page, lines)
    assert page.read_text() == "# A\n\nB | c.\n\n| y |\n|---|\n| z |\n"


def test_a_hash_of_the_code_sees_names_and_contents(program):
    copied = ("sums", "tests")
    before = digest(program, copied)
    (program / "sums" / "__pycache__").mkdir()
    (program / "sums" / "__pycache__" / "x.pyc").write_bytes(b"0")
    assert digest(program, copied) == before
    (program / "sums" / "more.py").write_text("")
    assert digest(program, copied) != before


def test_a_text_must_occur_exactly_once(program):
    def applied(text: str) -> str | None:
        return Mutant("sums/__init__.py", text, "c", "", ()).applied(program)

    assert applied("return a + b") is not None
    assert applied("return a") is None
    assert applied("return b") is None

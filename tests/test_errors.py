"""What a user reads of an error: one line for a mistake, a traceback for a bug."""

import pickle
from pathlib import Path

import pytest

from diffusion_cli import cli
from diffusion_cli.cli import run
from diffusion_cli.commands import sample
from diffusion_cli.errors import NO_VALUE, MachineError, Problem, UsageError, counted

ONE = Problem("steps", 0, "must be greater than 0")
TWO = Problem(Path("a.png"), NO_VALUE, "is no image", "remove it")


def test_a_problem_is_a_key_a_value_what_is_wrong_and_what_to_do():
    assert str(ONE) == "steps=0: must be greater than 0"
    assert str(TWO) == "a.png: is no image; remove it"
    assert str(Problem("label", None, "is missing")) == "label=null: is missing"
    assert str(Problem("clip_x0", False, "is ignored")) == "clip_x0=false: is ignored"


def test_several_problems_are_shown_once_each_in_their_order():
    error = UsageError.several([TWO, ONE, TWO])
    assert error.lines == ("a.png: is no image; remove it", "steps=0: must be greater than 0")
    assert UsageError(*ONE).lines == ("steps=0: must be greater than 0",)


def test_an_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(UsageError.several([TWO, ONE])))
    assert error.problems == (TWO, ONE)


def test_keys_are_renamed_for_the_command_that_has_other_names():
    error = UsageError.several([ONE, TWO]).renamed({"steps": "preview_steps"})
    assert error.lines == ("preview_steps=0: must be greater than 0", "a.png: is no image; remove it")


def outcome(monkeypatch, capsys, error: Exception) -> tuple[int, str]:
    """The exit code and stderr of a command that raises an error."""

    def fails(config):
        raise error

    monkeypatch.setattr(sample, "run", fails)
    return run(["sample", "run=bf16"]), capsys.readouterr().err


def test_a_mistake_is_one_line(monkeypatch, capsys):
    assert outcome(monkeypatch, capsys, UsageError(*ONE)) == (
        2,
        "diffuse: steps=0: must be greater than 0\n",
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MachineError("x: does not read back as it was written"), "x: does not read back as it was written"),
        (
            OSError(28, "No space left on device", "x"),
            "x: cannot be used (No space left on device); free some space, or use another disk",
        ),
        (
            OSError(13, "Permission denied", "outputs/x"),
            "output_dir=outputs: cannot be used (Permission denied: outputs/x); check its permissions, or use "
            "another path",
        ),
        (
            OSError(13, "Permission denied", "bf16/x"),
            "bf16/x: cannot be used (Permission denied); check its permissions, or use another path",
        ),
        (
            OSError(13, "Permission denied", "."),
            ".: cannot be used (Permission denied); check its permissions, or use another path",
        ),
        (OSError(9, "Bad file descriptor", 3), "Bad file descriptor; set DIFFUSE_TRACEBACK=1 to see where"),
        (OSError(5, "Input/output error"), "Input/output error; set DIFFUSE_TRACEBACK=1 to see where"),
    ],
)
def test_a_fault_of_the_machine_is_one_line(monkeypatch, capsys, error, line):
    assert outcome(monkeypatch, capsys, error) == (2, f"diffuse: {line}\n")


@pytest.mark.parametrize(
    "error", [ValueError("zip() argument 2 is shorter"), OSError("of a library"), KeyError("ema")]
)
def test_a_bug_shows_its_traceback_and_asks_for_a_report(monkeypatch, capsys, error):
    code, text = outcome(monkeypatch, capsys, error)
    assert code == cli.INTERNAL_ERROR == 1
    assert "Traceback" in text
    assert f"{type(error).__name__}: " in text
    assert text.splitlines()[-1].startswith("diffuse: this is an error in diffuse")


def test_the_traceback_of_a_mistake_is_shown_on_request(monkeypatch, capsys):
    monkeypatch.setenv("DIFFUSE_TRACEBACK", "1")
    with pytest.raises(UsageError):
        outcome(monkeypatch, capsys, UsageError(*ONE))


def test_one_thing_is_in_the_singular():
    assert [counted(number, "network call") for number in (0, 1, 2)] == [
        "0 network calls", "1 network call", "2 network calls",
    ]  # fmt: skip

"""The environments of scripts/matrix.py: which there are, and the versions in them."""

import subprocess

import pytest

import matrix
from matrix import Cell, cells, lower_bounds, main, read_project, works

PROJECT = {
    "name": "p",
    "dependencies": ["a>=1.2,!=1.3"],
    "optional-dependencies": {"x": ["b[c]>=2", "p[y]"], "y": ["a>=1.2"]},
}


def test_each_package_of_the_project_has_one_lower_bound():
    bounds = lower_bounds(read_project())
    assert {"torch", "pyyaml", "transformers", "pytest"} <= set(bounds)


def test_lower_bounds_are_read_from_dependencies_and_extras():
    assert lower_bounds(PROJECT) == {"a": "1.2", "b": "2"}
    assert lower_bounds(PROJECT, ["y"]) == {"a": "1.2"}


@pytest.mark.parametrize("words", ["a", "a<2", "a>=1.1"])
def test_a_package_without_a_lower_bound_or_with_another_is_refused(words):
    with pytest.raises(ValueError, match="one lower bound"):
        lower_bounds(PROJECT | {"optional-dependencies": {"x": [words]}})


def test_only_the_first_python_has_the_lowest_versions():
    both = [Cell("a", "lowest"), Cell("a", "newest"), Cell("b", "newest")]
    assert list(cells(["a", "b"], ["lowest", "newest"])) == both
    assert list(cells(["a", "b"], ["newest"])) == both[1:]


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """The commands that the script would run; each command fails that contains the word `broken`."""
    commands: list[str] = []

    def call(words, folder):
        commands.append(" ".join(map(str, words)))
        if "wheel" in words:
            (folder / "p-1-py3-none-any.whl").touch()
        if "broken" in commands[-1]:
            raise subprocess.CalledProcessError(1, [str(word) for word in words], "the reason")
        return "3.99 2.99 1.99"

    monkeypatch.setattr(matrix, "call", call)
    monkeypatch.setattr(matrix, "works", lambda python: python != "missing")
    return commands


def test_each_environment_installs_the_wheel_and_runs_the_commands(called, capsys):
    assert main(["--python", "one", "two", "--extras", "hf"]) == 0
    installs = [command for command in called if " pip install " in command]
    assert len(installs) == 3
    assert all(command.endswith(".whl[hf]") for command in installs)
    assert sum("diffuse train" in command for command in called) == 3
    assert not any("pytest" in command for command in called)
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("lowest dependencies, one: Python 3.99, torch 2.99, NumPy 1.99 (")


def test_the_fast_tests_run_with_the_extra_test(called):
    assert main(["--python", "one", "--dependencies", "newest", "--tests"]) == 0
    assert [command.endswith(".whl[test]") for command in called if " pip install " in command] == [True]
    assert sum("-m not slow" in command for command in called) == 1


def test_a_failure_is_printed_and_the_next_environment_runs(called, capsys):
    assert main(["--python", "broken", "two", "--dependencies", "newest"]) == 1
    reason, failed, passed = capsys.readouterr().out.splitlines()
    assert reason == "the reason"
    assert failed.startswith("newest dependencies, broken: failed: broken -m venv")
    assert passed.startswith("newest dependencies, two: Python 3.99")


def test_an_interpreter_that_does_not_start_is_refused(called, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--python", "missing"])
    assert stopped.value.code == 2
    assert "missing does not start" in capsys.readouterr().err


def test_a_name_on_path_that_fails_does_not_work(tmp_path, monkeypatch):
    for name, line in (("good", "exit 0"), ("bad", "exit 127")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert [works(name) for name in ("good", "bad", "absent")] == [True, False, False]

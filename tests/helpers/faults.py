"""Runs with planted faults, and checks that they continue."""

from pathlib import Path

from helpers import assert_same, state, train


def assert_goes_on(folder: Path, whole: dict) -> None:
    """The run in the folder ends as the one that nothing befell."""
    assert train(folder, "max_steps=14") == 0
    mine = state(folder)
    for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(mine[key], whole[key], key)
    assert_same(mine["callbacks"]["EMA"], whole["callbacks"]["EMA"])


def said(capsys) -> str:
    """The one line of an error; the settings of the tests are given twice, which is remarked on."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "diffuse: " in line]
    lines = [line for line in lines if ": ignored, because " not in line]
    (line,) = (line[line.index("diffuse: ") :] for line in lines)  # after the progress bar
    return line

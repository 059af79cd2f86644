"""What a training shows early and at its end: losses, previews, and the outcome."""

import csv
import re
import signal

import pytest
import torch

from diffusion_cli.system.signals import UNFINISHED
from diffusion_cli.training import previews
from helpers import assert_same, state, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_losses_and_previews_come_early_and_at_the_end_and_change_no_weight(tmp_path, capsys):
    shown, plain = tmp_path / "shown", tmp_path / "plain"
    assert train(shown, "max_steps=12", "log_every=50", "preview_every=50", "preview_steps=1") == 0
    run = shown / "tiny"
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "10", "12"]
    previews = [file.name for file in sorted((run / "previews").glob("step_*"))]
    assert previews == ["step_00000010.png", "step_00000012.png"]
    out, err = capsys.readouterr()
    line = rf"Trained 12 steps in \d\d:\d\d, \d+ images/s, loss {float(rows[-1]['loss']):.4f}; the run is {run}\n"
    assert re.search(line, out)
    assert f"loss {float(rows[0]['loss']):.4f}" in err  # in a log, too

    assert train(plain, "max_steps=12", "log_every=7", "preview_every=50", "preview_steps=100") == 0
    assert not list((plain / "tiny" / "previews").glob("step_*"))  # 12 steps are faster than a preview
    for key in ("state_dict", "optimizer_states", "callbacks"):
        one, other = state(shown)[key], state(plain)[key]
        if key == "callbacks":  # all but the step of the last preview, and the time
            one, other = ({"EMA": callbacks["EMA"]} for callbacks in (one, other))
        assert_same(one, other)


def test_the_outcome_of_a_start_is_that_of_its_steps(tmp_path, capsys):
    assert train(tmp_path, "max_steps=2") == 0
    assert train(tmp_path, "max_steps=3") == 0
    assert re.search(
        r"Trained 3 steps, 1 of them now, in 00:0\d, \d+ images/s, loss ", capsys.readouterr().out
    )


def test_a_machine_without_a_compiler_is_one_line(tmp_path, monkeypatch, capsys):
    from torch._dynamo.exc import TorchDynamoException

    def failing(*arguments):
        raise TorchDynamoException("No working C++ compiler found")

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", failing)
    )
    assert train(tmp_path, "max_steps=2", "compile=true") == 2
    message = "compile=true: torch cannot compile the network here (No working C++ compiler found); set compile=false"
    assert f"diffuse: {message}\n" in capsys.readouterr().err


@pytest.fixture
def saving(monkeypatch):
    """Has a function act in place of `save_rows`, and returns the list of the steps and of whether each was saved."""

    def replace(act):
        def save_rows(rows, path, captions):
            checkpoint = path.parent.with_name("checkpoints") / f"{path.stem}.ckpt"
            pictures.append((int(path.stem.removeprefix("step_")), checkpoint.is_file()))
            act()

        pictures: list[tuple[int, bool]] = []
        monkeypatch.setattr(previews, "save_rows", save_rows)
        return pictures

    return replace


@pytest.mark.parametrize("error", [OSError("the disk is full"), RuntimeError("std::bad_alloc")])
def test_training_continues_without_a_preview_that_cannot_be_made(tmp_path, saving, capsys, error):
    def fail():
        raise error

    pictures = saving(fail)
    assert train(tmp_path, "max_steps=12", "preview_every=6", "preview_steps=8") == 0
    assert pictures == [(6, False), (12, True)]
    assert f"diffuse: no preview of step 12 ({error}); training continues\n" in capsys.readouterr().err


def test_a_bug_in_the_last_preview_loses_no_step(tmp_path, saving):
    def fail():
        raise KeyError("bug")

    assert saving(fail) == []
    assert train(tmp_path, "max_steps=12", "preview_every=50", "preview_steps=1") == 1  # at step 10
    pictures = saving(fail)
    assert train(tmp_path, "max_steps=9", "preview_every=50", "preview_steps=1") == 1
    assert pictures == [(9, True)]
    assert state(tmp_path)["global_step"] == 9


def test_at_max_time_the_checkpoint_comes_before_the_previews(tmp_path, saving):
    pictures = saving(lambda: None)
    assert train(tmp_path, "max_steps=null", "max_time=1s", "preview_every=1", "preview_steps=1") == 0
    assert [there for _, there in pictures] == [False] * (len(pictures) - 1) + [True]


def test_a_signal_interrupts_a_preview(tmp_path, saving):
    words = ["max_steps=12", "preview_every=6", "preview_steps=8"]
    pictures = saving(lambda: signal.raise_signal(signal.SIGTERM))
    assert train(tmp_path, *words) == UNFINISHED
    assert (pictures, state(tmp_path)["global_step"]) == ([(6, False)], 6)
    pictures = saving(lambda: None)
    assert train(tmp_path, *words) == 0
    assert pictures == [(6, True), (12, True)]

"""The next command that training prints can be pasted into a shell."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from diffusion_cli.commands.train_report import last_lines, remarks
from diffusion_cli.config import load


@pytest.mark.parametrize(("train", "val", "marked"), [(58, 2, True), (180, 20, False), (5, 0, False)])
def test_a_small_validation_split_is_named_before_training(train, val, marked):
    dataset = SimpleNamespace(remarks=list)
    setup = SimpleNamespace(
        dataset=dataset,
        images=range(train),
        val_images=range(val),
        max_steps=None,
        stages=None,
        label_counts=None,
    )
    lines = remarks(setup)  # pyright: ignore[reportArgumentType]
    assert any(f"{train} training and {val} validation images" in line for line in lines) == marked


@pytest.mark.parametrize("folder", ["outputs/demo", "my runs/x", "año/a,b", "it's (2)/x", "a=b/[1]"])
def test_the_next_command_names_the_run(folder):
    stop = SimpleNamespace(stopping=False, signal=None, by_callback=False, seconds_left=lambda: None)
    progress = SimpleNamespace(outcome=lambda: "Trained")
    (text,) = last_lines(progress, stop, [], "", nn.Linear(1, 1), Path(folder))  # pyright: ignore[reportArgumentType]
    program, command, word = shlex.split(text.partition("Next: ")[2])
    assert (program, command) == ("diffuse", "sample")
    assert load("sample", [word]).model_dump()["run"] == folder

"""The next command that training prints can be pasted into a shell."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from diffusion_cli.commands.train_report import last_lines, remarks
from diffusion_cli.conditions import Conditions
from diffusion_cli.config import load
from helpers.conditions import TEXT, grey_model


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


def next_command(model: nn.Module, folder: Path) -> list[str]:
    """Return the words of the next command."""
    stop = SimpleNamespace(stopping=False, signal=None, by_callback=False, seconds_left=lambda: None)
    progress = SimpleNamespace(outcome=lambda: "Trained")
    (text,) = last_lines(progress, stop, [], "", model, folder)  # pyright: ignore[reportArgumentType]
    return shlex.split(text.partition("Next: ")[2])


@pytest.mark.parametrize("folder", ["outputs/demo", "my runs/x", "año/a,b", "it's (2)/x", "a=b/[1]"])
def test_the_next_command_names_the_run(folder):
    program, command, word = next_command(nn.Linear(1, 1), Path(folder))
    assert (program, command) == ("diffuse", "sample")
    assert load("sample", [word]).model_dump()["run"] == folder


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        (Conditions(text=TEXT), ["diffuse", "sample", "run=x", "prompt=TEXT"]),
        (Conditions(image=1, text=TEXT), ["diffuse", "edit", "edit=translate", "run=x", "input=val"]),
    ],
)
def test_the_next_command_has_the_condition_of_the_model(schedules, conditions, words):
    model = grey_model(schedules["cosine"], conditions).denoiser
    assert next_command(model, Path("x")) == words

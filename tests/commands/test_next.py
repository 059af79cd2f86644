"""The next command that training prints can be pasted into a shell."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from diffusion_cli.commands.train_report import last_lines, remarks
from diffusion_cli.commands.train_tasks import DenoisingTask
from diffusion_cli.conditions import Conditions
from diffusion_cli.config import load
from diffusion_cli.diffusion.objectives import Consistency, ProgressiveDistillation
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


@pytest.mark.parametrize(("max_steps", "named"), [(1500, True), (1501, False), (None, False)])
@pytest.mark.parametrize("objective", [Consistency(), ProgressiveDistillation()])
def test_a_stage_of_a_few_step_model_after_the_end_is_named(objective, max_steps, named):
    setup = SimpleNamespace(
        dataset=SimpleNamespace(remarks=list),
        images=range(180),
        val_images=range(20),
        max_steps=max_steps,
        stages=SimpleNamespace(last=SimpleNamespace(first=0)),
        task=DenoisingTask(None, objective, None, None),  # pyright: ignore[reportArgumentType]
        label_counts=None,
    )
    line = "objective.stage_steps=500: the last of 4 stages begins at step 1500, but the run ends"
    assert any(line in found for found in remarks(setup)) == named  # pyright: ignore[reportArgumentType]


def next_command(model: nn.Module, folder: Path, objective: str = "Simple") -> list[str]:
    """Return the words of the next command after training with an objective."""
    stop = SimpleNamespace(stopping=False, signal=None, by_callback=False, seconds_left=lambda: None)
    config = {"objective": {"_target_": f"diffusion_cli.diffusion.objectives.{objective}"}}
    progress = SimpleNamespace(outcome=lambda: "Trained", config=config)
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


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("Consistency", ["sampler=consistency", "steps=2"]),
        ("TrajectoryDistillation", ["sampler=consistency", "steps=2"]),
        ("ProgressiveDistillation", ["steps=1"]),
    ],
)
def test_the_next_command_takes_the_few_steps_of_the_model(schedules, objective, words):
    model = grey_model(schedules["cosine"], Conditions()).denoiser
    assert next_command(model, Path("x"), objective) == ["diffuse", "sample", "run=x", *words]
    load("sample", ["run=x", *words])

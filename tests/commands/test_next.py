"""Remarks before a training, and the next command after it, which can be pasted into a shell."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from diffusion_cli.commands import train_report
from diffusion_cli.commands.train_report import last_lines
from diffusion_cli.commands.train_tasks import DenoisingTask
from diffusion_cli.conditions import Conditions
from diffusion_cli.config import load
from diffusion_cli.diffusion.objectives import Consistency, ProgressiveDistillation, Simple
from helpers.conditions import TEXT, grey_model


def settings(every: int | None = None, **changes: Any) -> SimpleNamespace:
    """Return the settings of a training that remarks are about."""
    usual = {"coupling": "none", "batch_size": 8, "accumulate_grad_batches": 1}
    return SimpleNamespace(ema=SimpleNamespace(snapshot_every=every), **usual | changes)


def remarks(**parts: Any) -> list[str]:
    """Return the remarks on a training with some parts, and nothing else to remark on."""
    usual: dict[str, Any] = {
        "config": settings(),
        "dataset": SimpleNamespace(remarks=list),
        "device": SimpleNamespace(fast_dev_run=False),
        "images": range(180),
        "val_images": range(20),
        "max_steps": None,
        "stages": SimpleNamespace(last=SimpleNamespace(first=0)),
        "task": DenoisingTask(None, Simple(), None, None),  # pyright: ignore[reportArgumentType]
        "label_counts": None,
    }
    return train_report.remarks(SimpleNamespace(**usual | parts))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("train", "val", "marked"), [(58, 2, True), (180, 20, False), (5, 0, False)])
def test_a_small_validation_split_is_named_before_training(train, val, marked):
    lines = remarks(images=range(train), val_images=range(val))
    assert any(f"{train} training and {val} validation images" in line for line in lines) == marked


@pytest.mark.parametrize(("max_steps", "named"), [(1500, True), (1501, False), (None, False)])
@pytest.mark.parametrize("objective", [Consistency(), ProgressiveDistillation()])
def test_a_stage_of_a_few_step_model_after_the_end_is_named(objective, max_steps, named):
    task = DenoisingTask(None, objective, None, None)  # pyright: ignore[reportArgumentType]
    line = "objective.stage_steps=500: the last of 4 stages begins at step 1500, but the run ends"
    assert any(line in found for found in remarks(max_steps=max_steps, task=task)) == named


@pytest.mark.parametrize(
    ("every", "max_steps", "named"), [(60, 60, True), (59, 60, False), (60, None, False), (None, 60, False)]
)
def test_averages_without_snapshots_are_named(every, max_steps, named):
    """A snapshot of the last step has the averages of the checkpoint, which do not give those of other lengths."""
    line = "ema.snapshot_every=60: no snapshot comes before the end at step 60, so"
    assert any(line in found for found in remarks(config=settings(every), max_steps=max_steps)) == named
    trial = SimpleNamespace(fast_dev_run=True)  # which has one step
    assert not any(
        line in found for found in remarks(config=settings(every), max_steps=max_steps, device=trial)
    )


@pytest.mark.parametrize(
    ("parts", "coupling", "named"), [(8, "ot", True), (4, "ot", False), (8, "none", False)]
)
def test_a_coupling_within_parts_of_one_image_is_named(parts, coupling, named):
    line = "coupling=ot: has no effect, because batch_size=8 and accumulate_grad_batches=8 make parts of one"
    found = remarks(config=settings(coupling=coupling, accumulate_grad_batches=parts))
    assert any(line in each for each in found) == named


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

"""The task that an option of `model` or `objective` is for, known before torch is imported."""

from collections.abc import Sequence
from functools import cache

from diffusion_cli.config.catalogue import brought_by, content, options
from diffusion_cli.config.validate import IMPORTED
from diffusion_cli.config.values import Node
from diffusion_cli.errors import Problem

DENOISING, AUTOENCODER = "diffusion", "autoencoder"
GROUPS_OF_TASKS = ("model", "objective")


def task_problems(choosing: Sequence[str], composed: Node, choices: Node) -> list[Problem]:
    """Return the problem of a model and an objective for different tasks, about the one that the user chose.

    Only an autoencoder also needs its `task=`, which leaves out the noise.

    Args:
        choosing: words of the command line that choose options.
        composed: the configuration of a training.
        choices: the option of each group.
    """
    tasks = {group: _tasks().get(composed[group]["_target_"], DENOISING) for group in GROUPS_OF_TASKS}
    encodes = AUTOENCODER in tasks.values()
    if len({*tasks.values()}) == 1 and encodes == (choices["task"] == AUTOENCODER):
        return []
    chosen = {group: name for group, _, name in (word.partition("=") for word in choosing)}
    model_suits = "model" not in chosen or tasks["model"] == chosen.get("task")
    group = "objective" if "objective" in chosen and model_suits else "model"
    remedy = f"set task={tasks[group]}, or choose another {group}"
    return [Problem(group, choices[group], f"is for task={tasks[group]}", remedy)]


def task_of_classes(targets: Sequence[str]) -> str:
    """Return the task of the classes of a model and an objective."""
    return next((_tasks()[target] for target in targets if target in _tasks()), DENOISING)


@cache
def _tasks() -> dict[str, str]:
    """The task of each class that an option of `task` brings, and of imported ones; all others are for denoising."""
    return {IMPORTED["model"]: AUTOENCODER} | {
        content(options(group)[str(option)])["_target_"]: task
        for task, file in options("task").items()
        for group, option in brought_by(file).items()
        if group in GROUPS_OF_TASKS
    }

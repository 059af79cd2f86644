"""A warning about a training that takes days on a CPU."""

from diffusion_cli.config.recipe import network_width
from diffusion_cli.config.values import Node
from diffusion_cli.errors import class_name

LONG = 12 * 3600.0
"""Remaining seconds from which training on a CPU prints a warning."""


def warning(config: Node, seconds: float, steps: int) -> str | None:
    """Return a line with the time of the remaining steps and faster settings; None if it is under 12 hours.

    Args:
        config: the configuration of the training.
        seconds: seconds per step.
        steps: the number of steps that remain.
    """
    total = seconds * steps
    if total < LONG:
        return None
    takes = f"{total / 86400:.0f} days" if total >= 2 * 86400 else f"{total / 3600:.0f} hours"
    size, model = config["dataset"].get("resolution"), config["model"]
    of_images = isinstance(size, int) and class_name(model) in ("UNet", "DiT")
    words = [
        *(["model=unet_patch2"] if of_images and network_width(model) > 64 else []),
        *(["dataset.resolution=32"] if of_images and size > 32 else []),
        *(["max_steps=20000"] if steps > 20_000 else []),
    ]
    faster = (
        f"stop (Ctrl-C) and train with {' '.join(words)} name=NEW"
        if words
        else "add max_time=1h to stop after an hour"
    )
    return f"{seconds:.1f} s per step without a GPU: {steps:,} steps take about {takes}; {faster}"

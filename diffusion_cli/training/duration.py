"""A warning about a training that takes days on a CPU."""

from diffusion_cli.config.schema import Node

LONG = 12 * 3600.0
"""Seconds from which on a training without a GPU gets a warning."""


def warning(config: Node, seconds: float, steps: int) -> str | None:
    """Return a line with the time of the remaining steps and a faster choice; None for a training of hours.

    Args:
        config: the configuration of the training.
        seconds: the time of a step.
        steps: the number of steps that remain.
    """
    total = seconds * steps
    if total < LONG:
        return None
    takes = f"{total / 86400:.0f} days" if total >= 2 * 86400 else f"{total / 3600:.0f} hours"
    faster = "a smaller model= and max_steps=, or max_time=1h, take less"
    if config["schedule"] is not None and isinstance(config["dataset"].get("resolution"), int):
        faster = "model=unet_patch2 dataset.resolution=32 max_steps=20000 takes far less"
    return f"{seconds:.1f} s a step without a GPU: {steps:,} steps take about {takes}; {faster}"

"""A logger of Lightning."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger


class Example(Logger):
    """Appends each point to a file, one line of JSON each.

    A logger gets the numbers of the curves. An error ends the logger, not the training.

    Args:
        path: file of the points
    """

    def __init__(self, *, path: str = "points.jsonl") -> None:
        super().__init__()
        self.path = Path(path)

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "example"

    @property
    def version(self) -> str:
        """Version of the run; empty."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log the configuration of the run."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a point to each curve, such as `loss`."""
        with self.path.open("a") as file:
            print(json.dumps({"step": step, **metrics}), file=file)

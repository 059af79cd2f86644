"""A figure of noise schedules."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusion_cli.charts import Curve, Panel, save_panels
from diffusion_cli.config import PlotConfig, build
from diffusion_cli.figures import Figure
from pydantic import PositiveInt


class Example(Figure):
    """The standard deviation of the noise, sigma, over time for each of `schedule=[...]`.

    Args:
        points: points of each curve
    """

    name = "example"
    of = ("schedule",)  # keys that may have several values, each with a curve
    formats = ("png", "pdf", "svg")  # the first is the default

    def __init__(self, *, points: PositiveInt = 200) -> None:
        self.points = points

    def draw(self, configs: Mapping[str, PlotConfig], path: Path) -> None:
        """Draw the configurations, by their labels, to a file."""
        times = torch.linspace(0, 1, self.points, dtype=torch.float64)
        curves = []
        for label, config in configs.items():
            _, sigma = build(config.schedule)(times)
            curves.append(Curve(label, list(zip(times.tolist(), sigma.tolist(), strict=True))))
        save_panels([Panel("$t$", r"$\sigma_t$", curves)], path)

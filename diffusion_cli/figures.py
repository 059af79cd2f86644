"""Figures of schedules, noisy images and training runs."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from diffusion_cli.captions import Captions
from diffusion_cli.charts import Curve, Panel, Points, save_panels
from diffusion_cli.config import PlotConfig, TrainConfig, build, load
from diffusion_cli.data import Dataset, to_model_range
from diffusion_cli.data.base import Split
from diffusion_cli.diffusion.denoiser import noised
from diffusion_cli.diffusion.schedules import Discrete, Schedule
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.generate import SeededNoise, frame_places, scale_for_display
from diffusion_cli.images import PLAIN, read_images, rows, save_gif, save_png, save_rows
from diffusion_cli.runs.curves import read_curves
from diffusion_cli.runs.find import find_run

MARGIN = 4  # pixels around a preview
LOSSES = {
    "loss": "training",
    "loss_q1": "1st quartile (least noise)",
    "loss_q2": "2nd quartile",
    "loss_q3": "3rd quartile",
    "loss_q4": "4th quartile (most noise)",
    "val_loss": "validation",
}

Frames = Annotated[int, Field(ge=2)]


class Figure(ABC):
    """Base class of figures of one or several configurations."""

    name: str
    """Name of the figure."""
    of: tuple[str, ...]
    """Configuration keys that may have several values, the main one first."""
    formats: tuple[str, ...]
    """Suffixes of supported files, the default first."""

    @abstractmethod
    def draw(self, configs: Mapping[str, PlotConfig], path: Path) -> None:
        """Draw the figure for labelled configurations to a file in one of the formats."""


class Schedules(Figure):
    """Schedules as curves over t.

    Shows alpha_bar = alpha^2 if all schedules are variance-preserving, else alpha and sigma; beta, the variance of
    q(x_t | x_s) for neighbouring timesteps (Ho et al. 2020, Eq. 2), for discrete schedules; and the log-SNR.

    Args:
        points: points per curve; curves start at t_min, but at least at 1 / points.
    """

    name = "schedule"
    of = ("schedule",)
    formats = ("png", "pdf", "svg")

    def __init__(self, *, points: Frames = 1000) -> None:
        self.points = points

    def draw(self, configs: Mapping[str, PlotConfig], path: Path) -> None:
        save_panels(self.panels({label: build(config.schedule) for label, config in configs.items()}), path)

    def panels(self, schedules: Mapping[str, Schedule]) -> list[Panel]:
        """Return the panels of labelled schedules, with the log-SNR where it is finite."""
        levels = {}
        for label, schedule in schedules.items():
            t = torch.linspace(max(schedule.t_min, 1 / self.points), 1, self.points, dtype=torch.float64)
            levels[label] = (t, *schedule(t))
        if all(
            torch.allclose(alpha**2 + sigma**2, torch.ones_like(t)) for t, alpha, sigma in levels.values()
        ):
            curves = [curve(label, t, alpha**2) for label, (t, alpha, _) in levels.items()]
            panels = [Panel("$t$", r"$\bar\alpha_t = \alpha_t^2$", curves)]
        else:
            alphas = [curve(label, t, alpha) for label, (t, alpha, _) in levels.items()]
            sigmas = [curve(label, t, sigma) for label, (t, _, sigma) in levels.items()]
            panels = [Panel("$t$", r"$\alpha_t$", alphas), Panel("$t$", r"$\sigma_t$", sigmas, log_y=True)]
        betas = [
            curve(label, *betas_of(schedule))
            for label, schedule in schedules.items()
            if isinstance(schedule, Discrete)
        ]
        panels += [Panel("$t$", r"$\beta_t$", betas, log_y=True)] if betas else []
        ratios = [curve(label, t, schedules[label].log_snr(t)) for label, (t, _, _) in levels.items()]
        return [*panels, Panel("$t$", r"$\log\,(\alpha_t^2 / \sigma_t^2)$", ratios)]


class Forward(Figure):
    """Forward process: a real image with noise at increasing times, alpha_t x_0 + sigma_t eps for a fixed eps.

    Args:
        dataset: dataset of the image.
        split: split of the dataset.
        frames: number of times.
        captions: whether to name the rows and times in the margins.
    """

    name = "forward"
    of = ("schedule", "image")
    formats = ("png",)

    def __init__(
        self, *, dataset: str = "digits", split: Split = "val", frames: Frames = 10, captions: bool = True
    ) -> None:
        self.dataset, self.frames, self.captions = dataset, frames, captions
        self.split: Split = split

    def draw(self, configs: Mapping[str, PlotConfig], path: Path) -> None:
        times = [f"{t:.2g}" for t in torch.linspace(0, 1, self.frames).tolist()]
        captions = Captions(list(configs), times, "t", f"{self.dataset}, {self.split} split")
        save_rows(
            [self.row(config) for config in configs.values()], path, captions if self.captions else PLAIN
        )

    def row(self, config: PlotConfig) -> Tensor:
        """Return the image at increasing times, uint8 [frames, C, H, W]; UsageError if there is no such image."""
        # Dataset options are composed for training, with a network and a budget.
        try:
            training = load("train", [f"dataset={self.dataset}"])
        except UsageError as error:
            raise UsageError("figure.dataset", self.dataset, f"cannot be loaded by name ({error})") from error
        assert isinstance(training, TrainConfig)
        dataset: Dataset = build(training.dataset, config.data_dir)
        images = dataset.load(self.split)
        if config.image >= len(images):
            raise UsageError(
                "image",
                config.image,
                f"{dataset.name} has {len(images)} images in its {self.split} split",
                "use a smaller index",
            )
        image = to_model_range(images[torch.tensor([config.image])])
        schedule: Schedule = build(config.schedule)
        t = torch.linspace(0, 1, self.frames, dtype=torch.float64)
        eps = SeededNoise([config.image], dataset.shape, image.device).noise()
        seen = scale_for_display(
            noised(schedule, image.expand(self.frames, *image.shape[1:]), t, eps), t, schedule
        )
        return dataset.form.to_rgb(dataset.form.quantize(seen))


class Losses(Figure):
    """Losses of runs from metrics.csv: one panel for a single run, one panel per loss for several runs.

    Dotted lines mark changes of the image size, which change the loss.

    Args:
        log: whether the loss axis is logarithmic.
    """

    name = "loss"
    of = ("run",)
    formats = ("png", "pdf", "svg")

    def __init__(self, *, log: bool = True) -> None:
        self.log = log

    def draw(self, configs: Mapping[str, PlotConfig], path: Path) -> None:
        runs = {label: read_metrics(run_of(config)) for label, config in configs.items()}
        save_panels(self.panels(runs), path)

    def panels(self, runs: Mapping[str, Mapping[str, Points]]) -> list[Panel]:
        """Return the panels of the losses among the curves of runs, by label and column."""
        marks = []
        if len(runs) == 1:
            ((run, columns),) = runs.items()
            groups = {run: [Curve(title, columns[name]) for name, title in LOSSES.items() if name in columns]}
            marks = size_changes(columns)
        else:
            groups = {
                title: [Curve(run, columns[name]) for run, columns in runs.items() if name in columns]
                for name, title in LOSSES.items()
            }
        return [
            Panel(
                "step",
                "loss",
                curves,
                title,
                log_y=self.log and all(min(curve.y) > 0 for curve in curves),
                marks=marks,
            )
            for title, curves in groups.items()
            if curves
        ]


class Previews(Figure):
    """Previews of runs, the sample grids saved during training.

    Args:
        frames: maximum number of previews per run.
        captions: whether to name the runs and steps in the margins.
    """

    name = "previews"
    of = ("run",)
    formats = ("png", "gif")

    def __init__(self, *, frames: Frames = 6, captions: bool = True) -> None:
        self.frames, self.captions = frames, captions

    def draw(self, configs: Mapping[str, PlotConfig], path: Path) -> None:
        runs = {label: self.previews(run_of(config)) for label, config in configs.items()}
        if path.suffix == ".gif":
            if len(runs) > 1:
                raise UsageError(
                    "output", path, "an animation shows a single run", "name one run, or use a .png"
                )
            (previews,) = runs.values()
            save_gif(torch.stack([*previews.values()]), path, names=self._steps(previews))
            return
        pictures = [
            rows(
                [torch.stack([*previews.values()])],
                Captions([label] if self.captions else [], self._steps(previews)),
            )
            for label, previews in runs.items()
        ]
        save_png(torch.cat(_same_size(pictures, across=True), 1), path)

    def _steps(self, previews: Mapping[int, Tensor]) -> list[str]:
        return [f"step {step:,}" for step in previews] if self.captions else []

    def previews(self, run: Path) -> dict[int, Tensor]:
        """Return previews of a run by step, including the last, uint8 [C, H, W] of one size.

        Raises UsageError if there are none.
        """
        found = {
            int(match[1]): file
            for file in sorted((run / "previews").glob("step_*.png"))
            if (match := re.fullmatch(r"step_(\d+)", file.stem))
        }
        if not found:
            raise UsageError("run", run, "has no previews", "train with preview_every=")
        steps = [[*found][place] for place in frame_places(len(found), self.frames)]
        images = _same_size([read_images([found[step]])[0] for step in steps])
        return {
            step: F.pad(image, (MARGIN, MARGIN, MARGIN, MARGIN), value=255)
            for step, image in zip(steps, images, strict=True)
        }


def _same_size(pictures: Sequence[Tensor], across: bool = False) -> list[Tensor]:
    """Return pictures [C, H, W] with white at the left and at the top, where captions are.

    Args:
        pictures: gray and coloured pictures.
        across: whether only channels and widths become equal.
    """
    channels, height, width = (max(picture.shape[axis] for picture in pictures) for axis in range(3))
    return [
        F.pad(
            picture.expand(channels, *picture.shape[1:]),
            (width - picture.shape[2], 0, 0 if across else height - picture.shape[1], 0),
            value=255,
        )
        for picture in pictures
    ]


def curve(label: str, x: Tensor, y: Tensor) -> Curve:
    """Return a curve of the points with finite y."""
    finite = y.isfinite()
    return Curve(label, list(zip(x[finite].tolist(), y[finite].tolist(), strict=True)))


def betas_of(schedule: Discrete) -> tuple[Tensor, Tensor]:
    """Return the times i / T, i = 1..T, of a discrete schedule, and their betas, float64 [T]."""
    t = torch.arange(schedule.num_timesteps + 1, dtype=torch.float64) / schedule.num_timesteps
    return t[1:], schedule.transition(t[1:], t[:-1])[1]


def run_of(config: PlotConfig) -> Path:
    """Return the folder of the run of a figure."""
    return find_run(config.run, config.output_dir)


def read_metrics(run: Path) -> Mapping[str, Points]:
    """Return the curves of a run by column; UsageError if it has no readable losses."""
    path = run / "metrics.csv"
    if not path.is_file():
        raise UsageError("run", run, "has no metrics.csv", "train with logger=csv")
    try:
        curves = read_curves(path)
    except FormatError as error:
        raise UsageError(path, NO_VALUE, str(error), "repair it or move it away") from error
    if not LOSSES.keys() & curves.keys():
        raise UsageError(
            path, NO_VALUE, "has no losses", "train longer than log_every=, or choose another run"
        )
    return curves


def size_changes(curves: Mapping[str, Points]) -> list[float]:
    """Return the last recorded step before each change of the image size."""
    sizes = curves.get("size", [])
    return [step for (step, size), (_, later) in pairwise(sizes) if size != later]

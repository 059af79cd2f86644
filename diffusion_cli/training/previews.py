"""Pictures of the EMA weights during training."""

import math
import sys
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_cli.batch_size import ran_out
from diffusion_cli.captions import Captions
from diffusion_cli.conditions import Condition
from diffusion_cli.conditions.condition import IMAGE, LABEL
from diffusion_cli.data import ResolutionSchedule, reduced
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Space
from diffusion_cli.errors import UsageError, first_line
from diffusion_cli.formats import SampleFormat
from diffusion_cli.generate import rows_in_turn, sample
from diffusion_cli.images import as_image, beside_originals, by_class, save_rows
from diffusion_cli.metrics import EvaluationCancelled
from diffusion_cli.samplers import Sampler, reporting
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.training.callbacks import GracefulStop, PeriodicCallback
from diffusion_cli.training.ema import EMA
from diffusion_cli.training.logs import run_loggers
from diffusion_cli.training.module import Trainable, TrainingModule


class PreviewCallback(PeriodicCallback):
    """Saves pictures of the EMA weights. Training continues without a picture that cannot be made.

    Args:
        run: folder of the run.
    """

    at_end = True

    def __init__(self, every: int, ema: EMA, stop: GracefulStop, *, run: Path, early: int) -> None:
        super().__init__(every, ema, stop, early)
        self.folder = run / "previews"

    def on_optimizer_step(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        if step != trainer.max_steps:  # then `on_fit_end` follows
            super().on_optimizer_step(trainer, module, step)

    @torch.no_grad()
    def run(self, trainer: Trainer, module: TrainingModule, step: int) -> bool:
        averaged = self.ema.model(module)
        if trainer.is_global_zero:
            path = self.folder / f"step_{step:08d}.png"
            try:
                with self.stop.interrupting():
                    self.save(trainer, averaged, module.device, step, path)
            except EvaluationCancelled:
                trainer.should_stop = True
                return False
            except (OSError, UsageError, RuntimeError, MemoryError) as error:
                if isinstance(error, RuntimeError) and not ran_out(error):
                    raise
                ProgressBar.write(
                    f"diffuse: no preview of step {step} ({first_line(error)}); training continues",
                    file=sys.stderr,
                )
            else:
                for logger in run_loggers(trainer):
                    logger.log_image("preview", path, step)
        return True

    @abstractmethod
    def save(self, trainer: Trainer, model: Trainable, device: torch.device, step: int, path: Path) -> None:
        """Write the picture of a step; called by rank 0 only."""


class Preview(PreviewCallback):
    """Saves a grid of samples of the EMA weights, with the same seeds every time, in the final resolution.

    It also runs at steps 1, 10, 100, ... and at the last step, once training has taken longer than a preview.

    Args:
        batch_size: images per optimizer step, to compare the times.
    """

    stored_as = "Preview"

    SEEDS = range(64)
    ROWS = 8
    """Conditions of a preview with titles, each with a row of samples."""
    PAIRS = 32
    """Most samples of a preview that shows condition images."""

    def __init__(
        self,
        every: int,
        ema: EMA,
        stop: GracefulStop,
        *,
        run: Path,
        sampler: Sampler,
        steps: int,
        stages: ResolutionSchedule,
        space: Space,
        form: SampleFormat,
        batch_size: int,
        condition: Condition | None = None,
        originals: Tensor | None = None,
        names: Sequence[str] | None = None,
        titles: Sequence[str] = (),
    ) -> None:
        self.seeds = self.SEEDS if originals is None else self.SEEDS[: min(self.PAIRS, len(originals))]
        # A training step takes about three forward passes for each image.
        early = math.ceil(len(self.seeds) * steps / (3 * batch_size))
        super().__init__(every, ema, stop, run=run, early=early)
        self.originals = originals
        """Real images with the condition images, float32 in [-1, 1]; None without condition images."""
        self.condition = condition
        """Conditions of consecutive samples, repeated; None: unconditional."""
        self.names = names
        """Names of the classes, or None."""
        self.titles = titles
        """Names of `ROWS` conditions, one for each row of samples; empty for samples by class."""
        self.sampler, self.steps, self.stages, self.space, self.form = sampler, steps, stages, space, form

    def save(self, trainer: Trainer, model: Trainable, device: torch.device, step: int, path: Path) -> None:
        assert isinstance(model, Denoiser)
        shape, times = self.stages.after(step).shape, self.sampler.grid(self.steps)
        y = rows_in_turn(self.seeds, self.condition, device)
        if y is not None and (image := y.get(IMAGE)) is not None:
            y = y.replaced({IMAGE: reduced(image, shape)})
        denoise = self.space.clipped(lambda x, t: model(x, t, y), model.schedule)
        count = len(self.seeds)
        bar = ProgressBar(total=count, desc="preview", unit="image", delay=1.0, leave=False)
        with trainer.precision_plugin.forward_context(), bar, bar.batch(count) as advance:
            x = sample(
                reporting(denoise, times, advance),
                self.sampler,
                times,
                self.seeds,
                shape,
                device,
            )
        images = self.space.decode(x)
        if self.stages.grow:
            images = interpolate(images, self.stages.last.shape[1:])
        rows, captions = self._rows(images.cpu())
        save_rows(rows, path, captions)

    def _rows(self, images: Tensor) -> tuple[list[Tensor], Captions]:
        """Return rows of pictures of samples, with their condition images and originals if there are any."""
        pictures = self._pictures(images)
        given = None if self.condition is None else self.condition.get(IMAGE)
        if given is not None and self.originals is not None:
            conditions = self._pictures(as_image(given, images.shape[1]))
            return beside_originals(conditions, pictures, self._pictures(self.originals))
        labels = None if self.condition is None else self.condition.get(LABEL)
        classes = None if labels is None else labels.tolist()
        if self.titles:
            return [*pictures.split(len(self.seeds) // self.ROWS)], Captions(self.titles)
        return by_class(pictures, self.seeds, classes, self.names)

    def _pictures(self, images: Tensor) -> Tensor:
        return self.form.to_rgb(self.form.quantize(images))

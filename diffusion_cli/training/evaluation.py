"""Evaluation during training, and the checkpoint of the best result."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from diffusion_cli.conditions import AttributeDescription, Condition
from diffusion_cli.conditions.condition import LABEL, is_missing
from diffusion_cli.conditions.rows import ConditionRows, in_turn
from diffusion_cli.data import PicturedImages, ResolutionSchedule
from diffusion_cli.data.image_rows import texts_of
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Space
from diffusion_cli.formats import SampleFormat, Shape
from diffusion_cli.generate import rows_in_turn, sample
from diffusion_cli.metrics import (
    EvaluationCancelled,
    FeatureExtractors,
    Metric,
    MetricValue,
    Reference,
    Samples,
    evaluate,
    require,
)
from diffusion_cli.runs.checkpoint import BEST
from diffusion_cli.samplers import Advance, Sampler, reporting, unreported
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.training.callbacks import GracefulStop, PeriodicCallback
from diffusion_cli.training.ema import EMA
from diffusion_cli.training.logs import run_loggers
from diffusion_cli.training.module import TrainingModule
from diffusion_cli.training.stored_state import MOST_STEPS, Maybe, Number
from diffusion_cli.training.validation import validation


class TrainingSamples(Samples):
    """Samples of a denoiser in training, with seeds 0, 1, ... and the given conditions in turn."""

    def __init__(
        self,
        count: int,
        sampler: Sampler,
        steps: int,
        shape: Shape,
        space: Space,
        *,
        form: SampleFormat,
        names: tuple[str, ...] | None,
        condition: ConditionRows | None,
        attributes: tuple[AttributeDescription, ...] = (),
        originals: tuple[PicturedImages, Tensor] | None = None,
    ) -> None:
        self.count, self.sampler, self.steps = count, sampler, steps
        self.space, self.shape, self.class_names = space, form.measured_shape(shape), names
        self.form = self._form = form
        self.conditions, self.attributes, self.paired = condition, attributes, originals
        """`paired`: real images, and the rows of those with the conditions, int64 [K], or None."""
        # Without class names, values named "label" are no classes.
        labels = None if names is None or condition is None else condition.get(LABEL)
        self.labelled = labels is not None and not bool(is_missing(labels).all())
        self.has_texts = self.texts_of(range(count)) is not None
        self.denoiser: Denoiser | None = None
        """The current denoiser; set before each evaluation."""
        self.precision: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Precision context of the denoiser; feature extractors run outside it."""

    def __len__(self) -> int:
        return self.count

    def condition_of(self, numbers: Sequence[int]) -> Condition | None:
        if not self.attributes:
            return None
        return rows_in_turn(numbers, self.conditions, torch.device("cpu"))

    def texts_of(self, numbers: Sequence[int]) -> list[str | None] | None:
        return texts_of(self.conditions, None, numbers)

    def originals(self, numbers: Sequence[int]) -> Tensor | None:
        if self.paired is None:
            return None
        images, places = self.paired
        rows = places[in_turn(numbers, len(places))]
        return images.stored(rows.to(images.device)).cpu()

    @torch.inference_mode()
    def batch(self, numbers: Sequence[int], advance: Advance = unreported) -> tuple[Tensor, Tensor | None]:
        denoiser = self.denoiser
        assert denoiser is not None
        device = next(denoiser.parameters()).device
        y = rows_in_turn(numbers, self.conditions, device)
        denoise = self.space.clipped(lambda x, t: denoiser(x, t, y), denoiser.schedule)
        times = self.sampler.grid(self.steps)
        denoise = reporting(denoise, times, advance)
        with self.precision():
            x = sample(denoise, self.sampler, times, numbers, self.space.shape, device)
        images = self.space.decode(x)
        # Early weights may give values that are not finite: a bad score, no reason to stop.
        labels = y.get(LABEL) if y is not None and self.labelled else None
        self.latest = self._form.quantize(images.nan_to_num(0.0, 1.0, -1.0))
        return self._form.measured(self.latest), labels

    def protocol(self) -> dict[str, Any]:
        return {}


class EvaluationCallback(PeriodicCallback):
    """Measures samples of the EMA weights, logs the results, and saves the best checkpoint as `best.ckpt`.

    With progressive resolution it measures only at the final resolution.
    Raises UsageError, before training, if a metric needs more samples.
    """

    stored_as = "Evaluation"

    def __init__(
        self,
        every: int,
        metrics: Mapping[str, Metric],
        networks: FeatureExtractors,
        reference: Reference,
        samples: TrainingSamples,
        stages: ResolutionSchedule,
        *,
        run: Path,
        ema: EMA,
        stop: GracefulStop,
        batch_size: int,
        keep_best: str | None,
        identity: str,
    ) -> None:
        super().__init__(every, ema, stop)
        self.metrics, self.networks, self.reference, self.samples = metrics, networks, reference, samples
        self.stages = stages
        self.folder, self.batch_size, self.keep_best = run, batch_size, keep_best
        self.identity = identity
        """Digest of the protocol; results of other protocols are not compared."""
        self.best: tuple[int, float] | None = None
        """Step and value of the best result."""
        self.measures = tuple(metrics)
        require(metrics, networks, samples, reference, force=True)

    def run(self, trainer: Trainer, module: TrainingModule, step: int) -> bool:
        if self.stages.after(step) is not self.stages.last:
            return True
        denoiser = self.ema.model(module)
        assert isinstance(denoiser, Denoiser)
        self.samples.denoiser, self.samples.precision = denoiser, trainer.precision_plugin.forward_context
        try:
            with validation(trainer, module, step) as measured:
                with self.stop.interrupting():
                    evaluation = evaluate(
                        self.metrics, self.networks, self.samples, self.reference,
                        batch_size=self.batch_size, force=True, called_off=self.stop.called,
                    )  # fmt: skip
                found = {result.name: result.value for result in evaluation.report.results}
                first = {
                    name: result.value
                    for name, result in evaluation.first.items()
                    if result.value is not None
                }
                for mine, those in zip(measured, Distributed().broadcast((found, first)), strict=True):
                    mine.update(those)
        except EvaluationCancelled:
            trainer.should_stop = True
            return False
        for logger in run_loggers(trainer):
            logger.log_evaluation(evaluation.report.to_dict(), step)
        if self.keep_best is not None:
            first = evaluation.first.get(self.keep_best)
            self._keep(trainer, step, Distributed().broadcast(first))
        return True

    def _keep(self, trainer: Trainer, step: int, found: MetricValue | None) -> None:
        if found is None or found.value is None:
            return
        sign = 1 if found.higher_is_better else -1
        if self.best is None or sign * found.value > sign * self.best[1]:
            self.best = step, found.value
            trainer.save_checkpoint(self.folder / BEST)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "best": self.best, "identity": self.identity}

    def example_state(self) -> dict[str, Any]:
        """Return the template of a stored state."""
        return {**self.state_dict(), "best": Maybe((Number(0, MOST_STEPS, whole=True), Number()))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.best = state_dict["best"] if state_dict["identity"] == self.identity else None

"""The loss and the accuracy on the validation split, and the hooks of a validation."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from diffusion_cli.data import Batch
from diffusion_cli.diffusion.denoiser import NoisyClassifier, noised
from diffusion_cli.training.callbacks import GracefulStop, PeriodicCallback
from diffusion_cli.training.ema import EMA
from diffusion_cli.training.logs import log_metrics
from diffusion_cli.training.module import DenoisingModule, LevelMeter, TermMeter, TrainingModule


def on_measured(trainer: Trainer, module: LightningModule, values: Collection[str]) -> None:
    """End a validation for the callbacks that monitor one of the values, given by name."""
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if getattr(callback, "monitor", None) in values:
            callback.on_validation_epoch_end(trainer, module)
            callback.on_validation_end(trainer, module)


class Measured(NamedTuple):
    """Values of a validation by name."""

    values: dict[str, float]
    """Those to log."""
    aliases: dict[str, float]
    """Values by further names, for callbacks only."""


@contextmanager
def validation(trainer: Trainer, module: LightningModule, step: int) -> Iterator[Measured]:
    """Context that takes measured values, and logs them; it calls the validation hooks of the user's callbacks.

    A validation ends only for callbacks that monitor no value or one of the measured ones, so that early stopping
    counts each measurement once.
    """
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for callback in callbacks:
        callback.on_validation_start(trainer, module)
        callback.on_validation_epoch_start(trainer, module)
    values, aliases = measured = Measured({}, {})
    yield measured
    log_metrics(trainer, values, step, aliases)
    for callback in callbacks:
        if getattr(callback, "monitor", None) is None:
            callback.on_validation_epoch_end(trainer, module)
            callback.on_validation_end(trainer, module)
    on_measured(trainer, module, values | aliases)


class ValidationLoss(PeriodicCallback):
    """Logs the loss of the EMA weights on the validation split, with the same noise every time."""

    stored_as = "HeldOutLoss"
    measures = ("val_loss",)

    def __init__(
        self, every: int, batches: Callable[[int], Iterable[Batch]], ema: EMA, stop: GracefulStop
    ) -> None:
        super().__init__(every, ema, stop)
        self.batches = batches

    @torch.no_grad()
    def run(self, trainer: Trainer, module: TrainingModule, step: int) -> bool:
        meter = TermMeter()
        with validation(trainer, module, step) as measured:
            with trainer.precision_plugin.forward_context():
                for loss in module.val_losses(self.ema.model(module), self.batches(step)):
                    meter.add({"val_loss": loss}, step)
            measured.values.update(meter.read())
        return True


class ValidationAccuracy(PeriodicCallback):
    """Logs the accuracy of the EMA weights on the validation split, in total and by quartile of the noise."""

    stored_as = "HeldOutAccuracy"
    measures = ("val_accuracy",)
    at_end = True

    def __init__(
        self, every: int, batches: Callable[[int], Iterable[Batch]], ema: EMA, stop: GracefulStop
    ) -> None:
        super().__init__(every, ema, stop)
        self.batches = batches
        self.accuracy: dict[str, float] = {}
        """The last measured values."""

    @torch.no_grad()
    def run(self, trainer: Trainer, module: TrainingModule, step: int) -> bool:
        model = self.ema.model(module)
        assert isinstance(model, NoisyClassifier)
        meter = LevelMeter("accuracy")
        assert isinstance(module, DenoisingModule)
        with validation(trainer, module, step) as measured:
            for batch, t, eps, quantile in module.at_levels(self.batches(step)):
                with trainer.precision_plugin.forward_context():
                    guess = model(noised(model.schedule, batch.images, t, eps), t).argmax(1)
                meter.add((guess == batch.labels).float(), quantile, step)
            self.accuracy = meter.read()
            measured.values.update({f"val_{name}": value for name, value in self.accuracy.items()})
        return True

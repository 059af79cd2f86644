"""Callbacks of training: progress, logs, checkpoints, validation, previews and the stop at a signal."""

import math
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import interpolate

from diffusion_cli.batch_size import ran_out
from diffusion_cli.config.values import Node
from diffusion_cli.data import Batch, ResolutionSchedule
from diffusion_cli.diffusion.denoiser import Denoiser, NoisyClassifier, noised
from diffusion_cli.diffusion.latents import Space
from diffusion_cli.errors import NO_VALUE, UsageError, counted, first_line
from diffusion_cli.formats import SampleFormat
from diffusion_cli.generate import labels_of, sample
from diffusion_cli.images import by_class, save_rows
from diffusion_cli.metrics import EvaluationCancelled
from diffusion_cli.runs.checkpoint import LAST, copy_checkpoint, numbered, save
from diffusion_cli.samplers import Sampler, reporting
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.signals import handled, handling
from diffusion_cli.training import duration
from diffusion_cli.training.ema import EMA
from diffusion_cli.training.logs import log_metrics, run_loggers
from diffusion_cli.training.loss_check import LossCheck
from diffusion_cli.training.module import DenoisingModule, LevelMeter, TermMeter, Trainable, TrainingModule
from diffusion_cli.training.stored_state import Maybe, OfType


class DivergedError(UsageError):
    """The loss or a weight is not finite."""


class WholeFileIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints atomically."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(checkpoint, Path(path))


POWERS_OF_TEN = frozenset(10**power for power in range(10))


class StepCallback(Callback, ABC):
    """A callback that acts after optimizer steps, not after the parts of an accumulated batch.

    Args:
        every: steps between its actions.
        early: with a number, it also acts at steps 1, 10, 100, ... from this one up to `every`.
    """

    def __init__(self, every: int, early: int | None = None) -> None:
        self.every, self.early = every, early
        self._seen = -1

    def due(self, step: int) -> bool:
        """Return whether it acts at a step."""
        is_early = self.early is not None and self.early <= step < self.every and step in POWERS_OF_TEN
        return is_early or step % self.every == 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step > self._seen:
            self._seen = step
            if self.due(step):
                assert isinstance(pl_module, TrainingModule)
                self.on_optimizer_step(trainer, pl_module, step)

    @abstractmethod
    def on_optimizer_step(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        """Act after an optimizer step that is due."""


def stop_if_diverged(module: TrainingModule, last: Path, step: int | None = None) -> None:
    """Raise DivergedError in all processes if a loss was not finite or, with `step`, a weight is not."""
    bad_loss = module.meter.first_bad_step()
    if bad_loss is None and step is not None:
        norm = nn.utils.get_total_norm([p.detach() for p in module.model.parameters()])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        step = None if norm.isfinite() else step
    else:
        step = bad_loss
    if step is not None:
        what = "loss" if bad_loss is not None else "weights"
        rate = module.trainer.optimizers[0].param_groups[0]["lr"]
        kept, place = "there is no checkpoint yet", ""
        if last.is_file():
            kept, place = f"the last good checkpoint is {last}", " with another name="
        raise DivergedError(
            what,
            NO_VALUE,
            f"not a finite number at step {step}, learning rate {rate:.3g}; {kept}",
            f"try a smaller optimizer.lr, a longer lr_schedule.warm_up_steps or precision=fp32{place}",
        )


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


class Progress(StepCallback):
    """Shows the progress bar and logs the losses: every `every` steps, early, and at the last step."""

    MEASURED = 20.0
    """Seconds of training over which the time of a step is measured."""

    def __init__(
        self,
        every: int,
        run: Path,
        stages: ResolutionSchedule,
        max_steps: int | None,
        stop: "GracefulStop",
        config: Node,
    ) -> None:
        super().__init__(every, early=1)
        self.run, self.stages, self.max_steps, self.stop = run, stages, max_steps, stop
        self.config, self.check = config, LossCheck(config)
        self._zero: float | None = None
        self._timed: tuple[int, float] | None = None
        self._estimated = False
        self._loss = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.bar = ProgressBar(
            total=self.max_steps,
            initial=trainer.global_step,
            unit="step",
            desc="train",
            disable=not trainer.is_global_zero,
            seconds_left=self.stop.seconds_left,
        )
        self._mark = self._start = (trainer.global_step, time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._mark[0] < trainer.global_step:
            assert isinstance(pl_module, TrainingModule)
            self.on_optimizer_step(trainer, pl_module, trainer.global_step)

    @property
    def step(self) -> int:
        """The last step of the training that has ended."""
        return self._mark[0]

    def outcome(self) -> str:
        """Return the steps since the first start, and the time, speed and last loss of this start."""
        (first, then), last = self._start, self.step
        passed = time.perf_counter() - then
        rate = (self.stages.images(last) - self.stages.images(first)) / passed
        now = f", {last - first} of them now," if first else ""
        return (
            f"Trained {counted(last, 'step')}{now} in {ProgressBar.format_interval(passed)}, {rate:.0f} images/s, "
            f"loss {self._loss:.4f}"
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.bar.update(trainer.global_step - self.bar.n)
        if self._timed is None:  # the first batch is slower
            assert isinstance(pl_module, TrainingModule)
            self._zero = pl_module.loss_of_zero(batch)
            self._timed = (trainer.global_step, time.perf_counter())
        elif not self._estimated and pl_module.device.type == "cpu":
            self._estimate(trainer.global_step, *self._timed)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _estimate(self, step: int, first: int, then: float) -> None:
        """Warn once if the training will take long, when the time of a step is measured."""
        passed = time.perf_counter() - then
        if passed < self.MEASURED or step < first + 2:
            return
        self._estimated = True
        if self.max_steps is not None and self.stop.max_seconds is None:
            self._warn(duration.warning(self.config, passed / (step - first), self.max_steps - step))

    def _warn(self, line: str | None) -> None:
        if line is not None and not self.bar.disable:
            self.bar.write(f"diffuse: {line}", file=sys.stderr)

    def on_optimizer_step(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        stop_if_diverged(module, self.run / LAST)
        values = module.meter.read()
        self._loss = values["loss"]
        (before, then), now = self._mark, time.perf_counter()
        self._mark = (step, now)
        rate = (self.stages.images(step) - self.stages.images(before)) / (now - then)
        values |= {"lr": trainer.optimizers[0].param_groups[0]["lr"], "images_per_second": rate}
        size = ""
        if self.stages.grow:
            values["size"] = self.stages.after(step).size
            size = f"size {values['size']}, "
        if self._zero is not None:
            values["relative_loss"] = values["loss"] / self._zero
            if step % self.every == 0:  # a mean over fewer steps varies more
                self._warn(self.check.warning(values["loss"], step, self._zero))
        log_metrics(trainer, values, step)
        on_measured(trainer, module, values)
        left = self.stop.seconds_left()
        limit = "" if left is None else f", {ProgressBar.format_interval(left)} of max_time left"
        self.bar.set_postfix_str(
            f"{size}loss {values['loss']:.4f}, {rate:.0f} images/s{limit}",
            refresh=step < self.every and self.due(step),
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if hasattr(self, "bar"):
            self.bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # the error message starts on a new line


class CheckpointCallback(StepCallback):
    """Saves checkpoints by steps and by time: `last.ckpt` and the newest `keep_last` by number."""

    def __init__(self, every: int, run: Path, keep_last: int, stop: "GracefulStop") -> None:
        super().__init__(every=1)
        self.steps, self.run, self.keep_last, self.stop = every, run, keep_last, stop
        self.saved: int | None = None

    def on_optimizer_step(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        ended = module.schedule_error
        if step % self.steps == 0 or self.stop.checkpoint_due or ended:
            self.save(trainer, module)
        if ended and step != trainer.max_steps:
            problem = f"{first_line(ended)}; {self.run} is saved at step {step}"
            raise UsageError(
                "lr_schedule", NO_VALUE, problem, "use a longer schedule and another name="
            ) from ended

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if self.saved != trainer.global_step:
            self.save(trainer, pl_module)

    def save(self, trainer: Trainer, module: TrainingModule) -> None:
        """Write a checkpoint of the current step."""
        last = self.run / LAST
        stop_if_diverged(module, last, trainer.global_step)
        path = last.with_name(numbered(trainer.global_step))
        self.stop.note_callbacks(trainer)
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            copy_checkpoint(path, last)
            # Later steps remain from before the run fell back to an earlier checkpoint; they do not count.
            earlier = [old for old in sorted(last.parent.glob("step_*.ckpt")) if old.name <= path.name]
            for old in earlier[: -self.keep_last]:
                old.unlink(missing_ok=True)
        self.saved = trainer.global_step
        self.stop.saved()


IMPATIENT = 1.0  # seconds after the first signal from which a Ctrl-C stops at once


class GracefulStop(StepCallback):
    """Stops the run at its time limit or after a signal, and decides when a checkpoint is due by time.

    All processes stop after the same optimizer step, whichever process received the signal. They never stop
    between the parts of an accumulated batch, because checkpoints do not store that position. Rank 0 measures
    the time.
    """

    def __init__(self, max_seconds: float | None, checkpoint_seconds: float | None) -> None:
        super().__init__(every=1)
        self.max_seconds, self.checkpoint_seconds = max_seconds, checkpoint_seconds
        self.elapsed = 0.0
        self.by_callback = False
        """Whether a callback of the user ended the training."""
        self.signal: int | None = None
        """Number of the signal that this process received, or None."""
        self.stopping = False
        """Whether any process received a signal; equal in all processes."""
        self.checkpoint_due = False
        """Whether the last checkpoint is older than `checkpoint_seconds`."""
        self._saved_at = self._signalled_at = 0.0
        self._raises = False

    @property
    def state_key(self) -> str:
        return "Stop"

    def seconds_left(self) -> float | None:
        """Return the seconds until the time limit, or None without a limit."""
        return None if self.max_seconds is None else max(0.0, self.max_seconds - self.elapsed)

    def note_callbacks(self, trainer: Trainer) -> None:
        """Note whether training ends here by a callback of the user: not by a signal or a budget."""
        budget = self.seconds_left() == 0 or trainer.global_step == trainer.max_steps
        self.by_callback = trainer.should_stop and not self.stopping and not budget

    def called(self) -> bool:
        """Return whether any process received a signal; all processes must call this together."""
        self._agree(*Distributed().all_reduce_max(self.signal or 0))
        return self.stopping

    def _agree(self, number: int) -> None:
        if number:  # never reset: a signal may have arrived since
            self.signal, self.stopping = number, True

    def saved(self) -> None:
        """Note the time of a checkpoint."""
        self._saved_at = time.monotonic()

    def listening(self) -> AbstractContextManager[None]:
        """Context in which signals stop the run after the next step."""
        return handling(self._on_signal)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Context in which the first signal raises EvaluationCancelled at once.

        With several processes nothing is raised, because they would stop at different places: they poll
        `called`.
        """
        self._raises = Distributed().world == 1
        try:
            yield
        finally:
            self._raises = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._mark = self._saved_at = time.monotonic()
        for number in handled():  # Lightning has replaced them
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._signalled_at = number, now
            if self._raises:
                self.stopping = True
                raise EvaluationCancelled
        elif number == signal.SIGINT and now - self._signalled_at > IMPATIENT:
            # Only a second Ctrl-C stops at once: schedulers send several signals, some of them twice.
            raise KeyboardInterrupt

    def on_optimizer_step(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        now = time.monotonic()
        self.elapsed, self._mark = self.elapsed + now - self._mark, now
        spent = due = False
        if trainer.is_global_zero:
            spent = self.max_seconds is not None and self.elapsed >= self.max_seconds
            due = self.checkpoint_seconds is not None and now - self._saved_at >= self.checkpoint_seconds
        number, spent, due = Distributed().all_reduce_max(self.signal or 0, spent, due)
        self.checkpoint_due = bool(due)
        self._agree(number)
        if self.stopping or spent:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self.elapsed} | ({"by_callback": True} if self.by_callback else {})

    def example_state(self) -> dict[str, Any]:
        """Return the template of a stored state."""
        return {"elapsed": self.elapsed, "by_callback": Maybe(OfType(bool))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.elapsed, self.by_callback = state_dict["elapsed"], state_dict.get("by_callback", False)


class PeriodicCallback(StepCallback):
    """Runs every `every` steps on the EMA weights; if a stop signal interrupts it, it runs again on resume.

    At the last step it runs after the checkpoint, if it is due only there or if `max_time` ends the run.
    """

    stored_as: ClassVar[str]
    """Key of its state in checkpoints, the same in all versions."""
    measures: Collection[str] = ()
    """Names of the values that callbacks of the user may monitor."""
    at_end: ClassVar[bool] = False
    """Whether it also runs at the last step, unless that comes before `early`."""

    def __init__(self, every: int, ema: EMA, stop: GracefulStop, early: int | None = None) -> None:
        super().__init__(every, early)
        self.ema, self.stop = ema, stop
        self.done = -1
        """Step of the last run."""

    @property
    def state_key(self) -> str:
        return self.stored_as

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        step = trainer.global_step
        if step and self.due(step) and 0 <= self.done < step:
            self._run(trainer, pl_module, step)

    def on_optimizer_step(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        if not trainer.should_stop:
            self._run(trainer, module, step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step  # which is saved: all `on_train_end` come first
        if self.done != step and (self.due(step) or (self.at_end and step >= (self.early or 0))):
            self._run(trainer, pl_module, step)

    def _run(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        assert isinstance(module, TrainingModule)
        if not self.stop.stopping and self.run(trainer, module, step):
            self.done = step

    @abstractmethod
    def run(self, trainer: Trainer, module: TrainingModule, step: int) -> bool:
        """Act on the EMA weights of a step, and return whether it finished without interruption."""

    def state_dict(self) -> dict[str, Any]:
        return {"done": max(self.done, 0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = state_dict["done"]


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
        labels: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        # A training step takes about three forward passes for each image.
        early = math.ceil(len(self.SEEDS) * steps / (3 * batch_size))
        super().__init__(every, ema, stop, run=run, early=early)
        self.labels = labels
        """Classes of consecutive samples, repeated; None: no labels."""
        self.names = names
        """Names of the classes, or None."""
        self.sampler, self.steps, self.stages, self.space, self.form = sampler, steps, stages, space, form

    def save(self, trainer: Trainer, model: Trainable, device: torch.device, step: int, path: Path) -> None:
        assert isinstance(model, Denoiser)
        labels, times = labels_of(self.SEEDS, self.labels, device), self.sampler.grid(self.steps)
        denoise = self.space.clipped(lambda x, t: model(x, t, labels), model.schedule)
        count = len(self.SEEDS)
        bar = ProgressBar(total=count, desc="preview", unit="image", delay=1.0, leave=False)
        with trainer.precision_plugin.forward_context(), bar, bar.batch(count) as advance:
            x = sample(
                reporting(denoise, times, advance),
                self.sampler,
                times,
                self.SEEDS,
                self.stages.after(step).shape,
                device,
            )
        images = self.space.decode(x)
        if self.stages.grow:
            images = interpolate(images, self.stages.last.shape[1:])
        pictures = self.form.to_rgb(self.form.quantize(images)).cpu()
        rows, captions = by_class(pictures, self.SEEDS, self.labels, self.names)
        save_rows(rows, path, captions)

"""The progress bar of training, with the losses that it logs."""

import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from diffusion_cli.config.values import Node
from diffusion_cli.data import ResolutionSchedule
from diffusion_cli.errors import counted
from diffusion_cli.runs.checkpoint import LAST
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.training import duration
from diffusion_cli.training.callbacks import GracefulStop, StepCallback
from diffusion_cli.training.divergence import stop_if_diverged
from diffusion_cli.training.logs import log_metrics
from diffusion_cli.training.loss_check import LossCheck
from diffusion_cli.training.module import TrainingModule
from diffusion_cli.training.validation import on_measured


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
        stop: GracefulStop,
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

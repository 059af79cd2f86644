"""Base classes of the callbacks of training, and the stop at a signal or a time limit."""

import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from diffusion_cli.metrics import EvaluationCancelled
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.signals import handled, handling
from diffusion_cli.training.ema import EMA
from diffusion_cli.training.module import TrainingModule
from diffusion_cli.training.stored_state import Maybe, OfType

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

"""The checkpoints that training writes."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer

from diffusion_cli.errors import NO_VALUE, UsageError, first_line
from diffusion_cli.runs.checkpoint import LAST, copy_checkpoint, numbered, save
from diffusion_cli.training.callbacks import GracefulStop, StepCallback
from diffusion_cli.training.divergence import stop_if_diverged
from diffusion_cli.training.module import TrainingModule


class WholeFileIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints atomically."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(checkpoint, Path(path))


class CheckpointCallback(StepCallback):
    """Saves checkpoints by steps and by time: `last.ckpt` and the newest `keep_last` by number."""

    def __init__(self, every: int, run: Path, keep_last: int, stop: GracefulStop) -> None:
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

"""Snapshots of power averages during training."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from diffusion_cli.runs.snapshots import remove_later, save_snapshot
from diffusion_cli.training.callbacks import StepCallback
from diffusion_cli.training.ema import EMA
from diffusion_cli.training.module import TrainingModule


class AverageSnapshots(StepCallback):
    """Writes the trained weights of several averages to the run folder every `every` steps.

    A continued run writes the snapshots after its checkpoint again, so that they are those of its own weights.

    Args:
        every: steps between snapshots.
        run: run folder.
        averages: the averages by length; they update before this callback.
    """

    def __init__(self, every: int, run: Path, averages: Mapping[float, EMA]) -> None:
        super().__init__(every)
        self.run, self.averages = run, averages

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            remove_later(self.run, trainer.global_step)

    def on_optimizer_step(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        parameters = module.model.network.named_parameters()
        trained = [name for name, weight in parameters if weight.requires_grad]
        # All processes together, because the averages may be sharded.
        states = {length: average.state_dict()["network"] for length, average in self.averages.items()}
        if trainer.is_global_zero:
            weights = {length: {name: state[name] for name in trained} for length, state in states.items()}
            save_snapshot(self.run, step, weights)

"""A callback of Lightning."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from pydantic import PositiveInt


class Example(Callback):
    """Prints the norm of the weights now and then.

    A callback has a method for each event of the training, such as the start and the end of a batch.

    Args:
        every: optimizer steps between two lines
    """

    def __init__(self, *, every: PositiveInt = 100) -> None:
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act after a batch; `trainer.global_step` is the number of optimizer steps."""
        if trainer.is_global_zero and trainer.global_step % self.every == 0:
            norm = sum(weight.detach().square().sum().item() for weight in pl_module.parameters()) ** 0.5
            print(f"step {trainer.global_step}: norm of the weights {norm:.4g}", flush=True)

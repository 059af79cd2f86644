"""Lightning's Trainer, without the features that the callbacks of this package replace."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from diffusion_cli.system.compat import keep_signal_handlers
from diffusion_cli.training.checkpoints import WholeFileIO
from diffusion_cli.training.device import Device


def make_trainer(
    device: Device,
    precision: str,
    folder: Path,
    *,
    done: int,
    max_steps: int | None,
    accumulate_grad_batches: int,
    log_every: int,
    validate_every: int,
    loggers: Sequence[Logger],
    callbacks: Sequence[Callback],
) -> Trainer:
    """Return a Trainer for the current process group.

    Args:
        device: devices and strategy.
        precision: fp32, bf16 or fp16.
        folder: folder of the run.
        done: optimizer steps of earlier starts.
        max_steps: number of optimizer steps, or None for no limit.
        accumulate_grad_batches: number of parts of a batch.
        log_every: steps between log entries.
        validate_every: steps between validations, which are those of a callback.
        loggers: loggers of the metrics.
        callbacks: in the order in which they run.

    Raises:
        UsageError: if the strategy does not support the precision.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    trainer = Trainer(
        max_epochs=-1,
        max_steps=max_steps or -1,
        accumulate_grad_batches=accumulate_grad_batches,
        callbacks=list(callbacks),
        logger=list(loggers),
        plugins=[WholeFileIO(), *device.plugins(precision)],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=log_every,
        # Tells callbacks such as EarlyStopping to act after validations, not after epochs.
        val_check_interval=validate_every * accumulate_grad_batches,
        check_val_every_n_epoch=None,
        profiler=device.profile(folder, done),
        **device.trainer_arguments(),
    )
    keep_signal_handlers(trainer)  # GracefulStop handles them
    return trainer

"""`diffuse ema`: reconstruct averages of the weights of other lengths, and compare their validation losses."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffusion_cli.commands.train_callbacks import validation_batches
from diffusion_cli.commands.train_setup import set_up, training_module
from diffusion_cli.commands.train_tasks import DenoisingTask, Task
from diffusion_cli.config import EMACommandConfig, TrainConfig, as_text
from diffusion_cli.config import load as load_config
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.objectives import FewStep
from diffusion_cli.errors import NO_VALUE, UsageError, counted
from diffusion_cli.runs.checkpoint import Checkpoint
from diffusion_cli.runs.find import find_run
from diffusion_cli.runs.load import find_checkpoint
from diffusion_cli.runs.snapshots import LARGEST_RESIDUAL, StoredAverages
from diffusion_cli.system.precision import autocast
from diffusion_cli.system.terminal import table
from diffusion_cli.training.teacher import with_teacher

COLUMNS = ("length", "residual", "val_loss")
NO_LOSS = "-"
"""Cell of the loss of a run without validation images."""


def run(config: EMACommandConfig) -> None:
    """Print the stored averages of a run and the possible lengths, and a row for each length.

    Raises UsageError for a run without snapshots, or a length that they do not give.
    """
    folder = find_run(config.run, config.output_dir)
    _, checkpoint = find_checkpoint(folder, config.step)
    try:
        averages = StoredAverages(folder, checkpoint)
    except UsageError as error:
        raise error.renamed({"ema_length": "run"}) from error
    print(_described(averages))
    try:
        if config.length is None:
            return
        for length in config.length:  # before the data are read
            averages.check(length)
        loss_of = _validation(config, folder, averages)
        rows = [
            (str(length), f"{averages.fit(length).residual:.1e}", loss_of(averages.reconstruct(length).state))
            for length in config.length
        ]
    except UsageError as error:
        raise error.renamed({"ema_length": "length"}) from error
    print(table([COLUMNS, *rows]))


def _described(averages: StoredAverages) -> str:
    """Return lines about the stored averages of a run."""
    tracked = " and ".join(map(str, averages.lengths))
    first, last = averages.steps[0], averages.steps[-1]
    within = averages.within_reach
    return (
        f"{averages.run.name} at step {averages.step}: averages of lengths {tracked}, "
        f"{counted(len(averages.steps), 'snapshot')} ({averages.bytes / 1e6:.1f} MB) from step {first} to {last}\n"
        f"Lengths from {within[0]} to {within[-1]} have a residual of at most {LARGEST_RESIDUAL:.0%}"
    )


def _validation(
    config: EMACommandConfig, folder: Path, averages: StoredAverages
) -> Callable[[dict[str, Tensor]], str]:
    """Return what measures the validation loss of weights, as in training: with its images, times and noise."""
    words = [as_text("run", str(folder)), f"trainer.accelerator={config.device}", "trainer.devices=1"]
    words += [] if config.data_dir is None else [as_text("data_dir", config.data_dir)]
    training = load_config("train", words)
    assert isinstance(training, TrainConfig)
    setup = set_up(training, folder, averages.checkpoint.info)
    _restore_teacher(setup.task, averages.checkpoint, setup.device.torch_device)
    module = training_module(setup, training.seed).to(setup.device.torch_device).eval()

    @torch.no_grad()
    def loss_of(state: dict[str, Tensor]) -> str:
        if not setup.val_images:
            return NO_LOSS
        try:
            module.model.network.load_state_dict(state)
        except RuntimeError as error:
            key, problem = f"the checkpoint of step {averages.step}", "its weights do not fit the model"
            raise UsageError(key, NO_VALUE, problem, "choose another run") from error
        batches = validation_batches(training, setup)(averages.step)
        with autocast(setup.device.torch_device, setup.precision):
            losses = [loss.float() for loss in module.val_losses(module.model, batches)]
        return f"{torch.cat(losses).mean():.5f}"

    return loss_of


def _restore_teacher(task: Task, checkpoint: Checkpoint, device: torch.device) -> None:
    """Give an objective that distils the teacher of a checkpoint; UsageError if it is missing or damaged."""
    if not (
        isinstance(task, DenoisingTask)
        and isinstance(task.objective, FewStep)
        and isinstance(task.model, Denoiser)
    ):
        return
    for teacher in with_teacher(task.objective, task.model):
        try:
            teacher.load_state_dict(checkpoint.state["callbacks"][teacher.state_key])
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            key, problem = f"the checkpoint of step {checkpoint.step}", "its teacher is missing or damaged"
            raise UsageError(key, NO_VALUE, problem, "choose another step=") from error
        teacher.network.to(device)

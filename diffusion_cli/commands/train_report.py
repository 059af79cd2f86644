"""The lines that `diffuse train` prints: a summary, remarks, and the outcome."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_cli.commands.train_setup import TrainingSetup
from diffusion_cli.commands.train_tasks import AutoencoderTask
from diffusion_cli.config import TrainConfig, allowing_words, as_pasted, as_text, differing, flatten, seconds
from diffusion_cli.config.values import Node
from diffusion_cli.data import FEW_VAL
from diffusion_cli.diffusion.denoiser import Denoiser, NoisyClassifier
from diffusion_cli.diffusion.objectives import FewStep, ProgressiveDistillation
from diffusion_cli.errors import class_name, counted, examples
from diffusion_cli.runs.schema import trains_consistency
from diffusion_cli.system.distributed import started
from diffusion_cli.training.autoencoder_loss import Autoencoding
from diffusion_cli.training.callbacks import GracefulStop, PeriodicCallback
from diffusion_cli.training.module import Trainable
from diffusion_cli.training.progress import Progress
from diffusion_cli.training.validation import ValidationAccuracy


def first_line(config: TrainConfig, setup: TrainingSetup, folder: Path, done: int) -> str:
    """Return a summary of the network, data, device and budget of a run that starts at step `done`."""
    device, steps = setup.device.torch_device, setup.max_steps
    run = f"{'Continuing' if done else 'Training'} {folder}"
    return (
        f"{'Trial run, not kept' if setup.device.fast_dev_run else run}: {_describe(setup.task.model.network)} on "
        f"{counted(len(setup.images), 'image')} of {setup.dataset.name} ({'x'.join(map(str, setup.dataset.shape))}), "
        f"{f'{setup.stages}, ' if setup.stages.grow else ''}{_where(device)}, {setup.precision}, "
        f"{_learning_rate(config.optimizer)}"
        f"{'unlimited steps' if steps is None else f'{steps:,} step' + 's' * (steps > 1)} of {config.batch_size}"
    )


def first_weights_line(setup: TrainingSetup) -> str | None:
    """Return a line about the source of the first weights; None if they are random."""
    if setup.info.init is None:
        return None
    parameters = [*setup.task.model.network.parameters()]
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if setup.info.lora is not None:
        return f"{setup.info.init}\nlora: {trained:,} of {total:,} parameters trained"
    changed = f"; {trained:,} parameters trained, {total - trained:,} frozen" if trained < total else ""
    return f"{setup.info.init}{changed}"


def remarks(setup: TrainingSetup) -> list[str]:
    """Return remarks on settings and data that are probably unintended."""
    return [
        *_beyond_its_end(setup),
        *_without_pairs(setup.config),
        *setup.dataset.remarks(),
        *_few_validation_images(len(setup.images), len(setup.val_images)),
        *_without_images(setup),
    ]


def last_lines(
    progress: Progress,
    stop: GracefulStop,
    callbacks: Sequence[PeriodicCallback],
    cause: str,
    model: Trainable,
    folder: Path,
) -> Iterator[str]:
    """Yield the outcome of a run, and the next command; `cause`: the callback of the user that may have stopped it."""
    for callback in callbacks:
        if isinstance(callback, ValidationAccuracy):
            yield ", ".join(f"validation {name} {value:.3f}" for name, value in callback.accuracy.items())
    if stop.stopping and stop.signal is not None:
        name = signal.Signals(stop.signal).name
        yield f"{name}: saved {folder} at step {progress.step}; the same command continues the run"
    else:
        stopped = ""
        if stop.seconds_left() == 0 and progress.step != progress.max_steps:
            of = "" if progress.max_steps is None else f" of {progress.max_steps}"
            remedy = _more_time(progress.config, stop.elapsed)
            stopped = f"Stopped by max_time at step {progress.step}{of}; to continue, {remedy}\n"
        elif stop.by_callback:
            of = "" if progress.max_steps is None else f" of {progress.max_steps}"
            stopped = f"Stopped by {cause} at step {progress.step}{of}; to continue, {OTHER_CALLBACKS}\n"
        following = _next(model, folder, progress.config["objective"])
        yield f"{progress.outcome()}; the run is {folder}\n{stopped}Next: {following}"


OTHER_CALLBACKS = "change its values, or set callback=[]"
"""What to do to continue a run that a callback stopped."""


def stopped(folder: Path, step: int, cause: str) -> str:
    """Return the line of a run that a callback stopped at an earlier start."""
    return f"{folder} finished at step {step}, stopped by {cause}; to continue, {OTHER_CALLBACKS}"


def time_spent(config: TrainConfig, folder: Path, step: int, elapsed: float) -> str:
    """Return the line of a run that has trained for `elapsed` seconds, `max_time` or more."""
    return (
        f"{folder} finished at step {step}, because earlier starts took {elapsed:.0f} s and max_time="
        f"{config.max_time}; to continue, {_more_time(config.model_dump(), elapsed)}"
    )


def _more_time(config: Node, elapsed: float) -> str:
    longer = 2 * int(max(seconds(config["max_time"]) or 0, elapsed))
    return f"raise the budget, for example max_time={longer}s"


def finished(folder: Path, step: int, max_steps: int, before: int | None) -> str:
    """Return the line of a run that has already trained all steps of a budget.

    Args:
        folder: the run.
        step: its last step.
        max_steps: the budget now, at most `step`.
        before: the budget of its last start; None: unlimited.
    """
    state = (
        f"finished at step {step}"
        if max_steps == step
        else f"is already past step {max_steps}, at step {step}"
    )
    larger = before if before is not None and before > step else 2 * step
    return f"{folder} {state}; to continue, raise the budget, for example max_steps={larger}"


def other_budget(before: Node, now: TrainConfig) -> str | None:
    """Return a remark on a run that continues with another budget, if its weights depend on the budget; else None."""
    changed = set(differing(flatten(before), flatten(now.model_dump())))
    follow = {
        "the learning-rate schedule": changed & {"lr_schedule.decay_steps", "lr_schedule.warm_up_steps"},
        "the EMA": changed & {"ema.decay"},
    }
    if "max_steps" not in changed or not any(follow.values()):
        return None
    what = " and ".join(name for name, differs in follow.items() if differs)
    steps = " -> ".join(
        "unlimited" if steps is None else f"{steps}" for steps in (before["max_steps"], now.max_steps)
    )
    return (
        f"max_steps {steps}: {what} {'follow' if all(follow.values()) else 'follows'} the new budget, so the weights "
        "differ from those of one uninterrupted run"
    )


def _learning_rate(optimizer: Node) -> str:
    """Return the peak learning rate; nothing if a class of a library or a plugin has its own."""
    return f"learning rate {optimizer['lr']:g}, " if "lr" in optimizer else ""


def _where(device: torch.device) -> str:
    """Return the devices of all processes, such as 4 x cuda on 2 nodes."""
    place = started()
    if place.world == 1:
        return device.type
    return f"{place.world} x {device.type}" + (f" on {place.nodes} nodes" if place.nodes > 1 else "")


def _beyond_its_end(setup: TrainingSetup) -> Iterator[str]:
    """Yield settings that take effect only after the last step; no errors, because the budget can be raised later."""
    stages, max_steps = setup.stages, setup.max_steps
    if max_steps is None or setup.device.fast_dev_run:
        return
    if stages.last.first >= max_steps:
        yield (
            f"stage_steps: size {stages.last.size} begins at step {stages.last.first}, but the run ends at step "
            f"{max_steps}; train for more steps, or lower stage_steps"
        )
    every = setup.config.ema.snapshot_every
    if every is not None and every >= max_steps:
        yield (
            f"ema.snapshot_every={every}: no snapshot comes before the end at step {max_steps}, so there are no "
            "averages of other lengths; train for more steps, or lower it"
        )
    if isinstance(setup.task, AutoencoderTask):
        start = setup.task.objective.start
        if start is not None and start >= max_steps:
            yield (
                f"objective.discriminator_start={start}: is not reached, because the run ends at step {max_steps}; "
                "train for more steps, or lower it"
            )
        return
    objective = setup.task.objective
    if isinstance(objective, FewStep):
        first = (objective.stages - 1) * objective.stage_steps
        if first >= max_steps:
            yield (
                f"objective.stage_steps={objective.stage_steps}: the last of {objective.stages} stages begins at step "
                f"{first}, but the run ends at step {max_steps}; train for more steps, or lower stage_steps"
            )


def _without_pairs(config: TrainConfig) -> Iterator[str]:
    """Yield a remark on a coupling within parts of one image, which may be a way to save memory, so no error."""
    if config.coupling != "none" and config.batch_size == config.accumulate_grad_batches:
        yield (
            f"coupling={config.coupling}: has no effect, because batch_size={config.batch_size} and "
            f"accumulate_grad_batches={config.accumulate_grad_batches} make parts of one image; raise batch_size, or "
            "lower accumulate_grad_batches"
        )


def _few_validation_images(train: int, val: int) -> Iterator[str]:
    """Yield a remark on a small validation split; the dataset's own remarks are about an empty one."""
    if 0 < val < FEW_VAL:
        yield (
            f"dataset: {train} training and {val} validation images; validation losses, and metrics that compare with "
            f"fewer than {FEW_VAL} validation images, are rough"
        )


def _without_images(setup: TrainingSetup) -> Iterator[str]:
    """Yield a remark on classes without training images, if the model is trained with labels."""
    class_counts = setup.label_counts
    if class_counts is None:
        return
    pairs = zip(setup.dataset.class_names or (), class_counts, strict=True)
    names = [name for name, count in pairs if not count]
    if names:
        effect = (
            "sampling skips them unless label= names them"
            if isinstance(setup.task.model, Denoiser)
            else "the classifier cannot learn them"
        )
        part = f"{len(names)} of {len(class_counts)}"
        yield f"dataset: classes without training images: {examples(names)} ({part}); {effect}"


def _next(model: Trainable, folder: Path, objective: Mapping[str, Any]) -> str:
    """Return the next command, as a shell reads it."""
    run = " ".join([as_text("run", str(folder)), *map(as_pasted, allowing_words())])
    if isinstance(model, Autoencoding):
        return f"diffuse eval {run} 'metric=[reconstruction,rfid]'"  # zsh reads brackets as a pattern
    if isinstance(model, NoisyClassifier):
        return f"diffuse sample run=RUN guidance=classifier {as_text('guidance.run', str(folder))}"
    if trains_consistency(objective):
        run += " sampler=consistency steps=2"
    elif class_name(objective) == ProgressiveDistillation.__name__:
        run += " steps=1"
    if isinstance(model, Denoiser) and model.conditions.image is not None:
        return f"diffuse edit edit=translate {run} input=val"
    if isinstance(model, Denoiser) and model.conditions.text is not None:
        return f"diffuse sample {run} prompt=TEXT"
    return f"diffuse sample {run}"


def _describe(network: nn.Module) -> str:
    number = sum(parameter.numel() for parameter in network.parameters())
    size = f"{number / 1e6:.2f}M" if number >= 10_000 else f"{number:,}"
    return f"{type(network).__name__} of {size} parameters"

"""`diffuse train`: from a configuration to a trained model in a run folder."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Callback

from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.config import TrainConfig, identity, seconds
from diffusion_cli.config.at_hand import gpu
from diffusion_cli.config.recipe import BUDGETED, derived_in
from diffusion_cli.data import Images, ProgressiveBatches, ResolutionSchedule, UnreadableError
from diffusion_cli.data.labels import examples
from diffusion_cli.diffusion.denoiser import Denoiser, NoisyClassifier
from diffusion_cli.errors import NO_VALUE, MachineError, Problem, UsageError, format_value
from diffusion_cli.runs.checkpoint import LAST, Checkpoint, read
from diffusion_cli.runs.find import recover
from diffusion_cli.runs.load import AUTOENCODER
from diffusion_cli.runs.schema import CheckpointInfo, StageInfo, StoredConfig
from diffusion_cli.runs.weights import digest, save_weights
from diffusion_cli.system.distributed import Distributed, launch, started
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.locks import run_lock
from diffusion_cli.system.precision import NumberFormat, resolve
from diffusion_cli.system.signals import UNFINISHED
from diffusion_cli.system.trusted_paths import remember, remember_run
from diffusion_cli.training.autoencoder_loss import Autoencoding
from diffusion_cli.training.build import (
    AutoencoderTask,
    TrainingSetup,
    assemble,
    module_of,
    periodic_callbacks,
    stages_of,
    trainer_of,
)
from diffusion_cli.training.callbacks import CheckpointCallback, GracefulStop, Progress, ValidationAccuracy
from diffusion_cli.training.ema import EMA
from diffusion_cli.training.latent_data import LatentDataset
from diffusion_cli.training.module import Trainable
from diffusion_cli.training.out_of_memory import advise_on_oom
from diffusion_cli.training.stored_state import StoredOptions, check_state, expected_state, mend_state


def run(config: TrainConfig) -> int:
    """Train, or take a run up again, in all processes that were started or are asked for; the exit code."""
    trainer = config.trainer
    place, devices, nodes = started(), trainer["devices"], trainer["num_nodes"]
    _refuse_absent(trainer["accelerator"], devices or 1)
    if place.rank == 0 and (remark := _other_machine(config)):
        print(f"diffuse: {remark}", file=sys.stderr)
    if place.world > 1 and devices not in (None, place.local_world):
        raise UsageError(
            "trainer.devices",
            devices,
            f"torchrun or srun started {place.local_world} on this node",
            "leave it null",
        )
    if nodes not in (None, place.nodes):
        raise UsageError(
            "trainer.num_nodes",
            nodes,
            f"{place.nodes} is at work",
            "start diffuse by torchrun or srun on so many, or with -m launcher=slurm",
        )
    return launch(
        train, config,
        processes=None if place.world > 1 else devices, timeout=timedelta(seconds=trainer["timeout"]),
    )  # fmt: skip


def _other_machine(config: TrainConfig) -> str | None:
    """A line about a recipe that was derived for another machine than torch finds; None for the same."""
    assumed, there = gpu(config.trainer["accelerator"]), torch.cuda.is_available()
    by_machine = config.trainer["accelerator"] == "auto" and {"dataset.resolution", "max_steps"} & {
        *config.derived
    }
    if assumed == there or not by_machine:
        return None
    return (
        "trainer=auto: torch cannot use the GPU of this machine; install a torch build for it, or add trainer=cpu"
        if assumed
        else "trainer=auto: the recipe is that of a machine without GPU, and torch has one; add trainer=gpu name=NEW"
    )


def _refuse_absent(accelerator: str, devices: int) -> None:
    """Raise ValueError if this machine has GPUs, but not so many."""
    there = 0 if accelerator == "cpu" else torch.cuda.device_count()
    if 0 < there < devices:
        raise UsageError(
            "trainer.devices", devices, f"there are {there} GPUs here", "take so many, or trainer=cpu"
        )


def train(config: TrainConfig) -> int:
    """Train as one of the processes that share the work; the first alone writes and prints."""
    assert config.name is not None
    folder = Path(config.output_dir) / config.name
    stop = GracefulStop(seconds(config.max_time), seconds(config.checkpoint_period))
    with run_lock(folder) if Distributed().is_main else nullcontext():
        if Distributed().is_main:
            recover(folder)
        return _train(config, folder, stop)


def _train(config: TrainConfig, folder: Path, stop: GracefulStop) -> int:
    """Hold what is asked for against what is there, and train on from there."""
    ranks, last = Distributed(), folder / LAST
    before = read(last) if ranks.broadcast(last.is_file()) else None
    done = before.step if before else 0
    _refuse_another(folder, config, before)
    parts = assemble(config, folder, before.info if before else None)
    # What null once meant it goes on to mean, whatever the budget is now.
    stored = before.info.resolution_schedule if before else None
    stages = stored or stages_of(config, parts.train_data)
    _refuse_uneven(config, stages, ranks.world)
    images, held_out = parts.train_data.load("train"), parts.train_data.load("held_out")
    # As is what "auto" once meant, on whatever machine the run is taken up.
    known = before.info.precision if before and config.precision == "auto" else None
    precision = known or resolve(config.precision, parts.device.torch_device)
    info = _info(config, parts, images, held_out, stages, precision)
    if before:
        _refuse_other_data(folder, info, before.info)
    if ranks.is_main:  # also if the run is complete
        remember(config.dataset)
    max_steps = _max_steps(config, stages, len(images))
    if max_steps is not None and done >= max_steps:
        if ranks.is_main:
            print(
                f"{folder} is complete at step {done}; a larger budget, as max_steps={2 * done}, goes on with it"
            )
        return 0
    return _fit(
        config, folder, parts, stages,
        images=images, held_out=held_out, info=info, precision=precision, before=before, max_steps=max_steps, stop=stop,
    )  # fmt: skip


def _fit(
    config: TrainConfig,
    folder: Path,
    parts: TrainingSetup,
    stages: ResolutionSchedule,
    *,
    images: Images,
    held_out: Images,
    info: CheckpointInfo,
    precision: NumberFormat,
    before: Checkpoint | None,
    max_steps: int | None,
    stop: GracefulStop,
) -> int:
    """Train from a checkpoint, or from the start, to the end or to a signal."""
    ranks, model = Distributed(), parts.task.model
    done = before.step if before else 0
    module = module_of(config, parts, info)
    ema = EMA(model.network, config.ema.decay, config.ema.warm_up, parts.device.offload_ema)
    watchers = periodic_callbacks(
        config,
        folder,
        parts,
        stages,
        ema=ema,
        stop=stop,
        held_out=held_out,
        class_counts=info.class_counts,
    )
    checkpoints = CheckpointCallback(config.checkpoint_every, folder, config.keep_last, stop)
    progress = Progress(config.log_every, folder, stages, max_steps, stop, config.model_dump())
    # The average first, for the others look at it; checkpoints last: they hold what the others know.
    callbacks = [ema, progress, stop, *watchers, checkpoints]
    trainer = trainer_of(
        config, parts.device, precision, folder, done=done, max_steps=max_steps, callbacks=callbacks
    )
    if before:
        expected = expected_state(trainer, module, done)
        mend_state(before.state, expected)
        check_state(folder / LAST, before.state, expected)
        # Lightning reads the file again.
        trainer.callbacks.append(StoredOptions(expected))  # pyright: ignore[reportAttributeAccessIssue]
    if config.compile is True or (config.compile == "auto" and parts.device.torch_device.type == "cuda"):
        model.network.compile()  # in place: torch.compile(network) would rename every weight
    if ranks.is_main:
        if parts.latent is not None and not done:
            save_weights(parts.latent.latents.autoencoder, folder / AUTOENCODER)
        _write_config(folder / "config.yaml", config)
        remember_run(folder)  # not earlier: the file before may be a stranger's
        print(
            f"{'Going on with' if done else 'Training'} {folder}: {_describe(model.network)} on {len(images)} images "
            f"of {parts.dataset.name} ({'x'.join(map(str, parts.dataset.shape))}), "
            f"{f'{stages}, ' if stages.grow else ''}{_where(parts.device.torch_device)}, {precision}, "
            f"learning rate {config.optimizer['lr']:g}, "
            f"{'no limit of steps' if max_steps is None else f'{max_steps:,} steps'} of {config.batch_size}",
            file=sys.stderr,
        )
        remarks = [*_beyond_its_end(parts, stages, max_steps), *parts.dataset.remarks()]
        show_remarks([*remarks, *_without_images(parts, info.class_counts)])
    batches = ProgressiveBatches(
        images, stages, config.seed, parts.dataset.flip, start=done, parts=config.accumulate_grad_batches,
        rank=ranks.rank, world_size=ranks.world, device=parts.device.torch_device,
        num_workers=parts.dataset.num_workers,
    )  # fmt: skip
    device = parts.device.torch_device
    with stop.listening():  # before, there is nothing to save, and a signal ends the command at once
        with (
            _saying_what_is_saved(checkpoints, done),
            advise_on_oom(module, device, stages, trainer),
        ):
            try:
                trainer.fit(module, batches, ckpt_path=folder / LAST if done else None, weights_only=True)
            except SystemExit as error:  # Lightning's answer to a second Ctrl-C
                raise KeyboardInterrupt from error
        if ranks.is_main:
            _print_summary(trainer.global_step, stop, watchers, model, folder)
    return UNFINISHED if stop.stopping else 0


@contextmanager
def _saying_what_is_saved(checkpoints: CheckpointCallback, done: int) -> Iterator[None]:
    """Raise what ends a run from outside, a disk or the data, as OSError that says where the run can be taken up."""
    try:
        yield
    except (OSError, UnreadableError) as error:
        step = checkpoints.saved or done
        # With an image less it would not be the run that it was.
        same = "on the same data " if isinstance(error, UnreadableError) else ""
        saved = (
            f"is saved to step {step}; {same}the same command goes on from there"
            if step
            else "is not saved yet"
        )
        raise MachineError(f"{error}; the run {saved}") from error


def _print_summary(
    step: int, stop: GracefulStop, watchers: list[Callback], model: Trainable, folder: Path
) -> None:
    """Say how a run has ended, and how it goes on."""
    for watcher in watchers:
        if isinstance(watcher, ValidationAccuracy):
            print(
                "\n" + ", ".join(f"validation {name} {value:.3f}" for name, value in watcher.accuracy.items())
            )
    if stop.stopping and stop.signal is not None:
        name = signal.Signals(stop.signal).name
        print(f"\n{name}: saved {folder} at step {step}; the same command goes on from there")
    else:
        print(f"\nTrained {step} steps; the run is {folder}\nNext: {_next(model, folder)}")


def _where(device: torch.device) -> str:
    """The devices at work, in words."""
    place = started()
    if place.world == 1:
        return device.type
    return f"{place.world} x {device.type}" + (f" on {place.nodes} nodes" if place.nodes > 1 else "")


def _refuse_uneven(config: TrainConfig, stages: ResolutionSchedule, world: int) -> None:
    """Raise ValueError unless each part of a batch is shared out evenly among so many processes."""
    for stage in stages.all:
        if stage.batch_size // config.accumulate_grad_batches % world:
            raise UsageError(
                stages.key(stage),
                stage.batch_size,
                f"is shared out among {world} devices, in {config.accumulate_grad_batches} parts",
                f"take a multiple of {world * config.accumulate_grad_batches}",
            )


def _refuse_another(folder: Path, config: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """Raise UsageError if a run's checkpoint is of another configuration; a run without one has nothing to lose."""
    if checkpoint is None:
        return
    stored = checkpoint.info.config.model_dump()
    before, now = identity(stored), identity(config.model_dump())
    follow_budget = derived_in(stored) & set(config.derived) & BUDGETED.keys()
    keys = sorted(key for key in (before | now).keys() - follow_budget if before.get(key) != now.get(key))
    if keys:
        run = config.name if folder == Path("outputs", str(config.name)) else folder
        raise UsageError.several(
            [
                *(
                    Problem(
                        key,
                        format_value(now.get(key)),
                        f"the run in {folder} has {format_value(before.get(key))}",
                    )
                    for key in keys
                ),
                Problem(
                    "name",
                    config.name,
                    "holds a run of another configuration",
                    f"continue with: diffuse train run={run}, or choose another name",
                ),
            ]
        )


def _write_config(path: Path, config: TrainConfig) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))


def _max_steps(config: TrainConfig, stages: ResolutionSchedule, num_images: int) -> int | None:
    limits = [config.max_steps] if config.max_steps else []
    limits += [stages.steps(config.max_epochs * num_images)] if config.max_epochs else []
    return min(limits, default=None)


def _beyond_its_end(parts: TrainingSetup, stages: ResolutionSchedule, max_steps: int | None) -> Iterator[str]:
    """What a run is to do only after its last step, in lines; no mistakes, for a larger budget may go on with it."""
    if max_steps is None:
        return
    if stages.last.first >= max_steps:
        yield (
            f"stage_steps: reach size {stages.last.size} at step {stages.last.first}, and the run ends at step "
            f"{max_steps}; give it more steps, or the stages fewer"
        )
    if isinstance(parts.task, AutoencoderTask):
        start = parts.task.objective.start
        if start is not None and start >= max_steps:
            yield (
                f"objective.discriminator_start={start}: is not reached, for the run ends at step {max_steps}; give it "
                "more steps, or an earlier start"
            )


def _without_images(parts: TrainingSetup, class_counts: list[int] | None) -> Iterator[str]:
    """One line that names the classes without a training image, if the model is trained with labels."""
    if class_counts is None or not parts.conditional:
        return
    pairs = zip(parts.dataset.class_names or (), class_counts, strict=True)
    names = [name for name, count in pairs if not count]
    if names:
        effect = (
            "samples leave them out unless label= names them"
            if isinstance(parts.task.model, Denoiser)
            else "the classifier cannot learn them"
        )
        part = f"{len(names)} of {len(class_counts)}"
        yield f"dataset: classes without a training image: {examples(names)} ({part}); {effect}"


def _refuse_other_data(folder: Path, now: CheckpointInfo, before: CheckpointInfo) -> None:
    """Raise UsageError if a run was begun on another number of images, on other classes or on other images."""
    plain, stored = now.model_dump(), before.model_dump()
    lines = [
        Problem(
            "labels",
            NO_VALUE,
            "are not those that the run was begun on",
            "give back the labels, or take another name=",
        )
        if key == "labels_sha256"
        else Problem(
            key,
            plain[key],
            f"the run in {folder} was begun on {stored[key]}",
            "give back the data, or take another name=",
        )
        for key in ("num_images", "class_names", "shape", "form", "labels_sha256")
        if stored[key] != plain[key]
    ]
    if lines:
        raise UsageError.several(lines)
    if before.data_sha256 not in (None, now.data_sha256):
        raise UsageError(
            "dataset",
            NO_VALUE,
            "the images or their names are not those that the run was begun on",
            "give back the data, or take another name=",
        )


def _next(model: Trainable, folder: Path) -> str:
    if isinstance(model, Autoencoding):
        return f"diffuse eval run={folder} metric=[reconstruction,rfid]"
    if isinstance(model, NoisyClassifier):
        return f"diffuse sample run=RUN guidance=classifier guidance.run={folder}"
    return f"diffuse sample run={folder}"


def _info(
    config: TrainConfig,
    parts: TrainingSetup,
    images: Images,
    held_out: Images,
    stages: ResolutionSchedule,
    precision: NumberFormat,
) -> CheckpointInfo:
    """Return what the checkpoints of a run say of it."""
    labels, dataset = None if images.labels is None else images.labels.cpu(), parts.dataset
    latent = None
    if parts.latent is not None:
        assert isinstance(parts.train_data, LatentDataset)
        latent = parts.latent.info(parts.train_data)
    fingerprints = f"{images.fingerprint()} {held_out.fingerprint()}"
    counts = None if labels is None else labels.bincount(minlength=dataset.num_classes or 0).tolist()
    return CheckpointInfo(
        task=parts.task.model.task,
        num_images=len(images),
        config=StoredConfig(**config.model_dump()),
        shape=dataset.shape,
        form=dataset.form,
        latent=latent,
        num_classes=dataset.num_classes,
        class_names=tuple(dataset.class_names) if dataset.class_names else None,
        class_counts=counts,
        stages=[StageInfo(**stage._asdict()) for stage in stages.all] if stages.grow else None,
        data_rules=dataset.rules,
        data_sha256=Distributed().broadcast(sha256(fingerprints.encode()).hexdigest()),
        labels_sha256=None if labels is None else digest({"labels": labels}),
        precision=precision,
    )


def _describe(network: torch.nn.Module) -> str:
    number = sum(parameter.numel() for parameter in network.parameters())
    size = f"{number / 1e6:.2f}M" if number >= 10_000 else f"{number:,}"
    return f"{type(network).__name__} of {size} parameters"

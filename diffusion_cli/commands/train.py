"""`diffuse train`: train a model in a run folder."""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer

from diffusion_cli.commands import train_report
from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.commands.train_callbacks import (
    periodic_callbacks,
    save_real_images,
    snapshots,
    weight_averages,
)
from diffusion_cli.commands.train_checks import (
    check_configuration,
    check_devices,
    check_loggers,
    remark_on_machine,
)
from diffusion_cli.commands.train_setup import TrainingSetup, set_up, training_module
from diffusion_cli.commands.train_tasks import DenoisingTask
from diffusion_cli.config import TrainConfig, seconds
from diffusion_cli.data import ProgressiveBatches, UnreadableError
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.objectives import FewStep
from diffusion_cli.errors import NO_VALUE, MachineError, UsageError
from diffusion_cli.generate import naming_compile
from diffusion_cli.runs.checkpoint import LAST, Checkpoint, read
from diffusion_cli.runs.find import recover
from diffusion_cli.runs.load import AUTOENCODER
from diffusion_cli.runs.lora import BASE
from diffusion_cli.runs.weights import save_weights
from diffusion_cli.system.distributed import Distributed, launch, started
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.locks import run_lock
from diffusion_cli.system.precision import emulated_format
from diffusion_cli.system.signals import UNFINISHED
from diffusion_cli.system.trusted_paths import WEIGHTS, remember, remember_run
from diffusion_cli.system.untrusted import reason
from diffusion_cli.training.callbacks import GracefulStop
from diffusion_cli.training.checkpoints import CheckpointCallback
from diffusion_cli.training.device import naming_nondeterministic
from diffusion_cli.training.logs import make_loggers, run_loggers
from diffusion_cli.training.lora import frozen_weights
from diffusion_cli.training.module import TrainingModule
from diffusion_cli.training.out_of_memory import advise_on_oom
from diffusion_cli.training.progress import Progress
from diffusion_cli.training.stored_state import StoredOptions, check_state, expected_state, mend_state
from diffusion_cli.training.teacher import few_step_callbacks
from diffusion_cli.training.trainer import make_trainer
from diffusion_cli.training.user_callbacks import (
    PlainStates,
    check_monitors,
    check_states,
    make_callbacks,
    stop_reason,
)

FAST_STEPS = 4
"""Sampling steps of the previews of fast_dev_run."""


def run(config: TrainConfig) -> int:
    """Train or continue a run in all processes; return the exit code."""
    place, trainer = started(), config.trainer
    check_devices(config, place)
    check_loggers(config)
    if place.rank == 0 and (remark := remark_on_machine(config)):
        print(f"diffuse: {remark}", file=sys.stderr)
    return launch(
        train, config,
        processes=None if place.world > 1 else trainer["devices"], key="trainer.devices",
        device=trainer["accelerator"], timeout=timedelta(seconds=trainer["timeout"]),
    )  # fmt: skip


def train(config: TrainConfig) -> int:
    """Train as one of several processes; rank 0 writes files and prints."""
    users = make_callbacks(config.callback)
    if config.trainer["fast_dev_run"]:
        return _try(config, users)
    return _train(config, Path(config.output_dir, str(config.name)), users)


def _try(config: TrainConfig, users: Mapping[str, Callback]) -> int:
    """Train one step in a folder that is removed afterwards."""
    unset = ("max_epochs", "max_time", "progressive", "stage_steps", "stage_batch", "eval_every", "keep_best")
    fixed = config.sampler and config.sampler.get("levels")  # levels of a sampler are those of its steps
    previews = {
        "preview_every": config.preview_every and 1,
        "preview_steps": config.preview_steps if fixed else min(config.preview_steps, FAST_STEPS),
    }
    short = config.model_copy(
        update={
            **dict.fromkeys(unset),
            **previews,
            "max_steps": 1,
            "log_every": 1,
            "validate_every": 1,
            "logger": {},
        }
    )
    with tempfile.TemporaryDirectory(prefix="diffuse-") as temporary:
        _train(short, Path(Distributed().broadcast(temporary), str(config.name)), users)
        Distributed().all_gather(None)  # before the folder of rank 0 is removed
    if Distributed().is_main:
        print("fast_dev_run: one step of training, validation and previews worked; nothing is kept")
    return 0


def _train(config: TrainConfig, folder: Path, users: Mapping[str, Callback]) -> int:
    main, last = Distributed().is_main, folder / LAST
    stop = GracefulStop(seconds(config.max_time), seconds(config.checkpoint_period))
    with run_lock(folder) if main else nullcontext():
        if main:
            recover(folder)
        before = read(last) if Distributed().broadcast(last.is_file()) else None
        if before and before.info.origin is not None:
            problem, remedy = "is an imported model", "choose another name; init.run= starts from its weights"
            raise UsageError("name", config.name, problem, remedy)
        if before:
            check_configuration(folder, config, before.info.config.model_dump())
        setup = set_up(config, folder, before.info if before else None)
        config = setup.config
        if main:  # also for a finished run
            remember(config.dataset)
            remember(config.text or {}, WEIGHTS)
        done = before.step if before else 0
        if setup.max_steps is None or done < setup.max_steps:
            return _fit(config, setup, folder, users, before=before, stop=stop)
        if main:
            assert before is not None
            assert setup.max_steps is not None
            print(train_report.finished(folder, done, setup.max_steps, before.info.config.max_steps))
        return 0


def _fit(
    config: TrainConfig, setup: TrainingSetup, folder: Path, users: Mapping[str, Callback],
    *, before: Checkpoint | None, stop: GracefulStop,
) -> int:  # fmt: skip
    """Train from step 0 or from a checkpoint until the end or a signal; return the exit code."""
    main, done, model = Distributed().is_main, before.step if before else 0, setup.task.model
    module = training_module(setup, config.seed)
    sharded = setup.device.strategy == "fsdp" and started().world > 1
    setup.optimization.check(module, sharded=sharded, max_steps=setup.max_steps)
    averages = weight_averages(config.ema, model.network, setup.device.offload_ema)
    ema = averages[0]
    teachers: Sequence[Callback] = ()
    if isinstance(setup.task, DenoisingTask) and isinstance(setup.task.objective, FewStep):
        assert isinstance(model, Denoiser)
        teachers = few_step_callbacks(setup.task.objective, model, ema, sharded=sharded)
    periodic = periodic_callbacks(config, setup, folder, ema=ema, stop=stop)
    checkpoints = CheckpointCallback(config.checkpoint_every, folder, config.keep_last, stop)
    progress = Progress(config.log_every, folder, setup.stages, setup.max_steps, stop, config.model_dump())
    check_monitors(users, ["loss", *(name for callback in periodic for name in callback.measures)])
    trainer = make_trainer(
        setup.device, setup.precision, folder,
        done=done, max_steps=setup.max_steps, log_every=config.log_every,
        accumulate_grad_batches=config.accumulate_grad_batches,
        validate_every=config.validate_every,
        loggers=make_loggers(config.logger, folder, done),
        # EMA first, because others use its weights; checkpoints last, because they store the state of the others.
        callbacks=[
            *averages, *snapshots(config.ema, averages, folder), *teachers, progress, stop, *periodic,
            *users.values(), PlainStates(users), checkpoints,
        ],
    )  # fmt: skip
    if before:
        _check_resumable(before, trainer, module, folder, users)
        stop.load_state_dict(before.state["callbacks"][stop.state_key])
        if stop.seconds_left() == 0:
            if main:
                print(train_report.time_spent(config, folder, done, stop.elapsed))
            return 0
        if stop.by_callback and before.info.config.model_dump().get("callback") == config.callback:
            if main:
                print(train_report.stopped(folder, done, stop_reason(users)))
            return 0
    compiled = config.compile is True or (
        config.compile == "auto" and setup.device.torch_device.type == "cuda"
    )
    if compiled:
        model.network.compile()  # in place: torch.compile(network) would rename every weight
    if main:
        _begin(config, setup, folder, before)
        for logger in run_loggers(trainer):
            logger.log_hyperparams(config.model_dump())
    repeats = setup.task.objective.repeats if isinstance(setup.task, DenoisingTask) else 1
    batches = ProgressiveBatches(
        setup.images, setup.stages, config.seed, setup.dataset.flip, start=done, parts=config.accumulate_grad_batches,
        rank=Distributed().rank, world_size=Distributed().world, device=setup.device.torch_device,
        num_workers=setup.dataset.num_workers, repeats=repeats,
    )  # fmt: skip
    with stop.listening():  # until here there is nothing to save, so a signal ends the command at once
        with (
            naming_compile(config.compile) if compiled else nullcontext(),
            _naming_the_saved_step(checkpoints, done),
            advise_on_oom(module, setup.device.torch_device, setup.stages, trainer),
            naming_nondeterministic(),
        ):
            try:
                trainer.fit(module, batches, ckpt_path=folder / LAST if done else None, weights_only=True)
            except SystemExit as error:  # Lightning raises it at a second Ctrl-C
                raise KeyboardInterrupt from error
            except MisconfigurationException as error:  # of a callback of the user
                problem = f"callback={','.join(users)}"
                raise UsageError(
                    problem, NO_VALUE, reason(error), "correct its values, or leave it out"
                ) from error
        if main and not setup.device.fast_dev_run:
            for line in train_report.last_lines(progress, stop, periodic, stop_reason(users), model, folder):
                print(f"\n{line}")
    return UNFINISHED if stop.stopping else 0


def _check_resumable(
    before: Checkpoint, trainer: Trainer, module: TrainingModule, folder: Path, users: Mapping[str, Callback]
) -> None:
    """Raise UsageError unless a checkpoint has the training state of this run; convert states of other versions."""
    expected = expected_state(trainer, module, before.step, [*users.values()])
    mend_state(before.state, expected)
    check_state(folder / LAST, before.state, expected)
    check_states(users, before.state["callbacks"], folder / LAST)
    # Lightning reads the file again, so this callback repeats the conversion.
    trainer.callbacks.append(StoredOptions(expected))  # pyright: ignore[reportAttributeAccessIssue]


def _begin(config: TrainConfig, setup: TrainingSetup, folder: Path, before: Checkpoint | None) -> None:
    """Write the first files of a run, with the autoencoder and the frozen weights; print a summary and remarks."""
    done = before.step if before else 0
    if setup.latent is not None and not done:
        save_weights(setup.latent.latents.autoencoder.state_dict(), folder / AUTOENCODER)
    if setup.info.lora is not None and not done:
        save_weights(frozen_weights(setup.task.model.network), folder / BASE)
    with atomic_write(folder / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    if not setup.device.fast_dev_run:
        remember_run(folder)  # only now, because an existing config.yaml may be untrusted
    print(train_report.first_line(config, setup, folder, done), file=sys.stderr)
    if not before and (line := train_report.first_weights_line(setup)):
        print(line, file=sys.stderr)
    if before and (line := train_report.other_budget(before.info.config.model_dump(), config)):
        show_remarks([line])
    if not before and (line := emulated_format(setup.precision, setup.device.torch_device)):
        show_remarks([line])
    show_remarks(train_report.remarks(setup))
    if config.preview_real:
        save_real_images(setup, folder)


@contextmanager
def _naming_the_saved_step(checkpoints: CheckpointCallback, done: int) -> Iterator[None]:
    """Turn a disk or data error into a MachineError that names the saved step."""
    try:
        yield
    except (OSError, UnreadableError) as error:
        step = checkpoints.saved or done
        # A run cannot be continued on other data.
        same = "on the same data " if isinstance(error, UnreadableError) else ""
        saved = (
            f"is saved at step {step}; {same}the same command continues it" if step else "is not saved yet"
        )
        raise MachineError(f"{error}; the run {saved}") from error

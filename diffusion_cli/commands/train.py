"""`diffuse train`: from a configuration to a trained model in a run folder."""

import logging
import math
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch import Callback, Trainer

from diffusion_cli.checkpoint import FORMAT, LAST, digest, read, recover, whole_file
from diffusion_cli.config import (
    UNFINISHED,
    Mistakes,
    TrainConfig,
    build,
    fingerprint,
    identity,
    seconds,
    shown,
)
from diffusion_cli.data import Batch, Batches, Dataset, Images, UnreadableError, hold, normalised
from diffusion_cli.denoiser import Denoiser, NoiseConditioned, NoisyClassifier
from diffusion_cli.locks import only_one
from diffusion_cli.metrics import Metric, Networks, cache_folder
from diffusion_cli.objective import Objective
from diffusion_cli.precision import resolve
from diffusion_cli.ranks import LostProcess, Place, Ranks, started, work_together
from diffusion_cli.samplers import Sampler
from diffusion_cli.seeding import mix
from diffusion_cli.times import Times
from diffusion_cli.training.callbacks import (
    Checkpoints,
    HeldOutAccuracy,
    HeldOutLoss,
    Preview,
    Progress,
    Stop,
    WholeFileIO,
)
from diffusion_cli.training.device import Device
from diffusion_cli.training.ema import EMA
from diffusion_cli.training.evaluation import Evaluation, TrainingSamples
from diffusion_cli.training.memory import advice, ran_out
from diffusion_cli.training.module import TrainingModule
from diffusion_cli.training.optimizers import OptimizerConfig


def run(config: TrainConfig) -> int:
    """Train, or take a run up again, in all processes that were started or are asked for; the exit code."""
    trainer = config.trainer
    place, devices, nodes = started(), trainer["devices"], trainer["num_nodes"]
    if place.world > 1 and devices not in (None, place.local_world):
        raise ValueError(
            f"trainer.devices={devices}: torchrun or srun started {place.local_world} on this node; leave it null"
        )
    if nodes not in (None, place.nodes):
        raise ValueError(
            f"trainer.num_nodes={nodes}: {place.nodes} is at work; start diffuse by torchrun or srun on so many, or "
            "with -m launcher=slurm"
        )
    return work_together(
        train, config,
        processes=None if place.world > 1 else devices, timeout=timedelta(seconds=trainer["timeout"]),
    )  # fmt: skip


def train(config: TrainConfig) -> int:
    """Train as one of the processes that share the work; the first alone writes and prints."""
    assert config.name is not None
    folder = Path(config.output_dir) / config.name
    last = folder / LAST
    stop = Stop(seconds(config.max_time), seconds(config.checkpoint_period))
    with only_one(folder) if Ranks().first else nullcontext(), stop.listening():
        if Ranks().first:
            recover(folder)
        return _train(config, folder, last, stop)


class _Parts(NamedTuple):
    """What a configuration is made of."""

    dataset: Dataset
    model: NoiseConditioned
    objective: Objective[Any]
    times: Times
    sampler: Sampler
    optimizer: OptimizerConfig
    device: Device


def _build(config: TrainConfig) -> _Parts:
    """Build everything but the images; ValueError where two parts do not go together."""
    dataset: Dataset = build(config.dataset, config.data_dir)
    schedule = build(config.schedule)
    sampler: Sampler = build(config.sampler, schedule)
    device: Device = build(config.trainer)
    torch.manual_seed(mix(config.seed, "weights"))
    channels, height, _ = dataset.shape
    network = build(config.model, channels, height, dataset.num_classes)
    objective: Objective[Any] = build(config.objective)
    model = objective.trains(network, schedule, build(config.parameterization))
    times: Times = build(config.times)
    times.check(schedule)
    objective.check(model, times)
    if isinstance(model, Denoiser):
        try:  # refused now rather than at the first preview
            sampler.grid(config.preview_steps)
        except ValueError as error:
            raise ValueError(str(error).replace("steps=", "preview_steps=", 1)) from error
        if config.eval_every is not None:
            try:
                sampler.grid(config.eval_steps)
            except ValueError as error:
                raise ValueError(str(error).replace("steps=", "eval_steps=", 1)) from error
        sampler.check(model)
    return _Parts(dataset, model, objective, times, sampler, build(config.optimizer), device)


def _train(config: TrainConfig, folder: Path, last: Path, stop: Stop) -> int:
    ranks, place = Ranks(), started()
    before = read(last) if ranks.agree(last.is_file()) else None
    done = before["global_step"] if before else 0
    _refuse_another(folder, config, before)

    parts = _build(config)
    dataset, model, device = parts.dataset, parts.model, parts.device.torch_device
    part = config.batch_size // config.accumulate
    if part % ranks.world:
        raise ValueError(
            f"batch_size={config.batch_size}: is shared out among {ranks.world} devices, in {config.accumulate} parts; "
            f"take a multiple of {ranks.world * config.accumulate}"
        )
    images = dataset.load("train")
    about = _about(config, dataset, model.task, images)
    _refuse_other_data(folder, about, before)
    max_steps = _max_steps(config, len(images))
    if max_steps is not None and done >= max_steps:
        if ranks.first:
            print(
                f"{folder} is complete at step {done}; a larger budget, as max_steps={2 * done}, goes on with it"
            )
        return 0

    module = TrainingModule(model, parts.objective, parts.times, parts.optimizer, config.seed, about)
    ema = EMA(model.network, config.ema.decay, config.ema.warm_up, parts.device.offload_ema)
    watchers = _watchers(config, folder, parts, ema)
    if ranks.first:
        _write_config(folder / "config.yaml", config)
    if config.compile is True or (config.compile == "auto" and device.type == "cuda"):
        model.network.compile()  # in place: torch.compile(network) would rename every weight
    precision = resolve(config.precision, device)
    if ranks.first:
        print(
            f"{'Going on with' if done else 'Training'} {folder}: {_describe(model.network)} on {len(images)} images "
            f"of {dataset.name}, {_where(device, ranks, place)}, {precision}",
            file=sys.stderr,
        )
    checkpoints = Checkpoints(config.checkpoint_every, folder, config.keep_last, stop)
    trainer = _trainer(
        config,
        callbacks=[
            ema,  # first: the others look at the average
            *watchers,
            Progress(config.log_every, folder, config.batch_size, max_steps, stop),
            stop,
            checkpoints,  # last: it saves what the others know
        ],
        logger=[build(node).logger(folder, done) for node in config.logger.values()],
        max_steps=max_steps or -1,
        precision=precision,
        device=parts.device,
        default_root_dir=folder,
    )
    start = done * config.accumulate
    batches = Batches(
        images, part, config.seed, dataset.flip, start, ranks.rank, ranks.world, device, dataset.num_workers
    )
    fits = True
    try:
        with _saying_what_is_saved(checkpoints, done):
            trainer.fit(module, batches, ckpt_path=last if done else None, weights_only=True)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        fits = False  # to be looked into when the error, and all that it holds, is gone
    if not fits:
        context = trainer.precision_plugin.forward_context()
        raise ValueError(
            advice(module, dataset.shape, config.batch_size, config.accumulate, ranks.world, context)
        )
    if ranks.first:
        _tell(trainer.global_step, stop, watchers, model, folder)
    return 0 if stop.signal is None else UNFINISHED


@contextmanager
def _saying_what_is_saved(checkpoints: Checkpoints, done: int) -> Iterator[None]:
    """Raise what ends a run from outside, a disk or the data, as OSError that says where the run can be taken up."""
    try:
        yield
    except LostProcess:  # the one that failed says why
        raise
    except (OSError, UnreadableError) as error:
        step = checkpoints.saved or done
        saved = (
            f"is saved to step {step}; the same command goes on from there" if step else "is not saved yet"
        )
        raise OSError(f"{error}; the run {saved}") from error


def _tell(step: int, stop: Stop, watchers: list[Callback], model: NoiseConditioned, folder: Path) -> None:
    """Say how a run has ended, and how it goes on."""
    for watcher in watchers:
        if isinstance(watcher, HeldOutAccuracy):
            print(
                "\n" + ", ".join(f"held-out {name} {value:.3f}" for name, value in watcher.accuracy.items())
            )
    if stop.signal is not None:
        name = signal.Signals(stop.signal).name
        print(f"\n{name}: saved {folder} at step {step}; the same command goes on from there")
    else:
        print(f"\nTrained {step} steps; the run is {folder}\nNext: {_next(model, folder)}")


def _where(device: torch.device, ranks: Ranks, place: Place) -> str:
    """The devices at work, in words."""
    if ranks.world == 1:
        return device.type
    return f"{ranks.world} x {device.type}" + (f" on {place.nodes} nodes" if place.nodes > 1 else "")


def _watchers(config: TrainConfig, folder: Path, parts: _Parts, ema: EMA) -> list[Callback]:
    """What looks at the averaged weights on the way: their loss on held-out images, and what the model is for."""
    held_out = parts.dataset.load("held_out")
    part = config.batch_size // config.accumulate
    watchers: list[Callback] = []
    if held_out:
        once = _once(held_out, part, parts.device.torch_device)
        watchers.append(HeldOutLoss(config.validate_every, once, ema))
        if isinstance(parts.model, NoisyClassifier):
            watchers.append(HeldOutAccuracy(config.validate_every, once, ema))
    if config.eval_every is not None and not isinstance(parts.model, Denoiser):
        raise ValueError(f"eval_every={config.eval_every}: a classifier makes no samples; leave it out")
    if isinstance(parts.model, Denoiser):
        shape = parts.dataset.shape
        if config.eval_every is not None:
            watchers.append(_evaluation(config, config.eval_every, folder, parts, ema))
        watchers.append(
            Preview(config.preview_every, folder, ema, parts.sampler, config.preview_steps, shape)
        )
    return watchers


def _evaluation(config: TrainConfig, every: int, folder: Path, parts: _Parts, ema: EMA) -> Evaluation:
    """What measures samples on the way; ValueError where that cannot be done."""
    metrics = {name: build(node) for name, node in config.metric.items()}
    for name, metric in metrics.items():
        if not isinstance(metric, Metric):
            raise ValueError(
                f"metric={name}: measures no samples; on the way there are the metrics of samples only"
            )
    dataset = parts.dataset
    names = dataset.class_names if getattr(parts.model, "num_classes", None) is not None else None
    samples = TrainingSamples(config.eval_samples, parts.sampler, config.eval_steps, dataset.shape, names)
    cache_dir = cache_folder(config.cache_dir)
    networks = Networks(config.features, dataset, cache_dir, parts.device.torch_device)
    reference = build(config.reference, dataset)
    measured = config.model_dump(
        include={"metric", "features", "reference", "sampler", "eval_samples", "eval_steps", "keep_best"}
    )
    return Evaluation(
        every, metrics, networks, reference, samples,
        run=folder, ema=ema, batch_size=1 if parts.sampler.one_by_one else config.batch_size,
        keep_best=config.keep_best, identity=fingerprint(measured),
    )  # fmt: skip


def _trainer(config: TrainConfig, device: Device, precision: str, **arguments: Any) -> Trainer:
    """Lightning's Trainer, with all that the run's own callbacks do switched off, and its advice kept to itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    return Trainer(
        max_epochs=-1,
        accumulate_grad_batches=config.accumulate,
        plugins=[WholeFileIO(), *device.plugins(precision)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=config.log_every,
        **device.trainer_arguments(),
        **arguments,
    )


def _refuse_another(folder: Path, config: TrainConfig, checkpoint: dict[str, Any] | None) -> None:
    """Raise Mistakes if a run's checkpoint, or else its configuration file, says that another run lies there."""
    path = folder / "config.yaml"
    written = None
    if path.is_file():
        try:
            written = yaml.safe_load(path.read_text())
        except yaml.YAMLError:
            written = ()
        if not isinstance(written, dict):
            raise Mistakes(f"{path}: is not a run's configuration; mend it, or choose another name=")
    if checkpoint is not None:
        written = checkpoint["diffuse"]["config"]
    if written is None:
        return
    before, now = identity(written), identity(config.model_dump())
    keys = sorted(key for key in before | now if before.get(key, ...) != now.get(key, ...))
    if keys:
        raise Mistakes(
            *(
                f"{key}={shown(now.get(key))}: the run in {folder} has {shown(before.get(key))}"
                for key in keys
            ),
            f"name={config.name}: holds a run of another configuration; choose another name",
        )


def _write_config(path: Path, config: TrainConfig) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))


def _max_steps(config: TrainConfig, num_images: int) -> int | None:
    limits = [config.max_steps] if config.max_steps else []
    limits += [math.ceil(config.max_epochs * num_images / config.batch_size)] if config.max_epochs else []
    return min(limits, default=None)


def _refuse_other_data(folder: Path, about: dict[str, Any], checkpoint: dict[str, Any] | None) -> None:
    """Raise Mistakes if a run was begun on another number of images, or on other classes."""
    before = checkpoint["diffuse"] if checkpoint else about
    lines = [
        "labels: are not those that the run was begun on; give back the labels, or take another name="
        if key == "labels_sha256"
        else f"{key}={about[key]}: the run in {folder} was begun on {before.get(key)}; give back the data, or take "
        "another name="
        for key in ("num_images", "class_names", "shape", "labels_sha256")
        if before.get(key) != about[key]
    ]
    if lines:
        raise Mistakes(*lines)


def _next(model: NoiseConditioned, folder: Path) -> str:
    if isinstance(model, NoisyClassifier):
        return f"diffuse sample run=RUN guidance=classifier guidance.run={folder}"
    return f"diffuse sample run={folder}"


def _about(config: TrainConfig, dataset: Dataset, task: str, images: Images) -> dict[str, Any]:
    labels = None if images.labels is None else images.labels.cpu()
    return {
        "task": task,
        "num_images": len(images),
        "labels_sha256": None if labels is None else digest({"labels": labels}),
        "format": FORMAT,
        "config": config.model_dump(),
        "shape": list(dataset.shape),
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names) if dataset.class_names else None,
    }


def _once(images: Images, batch_size: int, device: torch.device) -> Callable[[], Iterator[Batch]]:
    """A maker of one pass over images, in order and unaugmented."""
    held = hold(images, device)

    def batches() -> Iterator[Batch]:
        for number, rows in enumerate(torch.arange(len(held), device=held.device).split(batch_size)):
            labels = None if held.labels is None else held.labels[rows].to(device)
            yield Batch(number, normalised(held.gather(rows).to(device)), labels, rows)

    return batches


def _describe(network: torch.nn.Module) -> str:
    return f"{type(network).__name__} of {sum(p.numel() for p in network.parameters()) / 1e6:.2f}M parameters"

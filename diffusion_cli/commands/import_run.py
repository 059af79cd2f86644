"""`diffuse import`: write a pretrained model of another program as a run."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.config import ImportConfig, build
from diffusion_cli.config.catalogue import option_of, option_words
from diffusion_cli.convert import HUB, PUBLISHED, diffusers_autoencoder, read_source, refusal, refuse_run
from diffusion_cli.convert.base import Node, PretrainedModel, Process
from diffusion_cli.convert.diffusers_scheduler import changed
from diffusion_cli.data import Dataset
from diffusion_cli.errors import FormatError, UsageError, counted, format_value
from diffusion_cli.formats import SampleFormat, Uint8Image, form_of
from diffusion_cli.runs.imported import ImportedModel, check_nodes, image_shape
from diffusion_cli.system.trusted_paths import remember, remember_run

OTHER_PROCESS = "choose another model, or set schedule= and parameterization= as in its training"
"""Remedy of a source with a contradictory process."""


def run(config: ImportConfig) -> None:
    """Write the run, and print what was read and the next commands.

    Raises UsageError if the run exists, the source is a run or cannot be read, or the dataset does not fit the model.
    """
    refuse_run("source", config.source)
    folder = run_folder(config)
    name = folder.name
    if folder.exists():
        raise UsageError("name", name, f"{folder} exists already", "choose another name")
    dataset: Dataset | None = None if config.dataset is None else build(config.dataset, config.data_dir)
    sizes = None if dataset is None else dataset.shape[1:]
    model = read_source(config.source, "source", build(config.preset), sizes)
    try:
        check_nodes(model)
    except FormatError as error:
        raise refusal("source", config.source, error) from error
    model = replace(model, process=_process(config, model.process))
    try:
        info = _with_dataset(config, dataset, model).write(folder)
    except FormatError as error:
        usual = () if config.preset is None else (PUBLISHED,)
        raise refusal("source", config.source, error, *usual) from error
    except FileExistsError as error:
        raise UsageError("name", name, f"{folder} exists already", "choose another name") from error
    remember_run(folder)
    remember(config.dataset or {})
    show_remarks(_remarks(model))
    print(f"{folder}: {model.kind}, {_summary(info.shape, info.num_classes, model.process)}")
    print("Next:")
    for words in _next(config, name, model.process):
        print(f"  diffuse {words}")


def _remarks(model: PretrainedModel) -> Iterator[str]:
    """Yield what was assumed about a model, and where its own sampler differs."""
    yield from model.remarks
    if model.process is not None:
        yield from model.process.assumptions
        yield from (
            f"images of {model.kind} differ from those here: {remark}" for remark in model.process.remarks
        )


def run_folder(config: ImportConfig) -> Path:
    """Return the folder of the new run; UsageError for a source that gives it no name."""
    return Path(config.output_dir, config.name or _name(config.source))


def _name(source: str) -> str:
    """Return the name of a run for the last part of a source."""
    named = source.partition("@")[0] if source.startswith(HUB) else source
    last = re.split(r"[/\\:]", named.rstrip("/\\"))[-1]
    last = re.sub(r"\.(pt|pth|safetensors)$", "", last)
    name = re.sub(r"[^\w.+-]+", "_", last).lstrip(".+-")
    if not name:
        raise UsageError("source", source, "gives the run no name", "add name=")
    return name


def _process(config: ImportConfig, process: Process | None) -> Process | None:
    """Return the process of a source, changed for the schedule and parameterization that the command names.

    Raises UsageError if it names one for an autoencoder, or both contradict each other, also those of the source.
    """
    chosen: dict[str, Node] = {
        key: node for key in ("schedule", "parameterization") if (node := getattr(config, key)) is not None
    }
    if process is None:
        if not chosen:
            return None
        key, node = next(iter(chosen.items()))
        problem = f"is for denoisers, and {config.source} is an autoencoder"
        raise UsageError(key, option_of(key, node), problem, "leave it out")
    try:
        build(chosen.get("parameterization", process.parameterization)).check(
            build(chosen.get("schedule", process.schedule))
        )
    except UsageError as error:
        if not chosen:
            raise UsageError("source", config.source, error.problems[0].cause, OTHER_PROCESS) from error
        raise UsageError.several(error.problems) from error
    return changed(process, **chosen) if chosen else process


def _with_dataset(config: ImportConfig, dataset: Dataset | None, model: PretrainedModel) -> ImportedModel:
    """Return the model with the class names and the format of the dataset of the command, or its own ones.

    An autoencoder takes images of any size, so it gets that of the dataset.

    Raises UsageError unless the dataset has the images and the classes of the model.
    """
    classes, shape = model.network.num_classes, image_shape(model)
    names = None if classes is None else model.class_names
    parts: dict[str, Any] = {"model": model, "source": config.source}
    form = _form(config.source, model)
    if dataset is None:
        if form is None and shape[0] not in (1, 3):
            problem = f"its images have {counted(shape[0], 'channel')}, and 8-bit images have 1 or 3"
            raise UsageError("source", config.source, problem, "name their dataset with dataset=")
        return ImportedModel(**parts, form=form or Uint8Image(), class_names=names)
    if model.process is None and form is None:
        parts["model"] = _for_images(model, dataset)
    elif dataset.shape != shape:
        problem = f"its images have shape {list(dataset.shape)}, but those of the model have {list(shape)}"
        remedy = f"set dataset.resolution={shape[1]}, or choose another dataset"
        raise UsageError("dataset", dataset.name, problem, remedy)
    if form is not None and (difference := form.difference(dataset.form)) is not None:
        key, theirs, ours = difference
        problem = f"its images have {key}={ours}, but those of the model have {key}={theirs}"
        raise UsageError("dataset", dataset.name, problem, "choose another dataset")
    if classes is not None and names is None and dataset.class_names is not None:
        names = tuple(dataset.class_names)
    if names is not None and len(names) != classes:
        problem = f"has {len(names)} classes, but the model has {classes}"
        raise UsageError("dataset", dataset.name, problem, "choose another dataset")
    return ImportedModel(
        **parts, form=dataset.form, class_names=names, dataset=config.dataset, data_rules=dataset.rules
    )


def _form(source: str, model: PretrainedModel) -> SampleFormat | None:
    """Return the format of the images that a source states; UsageError if it is invalid."""
    try:
        return None if model.form is None else form_of(model.form)
    except UsageError as error:
        raise UsageError("source", source, error.problems[0].cause, "choose another model") from error


def _for_images(model: PretrainedModel, dataset: Dataset) -> PretrainedModel:
    """Return an autoencoder for the images of a dataset; UsageError unless it can encode them."""
    factor, channels = diffusers_autoencoder.factor(model.network.node), model.network.shape[0]
    fits = len(dataset.shape) == 3 and dataset.shape[0] == channels
    if not fits or any(side % factor for side in dataset.shape[1:]):
        taken = f"{counted(channels, 'channel')}, and sizes that are multiples of {factor}"
        problem = f"its images have shape {list(dataset.shape)}, but the autoencoder takes {taken}"
        raise UsageError(
            "dataset", dataset.name, problem, "set dataset.resolution=, or choose another dataset"
        )
    return replace(model, network=replace(model.network, shape=dataset.shape))


def _summary(shape: Sequence[int], num_classes: int | None, process: Process | None) -> str:
    """Return the main facts of a model in one line."""
    images = f"images {'x'.join(map(str, shape))}"
    if process is None:
        return images
    classes = "no classes" if num_classes is None else f"number of classes: {num_classes}"
    nodes = {"schedule": process.schedule, "parameterization": process.parameterization}
    parts = [f"{group}={option_of(group, node)}" for group, node in nodes.items()]
    parts.append(f"sampled there by {option_of('sampler', process.sampler)}")
    return ", ".join([images, classes, *parts])


def _next(config: ImportConfig, name: str, process: Process | None) -> Iterator[str]:
    """Yield commands for the new run."""
    root = [] if config.output_dir == "outputs" else [f"output_dir={shlex.quote(config.output_dir)}"]
    if process is None:
        data = [] if config.dataset else ["dataset=<option>"]
        yield " ".join(["eval", f"run={name}", "'metric=[reconstruction,rfid]'", *data, *root])
        yield " ".join(["train", f"latent.run={name}", "dataset=<option>", "name=<new>", *root])
        return
    clip = [] if process.clip is True else [f"clip_x0={format_value(process.clip)}"]
    yield " ".join(["sample", f"run={name}", *option_words("sampler", process.sampler), *clip, *root])
    yield " ".join(["train", f"init.run={name}", "dataset=<option>", "name=<new>", *root])

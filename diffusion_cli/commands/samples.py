"""The samples to be evaluated: made by a run's model on the way, and maybe kept, or made by anyone."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.commands.outputs import keep_calls, parsed, recorded_calls, sample_name
from diffusion_cli.commands.trained import LoadedModel
from diffusion_cli.data import Dataset, ExternalImages, PicturedImages, given_images
from diffusion_cli.data.class_shares import label_settings, labels_in_turn
from diffusion_cli.data.folder import FileImages
from diffusion_cli.data.labels import read
from diffusion_cli.data.listing import MANIFEST
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import SampleFormat, Shape, Uint8Image
from diffusion_cli.generate import generate, labels_of
from diffusion_cli.images import Writer, read_stored, save_stored
from diffusion_cli.metrics import GivenSamples, Reference, Samples
from diffusion_cli.runs.find import is_run
from diffusion_cli.runs.load import Loaded, LoadedDenoiser
from diffusion_cli.system.untrusted import LONGEST_MANIFEST


class ModelSamples(Samples):
    """Samples of a run's model, one for each seed of all repeats.

    With a `folder`, the samples in it are read, and the others are kept there.
    """

    def __init__(self, trained: LoadedModel, seeds: range, folder: Path | None) -> None:
        self.trained, self.seeds, self.folder = trained, seeds, folder
        model = trained.model
        self.shape, self.class_names = model.info.form.picture_shape(model.shape), model.info.class_names
        self.labelled = trained.labels is not None
        self._calls = 0
        self._made, self._seconds = 0, 0.0

    @cached_property
    def batch_size(self) -> int:
        """Samples at a time; for `auto` found when first asked for."""
        return self.trained.batch_size(len(self))

    @cached_property
    def writer(self) -> Writer:
        """Writes the samples to be kept: to be entered before the first batch, and they are there once it is left."""
        return Writer(2 * self.batch_size)

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def calls(self) -> int | None:
        """Most network calls that an image took; None if all were made earlier, without a record of it."""
        recorded = 0 if self.folder is None else recorded_calls(self.folder)
        return max(self._calls, recorded) or None

    @property
    def seconds_per_image(self) -> float | None:
        """What making an image took, at its place in a batch; None if all were there."""
        return self._seconds / self._made if self._made else None

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        seeds = [self.seeds[number] for number in numbers]
        labels = labels_of(seeds, self.trained.labels, torch.device("cpu"))
        form, shape = self.trained.model.info.form, self.trained.model.shape
        if self.folder is None:
            return form.to_rgb(torch.cat([images for _, images in self._generated(seeds)])), labels
        paths = {seed: image_path(self.folder, seed, form) for seed in seeds}
        there = [seed for seed in seeds if paths[seed].is_file()]
        files = [paths[seed] for seed in there]
        found = dict(zip(there, read_stored(files, form, shape), strict=True)) if there else {}
        for some, images in self._generated([seed for seed in seeds if seed not in found]):
            for seed, image in zip(some, images, strict=True):
                self.writer(save_stored, image, paths[seed], form)
                found[seed] = image
        return form.to_rgb(torch.stack([found[seed] for seed in seeds])), labels

    def _generated(self, seeds: list[int]) -> list[tuple[list[int], Tensor]]:
        start = time.perf_counter()
        made = []
        for batch in generate(self.trained, seeds, self.batch_size):
            made.append((batch.seeds, batch.images.cpu()))
            if batch.calls > self._calls:
                self._calls = batch.calls
                if self.folder is not None:
                    keep_calls(self.folder, self._calls)
        self._seconds += time.perf_counter() - start
        self._made += len(seeds)
        return made

    def protocol(self) -> dict[str, Any]:
        return model_record(self.trained) | {
            "seeds": [self.seeds[0], self.seeds[-1]],
            "network_calls": self.calls,
        }


def model_record(trained: LoadedModel) -> dict[str, Any]:
    """What a model's numbers depend on, as plain data."""
    weights = weights_record(trained.folder, trained.model, trained.record["weights"])
    return weights | trained.record


def weights_record(folder: Path, model: Loaded, weights: str) -> dict[str, Any]:
    """Return which weights of a run were measured, as plain data."""
    return {
        "run": folder.name, "step": model.step, "ema": model.info.config.ema, "weights": weights,
        "weights_sha256": model.digest,
    }  # fmt: skip


def in_shares_of(trained: LoadedModel, reference: Reference) -> tuple[LoadedModel, str]:
    """Return the model with the labels of the reference's images, each as often as there, and a note about them.

    Labels that the model does not make by itself are left out. The labels stay as they are for a reference without
    labels, or with labels of other classes. Raises UsageError where the reference cannot be read.
    """
    names, made = trained.model.info.class_names, trained.labels
    assert names is not None
    assert made is not None
    try:
        counts = reference.class_counts(names)
    except (ValueError, OSError) as error:
        raise UsageError(
            "label",
            None,
            f"the labels of the reference cannot be read ({error})",
            "set label=all for equal class shares",
        ) from error
    if counts is not None:
        counts = [count if label in made else 0 for label, count in enumerate(counts)]
    if counts is None or not any(counts):
        source = reference.name if reference.stats is None else reference.stats.name
        return trained, f"class shares: equal, because {source} has no labels of the model's classes"
    settings = label_settings(counts)
    matched = replace(trained, labels=labels_in_turn(settings), record={**trained.record, **settings})
    return matched, f"class shares: those of {reference.name}; for equal shares use label=all"


def image_path(folder: Path, seed: int, form: SampleFormat) -> Path:
    """The file of a seed."""
    return folder / sample_name(seed, form.suffix)


def read_pictures(folder: Path, seeds: Sequence[int], model: LoadedDenoiser) -> Tensor:
    """Pictures of the samples of some seeds that lie in a folder, uint8 [N, C, H, W]."""
    files = [image_path(folder, seed, model.info.form) for seed in seeds]
    return model.info.form.to_rgb(read_stored(files, model.info.form, model.shape))


def read_films(folder: Path, seeds: Sequence[int], model: LoadedDenoiser) -> Tensor:
    """The samples of some seeds as films to look through, uint8 [N, F, C, H, W]."""
    files = [image_path(folder, seed, model.info.form) for seed in seeds]
    return model.info.form.frames(read_stored(files, model.info.form, model.shape))


def given_samples(
    path: Path, dataset: Dataset | None, count: int | None, images: Tensor | None = None
) -> GivenSamples:
    """Return the images of a path, or `images` in memory; those of this program with their manifest."""
    form, shape = (dataset.form, dataset.shape) if dataset else (Uint8Image(), None)
    given = given_images(path, "samples", shape, form) if images is None else _in_memory(images, shape, form)
    show_remarks(given.remarks)
    made: dict[str, Any] = {"samples": path.name}
    manifest = _manifest(path, given)
    if manifest:
        made |= {"step": manifest.get("step"), **manifest["settings"]}
        labels = labels_in_turn(manifest["settings"])
        seeds = [PurePosixPath(name).stem for name in _names(given)]
        classes = dataset.num_classes or 0 if dataset else 0
        known = isinstance(labels, list) and max(labels) < classes
        if dataset and known and all(seed.isdecimal() for seed in seeds):
            given = ExternalImages(given.images, dataset.class_names)
            given.images.labels = labels_of([int(seed) for seed in seeds], labels, torch.device("cpu"))
    if not isinstance(form, Uint8Image):
        given = ExternalImages(PicturedImages(given.images, form), given.class_names)
    return GivenSamples(given, dataset.class_names if dataset else None, made, f"samples={path}", count)


def _in_memory(images: Tensor, shape: Shape | None, form: SampleFormat) -> ExternalImages:
    """Images as stored, without classes; UsageError for another type or shape."""
    shapes = [shape] if shape else [(channels, *images.shape[-2:]) for channels in (1, 3)]
    dtype = form.quantize(torch.zeros(1, *shapes[0])).dtype
    if images.dtype != dtype or tuple(images.shape[1:]) not in shapes or len(images) == 0:
        found = f"{images.dtype} {list(images.shape)}".removeprefix("torch.")
        wanted = str(list(shape))[1:-1] if shape else "C, H, W"
        raise UsageError(
            "samples",
            found,
            f"must be {str(dtype).removeprefix('torch.')} [N, {wanted}]{'' if shape else ' with 1 or 3 channels'}",
        )
    return ExternalImages(MemoryImages(images.cpu(), None), None)


def _names(given: ExternalImages) -> list[str]:
    """The files of images, in order; none of a NumPy file."""
    return given.images.names if isinstance(given.images, FileImages) else []


def _manifest(path: Path, given: ExternalImages) -> dict[str, Any] | None:
    """What this program wrote about images that all lie in one folder of its own; None of other images."""
    folders = {PurePosixPath(name).parent for name in _names(given)}
    if len(folders) != 1:
        return None
    try:
        return parsed(read(path, str(folders.pop() / MANIFEST), LONGEST_MANIFEST))
    except ValueError:
        return None


def run_of(path: Path) -> Path | None:
    """The run folder that a folder of samples lies in, or None."""
    return next((folder for folder in path.resolve().parents if is_run(folder)), None)

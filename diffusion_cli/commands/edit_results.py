"""Files of the results of an edit, and the picture of before and after."""

import glob
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusion_cli.captions import Captions
from diffusion_cli.commands.anomaly_maps import AnomalyMaps, middle_of, rows_with_maps
from diffusion_cli.commands.edit_conditions import wanted_name
from diffusion_cli.commands.edit_jobs import EditJob
from diffusion_cli.commands.edit_volumes import VolumeResult
from diffusion_cli.commands.trained import LoadedModel
from diffusion_cli.config import EditConfig
from diffusion_cli.data import to_model_range
from diffusion_cli.editing import Anomaly, Attribute, Edit, Restoration
from diffusion_cli.errors import class_name
from diffusion_cli.formats import Completed, SampleFormat, Volume
from diffusion_cli.images import (
    PLAIN,
    read_images,
    read_stored,
    save_completed,
    save_gif,
    save_png,
    save_rows,
    save_stored,
)

SHOWN = 10  # most rows of grid.png


def files_of(output: Path, job: EditJob, form: SampleFormat) -> list[Path]:
    """Return the existing files of a result: one image, or a series."""
    if job.volume is not None:
        return job.volume.written(output, job.name, form.suffix)
    single = output / f"{job.name}{form.suffix}"
    return [single] if single.is_file() else sorted((output / job.name).glob(f"[0-9]*{form.suffix}"))


def save_results(
    output: Path,
    batch: list[EditJob],
    images: Tensor,
    completed: dict[str, Completed | VolumeResult],
    before: list[Tensor],
    form: SampleFormat,
    *,
    captions: bool,
) -> None:
    """Write the results, [B, N, C, H, W] as stored, and pictures of their inputs."""
    for row, job in enumerate(batch):
        for place, picture in enumerate(before):
            save_png(picture[row], output / "before" / f"{job.name}.{place}.png")
        file = output / f"{job.name}{form.suffix}"
        whole = completed.get(job.name)
        if isinstance(whole, VolumeResult):
            whole.save(output, job.name)
        elif whole is not None:
            save_completed(whole, file)
        elif len(images[row]) == 1:
            save_stored(images[row, 0], file, job.form)
        else:
            for place, image in enumerate(images[row]):
                save_stored(image, output / job.name / f"{place:03d}{form.suffix}", form)
            pictures = form.to_rgb(images[row])
            names = _series(len(pictures)) if captions else []
            save_rows([pictures], output / job.name / "strip.png", Captions(columns=names))
            save_gif(pictures, output / f"{job.name}.gif", names=names)


def previews(form: SampleFormat, images: Tensor, batch: Sequence[EditJob], edit: Edit) -> Tensor:
    """Return previews of images [B, C, *sizes], as stored, of volumes through the centre of the painted region."""
    known = edit.of([job.place for job in batch]).known
    places = [None] * len(batch) if known is None else [middle_of(~region[0]) for region in known]
    places = places * (len(batch) // len(places))
    return torch.cat(
        [form.slices(image[None], place) for image, place in zip(images, places, strict=True)]
    ).cpu()


def draw_before_and_after(
    config: EditConfig, trained: LoadedModel, edit: Edit, jobs: Sequence[EditJob], output: Path
) -> str:
    """Write a row of pictures for each of the first inputs; return a line that names the file.

    Args:
        config: configuration of the edit.
        trained: the model.
        edit: the edit.
        jobs: all results, with the variations of an input after each other.
        output: folder of the results.
    """
    grid, each = output / "grid.png", config.variations
    form = trained.model.info.form
    groups = [jobs[at : at + each] for at in range(0, len(jobs), each)[:SHOWN]]
    if isinstance(edit, Anomaly):
        results = [torch.cat([_stored(output, job, form, edit) for job in group]) for group in groups]
        shown = AnomalyMaps(output, [job for group in groups for job in group], each).means()
        rows = rows_with_maps([group[0] for group in groups], results, [*shown.values()], edit)
    else:
        rows = [_row(output, group, form, edit) for group in groups]
    most = max(map(len, rows), default=0)
    captions = _captions(config, trained, edit, jobs[::each], most)
    # Results stay below each other, also if an input has no picture of its own size.
    rows = [torch.cat([row.new_full((most - len(row), *row.shape[1:]), 255), row]) for row in rows]
    save_rows(rows, grid, captions if config.captions else PLAIN)
    inputs = len(jobs) // each
    return f"Before and after: {grid}" + (f" (first {SHOWN} of {inputs})" if inputs > SHOWN else "")


def _row(output: Path, jobs: Sequence[EditJob], form: SampleFormat, edit: Edit) -> Tensor:
    """Return the pictures of one input, followed by its results."""
    row = _before(output, jobs[0], form, edit)
    for number, job in enumerate(jobs):
        if number and edit.before_of_seed:
            row += _before(output, job, form, edit)[-edit.before_of_seed :]
        results = _stored(output, job, form, edit)
        row.append(previews(form, results, [job] * len(results), edit))
    return torch.cat(row)


def _stored(output: Path, job: EditJob, form: SampleFormat, edit: Edit) -> Tensor:
    """Return the images of a result, as stored, [N, C, *sizes]; UsageError names an invalid file."""
    files = files_of(output, job, form)
    if job.volume is not None and isinstance(form, Volume):
        return job.volume.read(files, form)[None]
    return read_stored(files, form, edit.results)


def _before(output: Path, job: EditJob, form: SampleFormat, edit: Edit) -> list[Tensor]:
    """Return the pictures to show before a result."""
    if isinstance(edit, Restoration):  # earlier versions stored other slices of volumes
        images = to_model_range(job.inputs[0][None])
        shown = edit.of([job.place]).before(images)
        return [previews(form, form.quantize(each), [job], edit) for each in shown]
    stored = sorted((output / "before").glob(f"{glob.escape(job.name)}.?.png"))
    return [read_images([file]) for file in stored]


def _captions(
    config: EditConfig, trained: LoadedModel, edit: Edit, first: Sequence[EditJob], columns: int
) -> Captions:
    """Return the words of the picture of before and after.

    Args:
        config: configuration of the edit.
        trained: the model.
        edit: the edit.
        first: the first job of each row.
        columns: number of images in a row.
    """
    rows = [job.name.removesuffix("_0") if config.variations > 1 else job.name for job in first[:SHOWN]]
    title = [config.edit_name.replace("_", " ")]
    if config.restoration is not None:
        title.append(class_name(config.restoration))
    if isinstance(edit, Attribute) and edit.to is not None:
        title.append(wanted_name(edit.to, trained.model))
    labels = trained.row_names
    if labels is not None and trained.chosen:
        if len(labels) == 1:
            title.append(f"label {labels[0]}" if trained.rows is None else labels[0])
        else:
            rows = [
                f"{name}, {labels[job.place % len(labels)]}" for name, job in zip(rows, first, strict=False)
            ]
    if edit.results_each > 1:
        after = _series(edit.results_each) * config.variations
    elif config.variations == 1:
        after = ["result"]
    else:
        own = edit.before_names[len(edit.before_names) - edit.before_of_seed :]
        after = ["result 1"]
        for number in range(2, config.variations + 1):
            after += [*own, f"result {number}"]
    if isinstance(edit, Anomaly):
        after += ["map"] if edit.truth is None else ["map", "truth"]
    unnamed_columns = [""] * (columns - len(after))
    before = [*unnamed_columns, *edit.before_names][len(edit.before_names) :]
    return Captions(rows, [*before, *after], "", ", ".join(title))


def _series(count: int) -> list[str]:
    """Return the places of a series between its ends, from 0 to 1."""
    return [f"{number / (count - 1):.2g}" for number in range(count)]

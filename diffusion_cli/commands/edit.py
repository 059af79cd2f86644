"""`diffuse edit`: edit images with a trained model, with a picture of before and after."""

import glob
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.batch_size import advise_batch_size
from diffusion_cli.captions import Captions
from diffusion_cli.commands.edit_checks import (
    check_count,
    check_edit,
    check_seeds,
    check_shapes,
    check_split,
    with_condition_image,
)
from diffusion_cli.commands.edit_conditions import (
    condition_names,
    conditioned,
    has_own_conditions,
    wanted_name,
)
from diffusion_cli.commands.inputs import (
    Complete,
    Input,
    conditioned_images,
    read_input,
    real_images,
    shortened,
)
from diffusion_cli.commands.masks import completion, read_masks
from diffusion_cli.commands.outputs import claim, keep_results, named_folder, read_manifest
from diffusion_cli.commands.trained import LoadedModel, open_run
from diffusion_cli.conditions.rows import TEXT
from diffusion_cli.config import EditConfig, build, fingerprint
from diffusion_cli.data import to_model_range
from diffusion_cli.data.conditioned import text_conditioned
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.editing import (
    Attribute,
    Edit,
    EditProcess,
    EditResult,
    RePaint,
    Restoration,
    RestorationMethod,
)
from diffusion_cli.errors import counted
from diffusion_cli.formats import Completed, HighDepthImage, Original, SampleFormat, ValueFormat
from diffusion_cli.generate import NFECounter, SeededNoise, check_finite, guided, rows_in_turn
from diffusion_cli.images import (
    PLAIN,
    Writer,
    read_images,
    read_stored,
    save_completed,
    save_gif,
    save_png,
    save_rows,
    save_stored,
)
from diffusion_cli.runs.manifest import MANIFEST
from diffusion_cli.runs.schema import check_dataset
from diffusion_cli.runs.texts import load_text_encoder
from diffusion_cli.samplers import Advance, unreported
from diffusion_cli.system.own_folder import own_folder
from diffusion_cli.system.precision import autocast
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.tensors import digest
from diffusion_cli.system.trusted_paths import unnamed

SHOWN = 10  # most rows of grid.png


class EditJob(NamedTuple):
    """One edit, which gives one image or one series."""

    name: str
    """Name of the file, or of the folder of the series."""
    seed: int
    place: int
    """Index of the input; labels are assigned in turn by this index."""
    inputs: list[Tensor]
    """Images as stored, [C, H, W], or noise."""
    form: SampleFormat
    """Format of the file, including the spatial metadata of the input."""
    original: Original | None = None
    """Values of the input's file that the result keeps where they are known; None if those of `inputs` are the same."""


class EditPlan(NamedTuple):
    """Results of an edit, and their folder."""

    jobs: list[EditJob]
    settings: dict[str, Any]
    """Settings of the manifest."""
    output: Path

    @property
    def begun(self) -> bool:
        """Whether the folder has results of the same inputs, with the same names."""
        if not (self.output / MANIFEST).is_file():
            return False
        return read_manifest(self.output)["settings"].get("inputs") == self.settings["inputs"]


def run(config: EditConfig) -> None:
    """Compute the missing results; write them, a picture of the first ones, and the manifest."""
    with advise_batch_size(config.batch_size, config.device):
        _run(config)


def _run(config: EditConfig) -> None:
    trained = open_run(config.sampling)
    edit, method = _parts(config, trained)
    edit, given = _inputs(config, trained, edit)
    if edit.mask_path is not None:
        edit = edit.masked(read_masks(edit.mask_path, given, edit.results[1:]))
    edit, trained = conditioned(edit, trained, given, config.input)
    form = trained.model.info.form
    plan = _plan(config, trained, edit, given)
    if any(item.former_name for item in given):
        former = [item._replace(name=item.former_name or item.name) for item in given]
        earlier = _plan(config, trained, edit, former)
        plan = earlier if earlier.begun else plan
    jobs, settings, output = plan
    manifest = claim(output, settings, trained.model)
    results: dict[str, dict[str, float]] = manifest.get("results", {})
    todo = [
        job for job in jobs if job.name not in results or len(_files(output, job, form)) < edit.results_each
    ]
    if 0 < len(todo) < len(jobs):
        print(
            f"{output} has {len(jobs) - len(todo)} of {len(jobs)} results; computing the rest",
            file=sys.stderr,
        )

    try:
        most_calls = _make(config, trained, edit, method, todo, output=output, results=results)
    except KeyboardInterrupt:
        done = sum(job.name in results for job in jobs)
        print(f"\n{output} has {done} of {len(jobs)} results", file=sys.stderr)
        raise
    grid = output / "grid.png"
    rows = [
        _row(output, jobs[at : at + config.variations], form, edit)
        for at in range(0, len(jobs), config.variations)[:SHOWN]
    ]
    most = max(map(len, rows), default=0)
    captions = _captions(config, trained, edit, jobs[:: config.variations], most)
    # Results stay below each other, also if an input has no picture of its own size.
    rows = [torch.cat([row.new_full((most - len(row), *row.shape[1:]), 255), row]) for row in rows]
    save_rows(rows, grid, captions if config.captions else PLAIN)
    frames = f"{edit.results_each} frames in " if edit.results_each > 1 else ""
    calls = f", {frames}at most {counted(most_calls, 'network call')} each{_passes(trained, method)}"
    inputs = len(jobs) // config.variations
    first = f" (first {SHOWN} of {inputs})" if inputs > SHOWN else ""
    print(
        f"{counted(len(jobs), 'result')} of {config.edit_name}{calls if todo else ' already there'}, in {output}"
        f"{_summary(results, jobs, form)}{_clipping(given, edit)}\nBefore and after: {grid}{first}"
    )


def _plan(config: EditConfig, trained: LoadedModel, edit: Edit, given: list[Input]) -> EditPlan:
    """Return the results of an edit of inputs, with their folder and its settings."""
    form = trained.model.info.form
    jobs = _jobs(config, edit, given, form)
    settings = {
        **trained.record,
        "edit": config.edit,
        "restoration": config.restoration,
        "seed": config.seed,
        "variations": config.variations,
        "read_sha256": {key: digest({key: value}) for key, value in edit.content().items()},
        "inputs": [[item.name, _input_digest(item, edit)] for item in given],
    }
    if forms := {job.name: job.form.to_dict() for job in jobs if job.form != form}:
        settings["forms"] = forms
    if config.output:
        return EditPlan(jobs, settings, named_folder(config.output))
    name = f"{config.edit_name}-{fingerprint(settings)}"
    return EditPlan(jobs, settings, own_folder(trained.folder, "edits", name))


def _input_digest(item: Input, edit: Edit) -> str:
    """Return the SHA-256 of the content of an input on which its results depend."""
    content = {"pixels": item.pixels}
    if item.original is not None and edit.known is not None:
        content["values"] = torch.from_numpy(item.original.values)
    return digest(content)


def _passes(trained: LoadedModel, method: RestorationMethod | None) -> str:
    """Return why there are more network calls than steps, if RePaint repeats the steps."""
    if not isinstance(method, RePaint) or method.num_resamples == 1:
        return ""
    return f" (steps={trained.steps}, restoration.num_resamples={method.num_resamples})"


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
        title.append(config.restoration["_target_"].rpartition(".")[2])
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
        after = [f"result {number}" for number in range(1, config.variations + 1)]
    unnamed_columns = [""] * (columns - len(after))
    before = [*unnamed_columns, *edit.before_names][len(edit.before_names) :]
    return Captions(rows, [*before, *after], "", ", ".join(title))


def _series(count: int) -> list[str]:
    """Return the places of a series between its ends, from 0 to 1."""
    return [f"{number / (count - 1):.2g}" for number in range(count)]


def edited(
    config: EditConfig, trained: LoadedModel, inputs: list[Input] | None, mask: Tensor | None
) -> Tensor:
    """Edit images in memory and return the results in their order, as stored, [B, N, *shape].

    Args:
        config: configuration of the edit.
        trained: model with its sampler, guidance and labels.
        inputs: images; None for an edit that starts from seeds.
        mask: regions to paint, bool [1 or N, 1, *sizes]; None for the mask of the configuration.

    Raises:
        UsageError: for images with another shape than the edit accepts.
    """
    edit, method = _parts(config, trained)
    if inputs is not None:
        check_shapes(inputs, edit)
        check_count(len(inputs), edit, config.edit_name)
    if inputs is None:
        edit, given = _inputs(config, trained, edit)
    else:
        edit, given = edit.sized(tuple(inputs[0].pixels.shape)), inputs
    if edit.mask_path is not None:
        edit = edit.masked(read_masks(edit.mask_path, given, edit.results[1:]) if mask is None else mask)
    edit, trained = conditioned(edit, trained, given, None)
    form = trained.model.info.form
    jobs = _jobs(config, edit, given, form)
    size = _batch_size(trained, edit, method, len(jobs))
    return torch.cat(
        [
            form.quantize(_edit(trained, edit, method, jobs[first : first + size]).images).cpu()
            for first in range(0, len(jobs), size)
        ]
    )


def _parts(config: EditConfig, trained: LoadedModel) -> tuple[Edit, RestorationMethod | None]:
    """Build the edit and its restoration; UsageError if they are incompatible with each other or the model."""
    trained.check()
    edit = with_condition_image(build(config.edit, trained.model.shape), trained, config.edit_name)
    method: RestorationMethod | None = None if config.restoration is None else build(config.restoration)
    check_edit(config, trained, edit, method)
    return edit, method


def _inputs(config: EditConfig, trained: LoadedModel, edit: Edit) -> tuple[Edit, list[Input]]:
    """Return the edit for the inputs, and the inputs."""
    if edit.seeds is not None:
        noise = SeededNoise(
            edit.seeds, trained.model.space.shape_of(edit.results), torch.device("cpu")
        ).noise()
        return edit, [Input(f"seed_{seed}", image) for seed, image in zip(edit.seeds, noise, strict=True)]
    if config.input in ("val", "train"):
        check_split(config.input)
        dataset = trained.dataset(config.data_dir, config.data_paths)
        if edit.takes_condition_image:
            given = conditioned_images(dataset, config.input, config.num_images)
            edit = edit.of_rows()
        else:
            names = condition_names(trained.model) if has_own_conditions(edit, trained) else ()
            if TEXT in names:
                dataset = text_conditioned(dataset, load_text_encoder(trained.model.info, trained.device))
            given = real_images(dataset, config.input, config.num_images, names)
    else:
        assert config.input is not None
        given = read_input(
            config.input,
            list(edit.accepts()) if config.fit else edit.accepts(),
            config.fit,
            config.num_images,
            trained.model.info.form,
            mask_path=edit.mask_path,
            complete=_completion(config, trained),
        )
    check_count(len(given), edit, config.edit_name)
    return edit.sized(tuple(given[0].pixels.shape)), given


def _completion(config: EditConfig, trained: LoadedModel) -> Complete | None:
    """Return the reader of photos and their masks for a model with a channel of masks, or None for others."""
    info, shape = trained.model.info, trained.model.shape
    node = info.config.dataset or {}
    if node.get("masks") is None or not isinstance(info.form, HighDepthImage) or check_dataset(node, shape):
        return None
    path = config.dataset.masks or (None if "masks" in unnamed(node) else node["masks"])
    return completion(path, node, info.data_rules, info.form, shape, config.fit)


def _jobs(config: EditConfig, edit: Edit, given: Sequence[Input], form: SampleFormat) -> list[EditJob]:
    jobs: list[EditJob] = []
    for at in range(0, len(given), edit.inputs_each):
        some = given[at : at + edit.inputs_each]
        place, inputs = at // edit.inputs_each, [item.pixels for item in some]
        own = some[0].form if len(some) == 1 and inputs[0].shape == edit.results else None
        for variation in range(config.variations):
            name = shortened("-".join(item.name for item in some))
            name += f"_{variation}" if config.variations > 1 else ""
            original = None if edit.known is None else some[0].original
            jobs.append(EditJob(name, config.seed + len(jobs), place, inputs, own or form, original))
    check_seeds(config.seed, len(jobs))
    times = Counter(job.name for job in jobs)  # different inputs can give the same joined name
    return [
        job if times[job.name] == 1 else job._replace(name=f"{number:05d}_{job.name}")
        for number, job in enumerate(jobs)
    ]


def _make(
    config: EditConfig,
    trained: LoadedModel,
    edit: Edit,
    method: RestorationMethod | None,
    todo: list[EditJob],
    *,
    output: Path,
    results: dict[str, dict[str, float]],
) -> int:
    """Compute and write the results `todo`, add their errors to `results`, and return the network calls of each."""
    most_calls, form = 0, trained.model.info.form
    batch_size = _batch_size(trained, edit, method, len(todo))

    def keep(
        batch: list[EditJob], images: Tensor, before: list[Tensor], made: dict[str, dict[str, float]]
    ) -> None:
        completed = _completed(batch, images, edit)
        _save(output, batch, images, completed, before, form, captions=config.captions)
        made = {name: numbers | _errors(completed.get(name)) for name, numbers in made.items()}
        keep_results(output, made)
        results.update(made)

    with ProgressBar(total=len(todo), unit="image", desc=config.edit_name) as bar, Writer(2) as writer:
        for first in range(0, len(todo), batch_size):
            batch = todo[first : first + batch_size]
            calls = NFECounter(trained.model.denoiser, trained.guidance)
            with bar.batch(len(batch)) as advance:
                edited = _edit(trained, edit, method, batch, advance)
                most_calls = max(most_calls, calls.each(len(batch)))
                images = form.quantize(edited.images)
                before = [_pictures(form, form.quantize(each), batch, edit) for each in edited.before]
                writer(keep, batch, images.cpu(), before, _measured(batch, images, edited, form))
    return most_calls


def _batch_size(trained: LoadedModel, edit: Edit, method: RestorationMethod | None, count: int) -> int:
    """Return the batch size for `count` results."""
    images = math.ceil(math.prod(edit.results) / math.prod(trained.model.shape))
    each = edit.results_each * min(images, edit.most_at_once or images)
    return trained.batch_size(count, each, method is not None and method.differentiates)


def _edit(
    trained: LoadedModel,
    edit: Edit,
    method: RestorationMethod | None,
    batch: list[EditJob],
    advance: Advance = unreported,
) -> EditResult:
    """Edit a batch; `advance` takes each share of the work that is done."""
    model, device = trained.model, trained.device
    seeds = [job.seed for job in batch]

    process = EditProcess(
        trained.sampler,
        trained.times,
        rows_in_turn([job.place for job in batch], trained.condition, device),
        trained.denoise,
        lambda y: guided(model, NoGuidance(), y, trained.clip),
        method,
        SeededNoise(seeds, model.space.shape_of(edit.results), device).noise,
        model.space,
        lambda share: advance(share / edit.passes),
    )
    inputs = to_model_range(torch.stack([image for job in batch for image in job.inputs]).to(device))
    with torch.no_grad(), autocast(device, trained.precision):
        edited = edit.of([job.place for job in batch])(inputs, process)
    check_finite(edited.images if edited.found is None else edited.found)
    return edited


def _completed(batch: list[EditJob], images: Tensor, edit: Edit) -> dict[str, Completed]:
    """Return the results, [B, 1, C, *sizes] as stored, that keep known values of their files, by name."""
    known = edit.of([job.place for job in batch]).known
    if known is None:
        return {}
    regions = known.expand(len(batch), *known.shape[1:])
    return {
        job.name: job.form.completed(image, job.original, region)
        for job, image, region in zip(batch, images[:, 0], regions, strict=True)
        if job.original is not None and isinstance(job.form, ValueFormat)
    }


def _errors(completed: Completed | None) -> dict[str, float]:
    """Return the errors of a result with the known values of its file; empty without."""
    if completed is None:
        return {}
    errors = np.abs(completed.errors)
    return {"rmse": float(np.sqrt(np.square(errors).mean())), "largest": float(errors.max())}


def _pictures(form: SampleFormat, images: Tensor, batch: Sequence[EditJob], edit: Edit) -> Tensor:
    """Return previews of images [B, C, *sizes], as stored, of volumes through the centre of the painted region."""
    known = edit.of([job.place for job in batch]).known
    places = [None] * len(batch) if known is None else [_centre(~region[0]) for region in known]
    places = places * (len(batch) // len(places))
    return torch.cat(
        [form.slices(image[None], place) for image, place in zip(images, places, strict=True)]
    ).cpu()


def _centre(region: Tensor) -> list[int] | None:
    """Return a place in the middle of a region, bool [*sizes]: the median along each axis; None for an empty region."""
    found = [axis.sort().values for axis in region.nonzero(as_tuple=True)]
    return [int(axis[len(axis) // 2]) for axis in found] if len(found[0]) else None


def _files(output: Path, job: EditJob, form: SampleFormat) -> list[Path]:
    """Return the existing files of a result: one image, or a series."""
    single = output / f"{job.name}{form.suffix}"
    return [single] if single.is_file() else sorted((output / job.name).glob(f"[0-9]*{form.suffix}"))


def _save(
    output: Path,
    batch: list[EditJob],
    images: Tensor,
    completed: dict[str, Completed],
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
        if job.name in completed:
            save_completed(completed[job.name], file)
        elif len(images[row]) == 1:
            save_stored(images[row, 0], file, job.form)
        else:
            for place, image in enumerate(images[row]):
                save_stored(image, output / job.name / f"{place:03d}{form.suffix}", form)
            pictures = form.to_rgb(images[row])
            names = _series(len(pictures)) if captions else []
            save_rows([pictures], output / job.name / "strip.png", Captions(columns=names))
            save_gif(pictures, output / f"{job.name}.gif", names=names)


def _measured(
    batch: list[EditJob], images: Tensor, edited: EditResult, form: SampleFormat
) -> dict[str, dict[str, float]]:
    """Return the errors of the stored results, [B, N, C, H, W], in units of the files."""
    if edited.residual is None:
        return {job.name: {} for job in batch}
    levels = form.half_range * edited.residual(to_model_range(images[:, 0])).flatten(1)
    numbers = {"rmse": levels.square().mean(1).sqrt(), "largest": levels.abs().amax(1)}
    if edited.found is not None:
        numbers["rmse_sampled"] = (
            (form.half_range * edited.residual(edited.found)).flatten(1).square().mean(1).sqrt()
        )
    return {
        job.name: {name: float(values[row]) for name, values in numbers.items()}
        for row, job in enumerate(batch)
    }


def _row(output: Path, jobs: Sequence[EditJob], form: SampleFormat, edit: Edit) -> Tensor:
    """Return the pictures of one input, followed by its results."""
    files = [file for job in jobs for file in _files(output, job, form)]
    results = read_stored(files, form, edit.results)
    if isinstance(edit, Restoration):  # earlier versions stored other slices of volumes
        images = to_model_range(jobs[0].inputs[0][None])
        before = [
            _pictures(form, form.quantize(each), jobs[:1], edit)
            for each in edit.of([jobs[0].place]).before(images)
        ]
    else:
        stored = sorted((output / "before").glob(f"{glob.escape(jobs[0].name)}.?.png"))
        before = [read_images([file]) for file in stored]
    repeated = [jobs[0]] * len(results)
    return torch.cat([*before, _pictures(form, results, repeated, edit)])


def _clipping(given: Sequence[Input], edit: Edit) -> str:
    """Return a line that counts the values of inputs that were clipped to the range; empty without any."""
    counts = [item.clipped for item in given if edit.known is None or item.original is None]
    total = sum(count for count, _ in counts)
    if not total:
        return ""
    most = max(most for _, most in counts)
    return (
        f"\n{total} values of the inputs lie outside dataset.range and were clipped (by at most {most:.3g})"
    )


def _summary(results: dict[str, dict[str, float]], jobs: Sequence[EditJob], form: SampleFormat) -> str:
    numbers = [results[job.name] for job in jobs if results[job.name]]
    if not numbers:
        return ""

    def mean(name: str) -> float:
        return math.sqrt(sum(number[name] ** 2 for number in numbers) / len(numbers))

    rmse, largest = mean("rmse"), max(number["largest"] for number in numbers)
    ratio = f" (PSNR {20 * math.log10(2 * form.half_range / rmse):.1f} dB)" if rmse else ""
    line = f"\nError on the known values: root mean square {rmse:.3g}, "
    line += f"at most {largest:.3g} of {2 * form.half_range:g}{ratio}"
    if "rmse_sampled" in numbers[0]:
        line += f"; {mean('rmse_sampled'):.3g} as sampled, before the known values replaced the samples"
    return line

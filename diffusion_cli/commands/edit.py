"""`diffuse edit`: edit images with a trained model, with a picture of before and after."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusion_cli.batch_size import advise_batch_size
from diffusion_cli.commands.anomaly_maps import AnomalyMaps, save_scores, score_lines, scores_of
from diffusion_cli.commands.edit_batches import (
    PreparedEdit,
    completed,
    edited_batch,
    errors_of,
    measured,
)
from diffusion_cli.commands.edit_checks import (
    check_count,
    check_edit,
    check_measurement,
    check_shapes,
    with_condition_image,
)
from diffusion_cli.commands.edit_conditions import conditioned
from diffusion_cli.commands.edit_inputs import given_inputs
from diffusion_cli.commands.edit_jobs import EditJob, EditPlan, jobs_of, plan_of
from diffusion_cli.commands.edit_results import draw_before_and_after, files_of, previews, save_results
from diffusion_cli.commands.edit_volumes import VolumeResult
from diffusion_cli.commands.inputs import Input, show_remarks
from diffusion_cli.commands.masks import ANOMALOUS, PAINTED, read_masks
from diffusion_cli.commands.outputs import claim, keep_results
from diffusion_cli.commands.trained import LoadedModel, open_run
from diffusion_cli.config import EditConfig, build
from diffusion_cli.editing import Anomaly, Edit, Measurement, RestorationMethod
from diffusion_cli.errors import UsageError, counted
from diffusion_cli.formats import Completed, SampleFormat
from diffusion_cli.generate import NFECounter
from diffusion_cli.images import Writer
from diffusion_cli.system.progress import ProgressBar

Errors = dict[str, dict[str, float]]
"""Errors of results by the names of these."""


def run(config: EditConfig) -> None:
    """Compute the missing results; write them, a picture of the first ones, and the manifest."""
    with advise_batch_size(config.batch_size, config.device):
        _run(config)


def _run(config: EditConfig) -> None:
    trained = open_run(config.sampling)
    edit, method = _parts(config, trained)
    edit, given = given_inputs(config, trained, edit)
    if edit.mask_path is not None:
        use = ANOMALOUS if isinstance(edit, Anomaly) else PAINTED
        edit = edit.masked(read_masks(edit.mask_path, given, edit.results[1:], use))
    edit, trained = conditioned(edit, trained, given, config.input)
    plan = plan_of(config, trained, edit, given)
    results, calls = _computed(config, PreparedEdit(trained, edit, method), plan)
    found = _scores(config, edit, plan) if isinstance(edit, Anomaly) else ""
    picture = draw_before_and_after(config, trained, edit, plan.jobs, plan.output)
    print(
        f"{counted(len(plan.jobs), 'result')} of {config.edit_name}{calls}, in {plan.output}"
        f"{_summary(results, plan.jobs, trained.model.info.form)}{_clipping(given, edit)}{found}\n{picture}"
    )


def _scores(config: EditConfig, edit: Anomaly, plan: EditPlan) -> str:
    """Write the mean maps of an edit and their scores; return lines about them."""
    maps = AnomalyMaps(plan.output, plan.jobs, config.variations)
    places = [job.place for job in plan.jobs[:: config.variations]]
    means = maps.means()
    maps.save_means(means)
    scores = scores_of(means, places, edit.truth)
    save_scores(plan.output, scores)
    return f"\n{score_lines(scores, plan.output, len(edit.shape) - 1)}"


def _computed(config: EditConfig, prepared: PreparedEdit, plan: EditPlan) -> tuple[Errors, str]:
    """Compute the missing results; return the errors of all, and words about their network calls."""
    jobs, settings, output = plan
    manifest = claim(output, settings, prepared.trained.model)
    results: Errors = manifest.get("results", {})
    each = prepared.edit.results_each
    maps = AnomalyMaps(output, jobs, config.variations) if isinstance(prepared.edit, Anomaly) else None
    todo = [
        job
        for job in jobs
        if job.name not in results
        or len(files_of(output, job, prepared.form)) < (1 if job.volume else each)
        or (maps is not None and not maps.file(job).is_file())
    ]
    if 0 < len(todo) < len(jobs):
        there = len(jobs) - len(todo)
        print(f"{output} has {there} of {len(jobs)} results; computing the rest", file=sys.stderr)
    try:
        most_calls = _make(config, prepared, todo, output, results)
    except KeyboardInterrupt:
        done = sum(job.name in results for job in jobs)
        print(f"\n{output} has {done} of {len(jobs)} results", file=sys.stderr)
        raise
    if not todo:
        return results, " already there"
    frames = f"{each} frames in " if each > 1 else ""
    return results, f", {frames}at most {counted(most_calls, 'network call')} each{prepared.passes()}"


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
        edit, given = given_inputs(config, trained, edit)
    else:
        edit, given = edit.sized(tuple(inputs[0].pixels.shape)), inputs
    if isinstance(edit, Anomaly) and edit.mask_path is not None:
        raise UsageError("edit.truth", edit.mask_path, "scores results of diffuse edit", "leave it out")
    if edit.mask_path is not None:
        edit = edit.masked(read_masks(edit.mask_path, given, edit.results[1:]) if mask is None else mask)
    edit, trained = conditioned(edit, trained, given, None)
    form = trained.model.info.form
    jobs = jobs_of(config, edit, given, form)
    prepared = PreparedEdit(trained, edit, method)
    size = prepared.batch_size(len(jobs))
    return torch.cat(
        [
            form.quantize(edited_batch(prepared, jobs[first : first + size]).images).cpu()
            for first in range(0, len(jobs), size)
        ]
    )


def _parts(config: EditConfig, trained: LoadedModel) -> tuple[Edit, RestorationMethod | None]:
    """Build the edit and its restoration; UsageError if they are incompatible with each other or the model."""
    trained.check()
    edit: Edit = build(config.edit, trained.model.shape)
    edit = with_condition_image(edit, trained, config.edit_name, of_images=config.sampling.of_images)
    method: RestorationMethod | None = None if config.restoration is None else build(config.restoration)
    check_edit(config, trained, edit, method)
    if edit.measures:
        measurement: Measurement = build(config.measurement, trained.model.shape)
        check_measurement(measurement, edit, method)
        edit = edit.measured_by(measurement)
    return edit, method


def _make(
    config: EditConfig, prepared: PreparedEdit, todo: list[EditJob], output: Path, results: Errors
) -> int:
    """Compute and write the results `todo`, add their errors to `results`, and return the network calls of each."""
    (trained, edit, _), form, most_calls = prepared, prepared.form, 0
    batch_size = prepared.batch_size(len(todo))
    files = AnomalyMaps(output, todo, config.variations)

    def keep(
        batch: list[EditJob], images: Tensor, before: list[Tensor], made: Errors, maps: Tensor | None
    ) -> None:
        whole = completed(batch, images, edit, config.edit_name)
        show_remarks(_beyond_storage(whole))
        save_results(output, batch, images, whole, before, form, captions=config.captions)
        if maps is not None:
            files.save(batch, maps)
        made = {name: numbers | errors_of(whole.get(name)) for name, numbers in made.items()}
        keep_results(output, made)
        results.update(made)

    with ProgressBar(total=len(todo), unit="image", desc=config.edit_name) as bar, Writer(2) as writer:
        for first in range(0, len(todo), batch_size):
            batch = todo[first : first + batch_size]
            calls = NFECounter(trained.model.denoiser, trained.guidance)
            with bar.batch(len(batch)) as advance:
                edited = edited_batch(prepared, batch, advance)
                most_calls = max(most_calls, calls.each(len(batch)))
                images = form.quantize(edited.images)
                before = [previews(form, form.quantize(each), batch, edit) for each in edited.before]
                maps = None if edited.maps is None else edited.maps.cpu()
                writer(keep, batch, images.cpu(), before, measured(batch, images, edited, form), maps)
    return most_calls


def _beyond_storage(results: Mapping[str, Completed | VolumeResult]) -> list[str]:
    """Return remarks about values that the files of volumes cannot store."""
    return [
        f"{name}: {counted(result.clipped, 'value')} beyond the numbers that its file can store, set to the nearest"
        for name, result in results.items()
        if isinstance(result, VolumeResult) and result.clipped
    ]


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

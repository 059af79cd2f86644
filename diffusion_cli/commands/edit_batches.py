"""Batches of an edit: how they are computed, and how far the results are from known values."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.commands.edit_jobs import EditJob
from diffusion_cli.commands.edit_volumes import VolumeResult
from diffusion_cli.commands.trained import LoadedModel
from diffusion_cli.data import to_model_range
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.editing import Edit, EditProcess, EditResult, RePaint, RestorationMethod
from diffusion_cli.formats import Completed, SampleFormat, ValueFormat, Volume
from diffusion_cli.generate import SeededNoise, check_finite, guided, rows_in_turn
from diffusion_cli.samplers import Advance, unreported
from diffusion_cli.system.precision import autocast
from diffusion_cli.system.seeding import mix


class PreparedEdit(NamedTuple):
    """An edit with all that its results depend on, apart from inputs and seeds."""

    trained: LoadedModel
    """Model with its sampler, guidance and conditions."""
    edit: Edit
    method: RestorationMethod | None
    """Restoration; None for an edit without."""

    @property
    def form(self) -> SampleFormat:
        """Format of the model's images."""
        return self.trained.model.info.form

    def batch_size(self, count: int) -> int:
        """Return the batch size for `count` results."""
        trained, edit, method = self
        images = math.ceil(math.prod(edit.results) / math.prod(trained.model.shape))
        each = edit.results_each * min(images, edit.most_at_once or images)
        return trained.batch_size(count, each, method is not None and method.differentiates)

    def passes(self) -> str:
        """Return why there are more network calls than steps, if RePaint repeats the steps."""
        if not isinstance(self.method, RePaint) or self.method.num_resamples == 1:
            return ""
        return f" (steps={self.trained.steps}, restoration.num_resamples={self.method.num_resamples})"


def edited_batch(prepared: PreparedEdit, batch: list[EditJob], advance: Advance = unreported) -> EditResult:
    """Edit a batch; `advance` takes each share of the work that is done."""
    trained, edit, method = prepared
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
        # The seed of a result is that of its noise, on which a condition image must not depend.
        [mix(seed, "derived image") for seed in seeds],
        [job.input_seed for job in batch],
    )
    inputs = to_model_range(torch.stack([image for job in batch for image in job.inputs]).to(device))
    with torch.no_grad(), autocast(device, trained.precision):
        edited = edit.of([job.place for job in batch])(inputs, process)
    check_finite(edited.images if edited.found is None else edited.found)
    return edited


def completed(
    batch: list[EditJob], images: Tensor, edit: Edit, name: str
) -> dict[str, Completed | VolumeResult]:
    """Return the results that keep known values of their files, or the geometry of these, by name.

    Args:
        batch: the edits.
        images: their results, [B, 1, C, *sizes] as stored.
        edit: the edit.
        name: name of the edit.
    """
    known = edit.of([job.place for job in batch]).known
    regions = [None] * len(batch) if known is None else known.expand(len(batch), *known.shape[1:])
    found: dict[str, Completed | VolumeResult] = {}
    for job, image, region in zip(batch, images[:, 0], regions, strict=True):
        if job.volume is not None and isinstance(job.form, Volume):
            found[job.name] = job.volume.result(job.form, image, region, f"edit={name}")
        elif region is not None and job.original is not None and isinstance(job.form, ValueFormat):
            found[job.name] = job.form.completed(image, job.original, region)
    return found


def errors_of(completed: Completed | VolumeResult | None) -> dict[str, float]:
    """Return the errors of a result with the known values of its file; empty without."""
    if completed is None or completed.errors is None:
        return {}
    errors = np.abs(completed.errors)
    return {"rmse": float(np.sqrt(np.square(errors).mean())), "largest": float(errors.max())}


def measured(
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

"""Maps of `diffuse edit edit=anomaly`: their files, their scores by masks of the truth, and their pictures."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.commands.edit_jobs import EditJob
from diffusion_cli.commands.masks import ELEMENTS
from diffusion_cli.editing import Anomaly
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.formats import HighDepthImage, SampleFormat, Volume
from diffusion_cli.formats.signal import read_signal
from diffusion_cli.formats.volume import read_volume
from diffusion_cli.metrics.detection import Detection, detection
from diffusion_cli.system.files import atomic_write, write_npy
from diffusion_cli.system.untrusted import read, reason

SCORES = "scores.json"


class AnomalyMaps(NamedTuple):
    """The maps of an edit in its folder: one per result, and their mean per input."""

    output: Path
    jobs: Sequence[EditJob]
    """All results, with the variations of an input after each other."""
    variations: int

    def file(self, job: EditJob) -> Path:
        """Return the file of the map of a result."""
        folder = self.output / "maps" / ("variations" if self.variations > 1 else "")
        return folder / f"{job.name}{_suffix(job.form)}"

    def inputs(self) -> list[tuple[str, list[EditJob]]]:
        """Return the name of each input, and its results."""
        groups = [[*self.jobs[at : at + self.variations]] for at in range(0, len(self.jobs), self.variations)]
        return [
            (jobs[0].name.removesuffix("_0") if self.variations > 1 else jobs[0].name, jobs)
            for jobs in groups
        ]

    def save(self, batch: Sequence[EditJob], maps: Tensor) -> None:
        """Write the maps of a batch of results, [B, *sizes] in units of x."""
        for job, values in zip(batch, maps, strict=True):
            _write(self.file(job), job.form.half_range * values.double().numpy(), job)

    def means(self) -> dict[str, np.ndarray]:
        """Return the mean map of each input by name, float32 [*sizes] in units of the files.

        Raises UsageError that names an invalid file.
        """
        found: dict[str, np.ndarray] = {}
        for name, jobs in self.inputs():
            values = [_read(self.file(job), tuple(job.inputs[0].shape[1:])) for job in jobs]
            found[name] = np.stack(values).mean(0, dtype=np.float64).astype(np.float32)
        return found

    def save_means(self, means: dict[str, np.ndarray]) -> None:
        """Write the mean maps of the inputs, unless an input has a single map."""
        if self.variations > 1:
            for name, jobs in self.inputs():
                _write(self.output / "maps" / f"{name}{_suffix(jobs[0].form)}", means[name], jobs[0])


def scores_of(maps: dict[str, np.ndarray], places: Sequence[int], truth: Tensor | None) -> dict[str, Any]:
    """Return the largest and the mean value of each map, and with the truth how well maps find anomalies.

    Args:
        maps: map of each input by name.
        places: index of each input in the truth.
        truth: bool [1 or N, 1, *sizes], or None.
    """
    each: dict[str, dict[str, float]] = {
        name: {"largest": float(values.max()), "mean": float(values.mean(dtype=np.float64))}
        for name, values in maps.items()
    }
    found: dict[str, Any] = {"inputs": each}
    if truth is None:
        return found
    regions = truth[[place if len(truth) > 1 else 0 for place in places], 0]
    found["pixels"] = detection(torch.from_numpy(np.stack([*maps.values()])), regions)._asdict()
    for name, region in zip(maps, regions, strict=True):
        each[name]["anomalous"] = float(region.double().mean())
    marked = regions.flatten(1).any(1)
    if not marked.all():
        largest = torch.tensor([numbers["largest"] for numbers in each.values()])
        found["images"] = detection(largest, marked)._asdict()
    return found


def save_scores(output: Path, scores: dict[str, Any]) -> None:
    """Write scores as JSON, atomically."""
    with atomic_write(output / SCORES) as temporary:
        temporary.write_text(json.dumps(scores, indent=2), encoding="utf-8")


def score_lines(scores: dict[str, Any], output: Path, dimensions: int) -> str:
    """Return lines that name the files of the maps, and the scores of maps with this number of axes."""
    lines = [f"Anomaly maps: {output / 'maps'}; largest and mean value of each: {output / SCORES}"]
    for key, noun in (("pixels", ELEMENTS[dimensions]), ("images", "inputs by the largest value")):
        if key in scores:
            found = Detection(**scores[key])
            lines.append(
                f"Scores of {noun}: AUROC {found.auroc:.3f}, average precision {found.average_precision:.3f} "
                f"(by chance {found.anomalous:.3g}), best Dice {found.best_dice:.3f} at threshold "
                f"{found.best_threshold:.4g}, chosen on these masks"
            )
    return "\n".join(lines)


def rows_with_maps(
    jobs: Sequence[EditJob], results: Sequence[Tensor], maps: Sequence[np.ndarray], edit: Anomaly
) -> list[Tensor]:
    """Return rows of previews: an input, its results, their map, and the truth if it is known.

    All maps have one scale, from 0 to their largest value. Volumes show slices through the middle of the true anomaly,
    or through the largest value of the map.

    Args:
        jobs: the first result of each input.
        results: results of each input, [N, C, *sizes] as stored.
        maps: map of each input, [*sizes].
        edit: the edit.
    """
    most = max((float(values.max()) for values in maps), default=0.0) or 1.0
    rows = []
    for job, made, values in zip(jobs, results, maps, strict=True):
        found = torch.from_numpy(values)
        shown = [2 * found / most - 1]
        place = [int(at) for at in np.unravel_index(int(values.argmax()), values.shape)]
        if edit.truth is not None:
            region = edit.truth[job.place if len(edit.truth) > 1 else 0, 0]
            shown.append(2 * region.float() - 1)
            place = middle_of(region) or place
        pictures = [_as_sample(each, job.inputs[0], job.form) for each in shown]
        stored = [job.inputs[0][None], made, *(job.form.quantize(each[None]) for each in pictures)]
        rows.append(torch.cat([job.form.slices(each, place) for each in stored]))
    return rows


def middle_of(region: Tensor) -> list[int] | None:
    """Return a place in the middle of a region, bool [*sizes]: the median along each axis; None for an empty region."""
    found = [axis.sort().values for axis in region.nonzero(as_tuple=True)]
    return [int(axis[len(axis) // 2]) for axis in found] if len(found[0]) else None


def _as_sample(values: Tensor, sample: Tensor, form: SampleFormat) -> Tensor:
    """Return a map in [-1, 1] with the channels of a sample, opaque if these have opacity."""
    picture = values.expand(sample.shape).clone()
    if isinstance(form, HighDepthImage) and form.mode is not None:
        picture[-1] = 1
    return picture


def _suffix(form: SampleFormat) -> str:
    return form.suffix if isinstance(form, Volume) else ".npy"


def _write(path: Path, values: np.ndarray, job: EditJob) -> None:
    """Write a map as float32, atomically; of volumes in the axes of their file, or in the voxels of the model."""
    form, volume = job.form, job.volume
    with atomic_write(path) as temporary:
        if isinstance(form, Volume):
            plain = replace(form, dtype="float32", slope=1.0, inter=0.0)
            if volume is not None and volume.place is None:
                plain.write_in(volume.axes, values[None].astype(np.float64), temporary)
            else:
                plain.write_values(values[None].astype(np.float64), temporary)
        else:
            write_npy(temporary, values.astype(np.float32))


def _read(path: Path, sizes: tuple[int, ...]) -> np.ndarray:
    """Return a written map; UsageError that names an invalid file."""
    data = read(path)
    try:
        values = read_volume(data).values[0] if len(sizes) == 3 else read_signal(data).values
        values = values[0] if len(sizes) == 1 else values
        if values.shape != sizes:
            raise FormatError(f"has shape {values.shape}; expected {sizes}")
    except ValueError as error:
        raise UsageError(path, NO_VALUE, reason(error), "move it away to create it again") from error
    return values.astype(np.float32)

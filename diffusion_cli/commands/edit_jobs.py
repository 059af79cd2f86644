"""Results that an edit has to compute: their inputs, names, seeds and settings."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_cli.commands.edit_checks import check_seeds
from diffusion_cli.commands.edit_volumes import InputVolume
from diffusion_cli.commands.inputs import Input, shortened
from diffusion_cli.commands.outputs import named_folder, read_manifest
from diffusion_cli.commands.trained import LoadedModel
from diffusion_cli.config import EditConfig, fingerprint
from diffusion_cli.editing import Edit
from diffusion_cli.formats import Original, SampleFormat
from diffusion_cli.runs.manifest import MANIFEST
from diffusion_cli.system.own_folder import own_folder
from diffusion_cli.system.seeding import mix
from diffusion_cli.system.tensors import digest

GEOMETRY = "geometry"
"""Setting of the manifest of results in the geometry of their input files."""


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
    input_seed: int = 0
    """Seed of the input, the same for all variations."""
    volume: InputVolume | None = None
    """File of an input volume, in whose geometry the result is written; None: in that of `form`."""


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
        before = read_manifest(self.output)["settings"]
        return all(before.get(key) == self.settings.get(key) for key in ("inputs", GEOMETRY))


def plan_of(config: EditConfig, trained: LoadedModel, edit: Edit, given: list[Input]) -> EditPlan:
    """Return the results of an edit of inputs, as an earlier version began them if the folder has such results."""
    choices = [given]
    if any(item.volume for item in given):
        choices.append([item._replace(volume=None) for item in given])
    if any(item.former_name for item in given):
        choices += [
            [item._replace(name=item.former_name or item.name) for item in items] for items in [*choices]
        ]
    plans = [_plan(config, trained, edit, items) for items in choices]
    return next((plan for plan in plans if plan.begun), plans[0])


def _plan(config: EditConfig, trained: LoadedModel, edit: Edit, given: list[Input]) -> EditPlan:
    """Return the results of an edit of inputs, with their folder and its settings."""
    form = trained.model.info.form
    jobs = jobs_of(config, edit, given, form)
    settings = {
        **trained.record,
        "edit": {key: value for key, value in config.edit.items() if key not in edit.unrecorded},
        "restoration": config.restoration,
        "seed": config.seed,
        "variations": config.variations,
        "read_sha256": {key: digest({key: value}) for key, value in edit.content().items()},
        "inputs": [[item.name, _input_digest(item, edit)] for item in given],
    }
    if config.measurement is not None:  # earlier versions recorded nothing
        settings["measurement"] = config.measurement
    if forms := {job.name: job.form.to_dict() for job in jobs if job.form != form}:
        settings["forms"] = forms
    # Earlier versions wrote volumes in the voxels of the model.
    if files := {job.name: job.volume.sha256 for job in jobs if job.volume}:
        settings[GEOMETRY] = files
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


def jobs_of(config: EditConfig, edit: Edit, given: Sequence[Input], form: SampleFormat) -> list[EditJob]:
    """Return the results of an edit of inputs, with different names and consecutive seeds."""
    jobs: list[EditJob] = []
    for at in range(0, len(given), edit.inputs_each):
        some = given[at : at + edit.inputs_each]
        place, inputs = at // edit.inputs_each, [item.pixels for item in some]
        own = some[0].form if len(some) == 1 and inputs[0].shape == edit.results else None
        single = len(some) == 1 and inputs[0].shape == edit.results and edit.results_each == 1
        # A translation may have another modality than its input.
        volume = some[0].volume if single and not edit.takes_condition_image else None
        for variation in range(config.variations):
            name = shortened("-".join(item.name for item in some))
            name += f"_{variation}" if config.variations > 1 else ""
            original = None if edit.known is None else some[0].original
            seed, input_seed = config.seed + len(jobs), mix(config.seed, place, "input")
            jobs.append(EditJob(name, seed, place, inputs, own or form, original, input_seed, volume))
    check_seeds(config.seed, len(jobs))
    times = Counter(job.name for job in jobs)  # different inputs can give the same joined name
    return [
        job if times[job.name] == 1 else job._replace(name=f"{number:05d}_{job.name}")
        for number, job in enumerate(jobs)
    ]

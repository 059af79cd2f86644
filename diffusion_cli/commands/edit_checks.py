"""Checks of `diffuse edit` before it computes anything: options, inputs and seeds."""

from collections.abc import Sequence
from pathlib import Path

from diffusion_cli.commands.condition_values import never_left_out
from diffusion_cli.commands.edit_conditions import check_attributes
from diffusion_cli.commands.guides import other_space
from diffusion_cli.commands.inputs import Input, show_remarks
from diffusion_cli.commands.sample_conditions import condition_image
from diffusion_cli.commands.trained import LoadedModel
from diffusion_cli.conditions.condition import IMAGE
from diffusion_cli.config import EditConfig
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.diffusion.latents import Latents
from diffusion_cli.editing import (
    Anomaly,
    Edit,
    LargerShapes,
    LinearMeasurement,
    LinearOperator,
    Measurement,
    RestorationMethod,
)
from diffusion_cli.editing.restore import described
from diffusion_cli.errors import NO_VALUE, UsageError


def with_condition_image(edit: Edit, trained: LoadedModel, name: str, *, of_images: bool) -> Edit:
    """Return the edit for the condition image of the model, if it takes one.

    Args:
        edit: the edit.
        trained: the model.
        name: name of the edit.
        of_images: whether the inputs have conditions of their own.

    Raises:
        UsageError: the edit needs a model with a condition image, or the model always had one in training.
    """
    channels, node = trained.model.denoiser.conditions.image, trained.model.info.config.condition
    if not edit.takes_condition_image:
        if channels is not None and trained.model.info.label_dropout == 0:
            problem = "the model was never trained without a condition image (objective.label_dropout=0)"
            raise UsageError("edit", name, problem, "use edit=translate")
        return edit
    if channels is None or node is None:
        problem = "the model has no condition image"
        raise UsageError("edit", name, problem, "use a run trained with condition=image")
    if trained.condition is None and not of_images:
        show_remarks(never_left_out([{IMAGE: "input"}], trained.model.info))
    return edit.conditioned(condition_image(trained.model), channels)


def check_edit(
    config: EditConfig, trained: LoadedModel, edit: Edit, method: RestorationMethod | None
) -> None:
    """Raise UsageError for options that the edit does not support."""
    name = config.edit_name
    if edit.restores and not trained.model.info.form.ordered:
        raise UsageError(
            "edit",
            name,
            "not supported for point clouds",
            "use img2img, interpolate, attribute or reconstruct",
        )
    if edit.restores and method is None:
        known = "dps" if edit.measures else "replacement, repaint or dps"
        raise UsageError("restoration", None, f"required for edit={name}", f"use {known}")
    if not edit.restores and method is not None:
        raise UsageError("restoration", NO_VALUE, f"not used by edit={name}", "leave it out")
    if edit.measures and config.measurement is None:
        raise UsageError("measurement", None, f"required for edit={name}", "use one such as ct")
    if not edit.measures and config.measurement is not None:
        raise UsageError("measurement", NO_VALUE, f"not used by edit={name}", "use edit=restore")
    if edit.inverts:
        remedy = "set edit.invert=false" if isinstance(edit, Anomaly) else "use edit=img2img"
        trained.model.info.require_mean("edit", name, remedy)
    if method is not None and method.differentiates:
        remedy = "use another model" if edit.measures else "use restoration=replacement"
        trained.model.info.require_mean("restoration", _name_of(method), remedy)
    if method is not None:
        method.check(trained.sampler)
    if isinstance(trained.model.space, Latents):
        _check_in_latents(trained.model.space, name, edit, method)
    if edit.deterministic and trained.sampler.stochastic:
        raise UsageError(
            "sampler",
            NO_VALUE,
            f"edit={name} requires a deterministic sampler",
            "use one such as ddim, heun or dpmpp_2m",
        )
    if config.variations > 1 and not (edit.starts_from_noise or trained.sampler.stochastic):
        raise UsageError(
            "variations",
            config.variations,
            f"edit={name} is deterministic with this sampler, so all variations would be the same",
            "use variations=1, or a stochastic sampler such as ddpm",
        )

    if isinstance(edit, Anomaly):
        _check_anomaly(edit, trained)
    check_attributes(edit, trained)
    if edit.seeds is not None:
        if config.input is not None or config.num_images is not None or config.fit:
            raise UsageError(
                "edit.seeds",
                NO_VALUE,
                "cannot be combined with input, num_images or fit",
                "leave one of them out",
            )
    elif config.input is None:
        of_conditions = edit.takes_condition_image and not config.edit.get("degrade")
        needed = "condition images" if of_conditions else "images"
        remedy = "give a file, a folder, or val for the validation split of the run's dataset"
        raise UsageError("input", None, f"edit={name} needs {needed}", remedy)


def _check_anomaly(edit: Anomaly, trained: LoadedModel) -> None:
    """Raise UsageError for samples without a map, or an inversion whose way back is the same."""
    form, info = trained.model.info.form, trained.model.info
    if form.has_surface:
        problem = "maps differences of pixels, and the samples of this model are point clouds or meshes"
        raise UsageError("edit", "anomaly", problem, "use edit=reconstruct")
    if not edit.inverts:
        return
    if trained.condition is None and isinstance(trained.guidance, NoGuidance):
        problem = "the way back has neither label nor guidance, so it leads to the input itself"
        raise UsageError("edit.invert", True, problem, "set label= or guidance=, or edit.invert=false")
    if trained.model.denoiser.conditions.names and info.label_dropout == 0:
        problem = "encodes without label, but the model was trained with objective.label_dropout=0"
        raise UsageError("edit.invert", True, problem, "leave it false")


def check_measurement(measurement: Measurement, edit: Edit, method: RestorationMethod | None) -> None:
    """Raise UsageError if the restoration method does not take the measurement or its noise."""
    if method is None:
        return
    if not isinstance(measurement, method.takes):
        kind = "linear measurements" if method.takes is LinearMeasurement else "measurements with an inverse"
        problem = f"works with {kind} only, unlike {type(measurement).__name__}"
        raise UsageError("restoration", _name_of(method), problem, "use restoration=dps")
    if edit.noise_key is not None and issubclass(method.takes, LinearOperator):
        problem = f"restoration={_name_of(method)} takes the measurement as exact"
        remedy = "use restoration=dps or diffpir, or edit.sigma_y=0 edit.photons=null"
        raise UsageError(edit.noise_key, NO_VALUE, problem, remedy)


def _name_of(method: RestorationMethod) -> str:
    return type(method).__name__.lower()


def _check_in_latents(space: Latents, name: str, edit: Edit, method: RestorationMethod | None) -> None:
    """Raise UsageError if the edit is not possible in latent space."""
    # Measurements of decoded images are not linear.
    decoded = method is not None and method.differentiates and method.takes is not LinearMeasurement
    if method is not None and edit.known is None and not decoded:
        words = f"restoration={_name_of(method)} with edit={name}"
        raise other_space(words, "pixels", "use restoration=dps")
    factor = space.autoencoder.factor
    if any(side % factor for side in edit.results[1:]):
        raise UsageError(
            "edit",
            name,
            f"its results have {described(edit.results[1:])} pixels, but the autoencoder downsamples by {factor}",
            f"use margins that are multiples of {factor}",
        )


def check_split(split: str) -> None:
    """Raise UsageError if a file or folder has the name of the dataset's split."""
    if Path(split).exists():
        raise UsageError(
            "input",
            split,
            "ambiguous, because a file or folder has this name",
            f"write ./{split} for that file or folder, or rename it to use the run's dataset",
        )


def check_shapes(images: Sequence[Input], edit: Edit) -> None:
    """Raise UsageError for images with another shape than the edit accepts."""
    accepted = edit.accepts()
    larger = " or larger" if isinstance(accepted, LargerShapes) else ""
    for image in images:
        if tuple(image.pixels.shape) not in accepted:
            raise UsageError(
                "images",
                tuple(image.pixels.shape),
                f"must have shape {accepted[0]}{larger}",
                "resize or convert them",
            )


def check_count(count: int, edit: Edit, name: str) -> None:
    """Raise UsageError if the number of images is not a positive multiple of the edit's inputs."""
    if not count or count % edit.inputs_each:
        fewer = count - count % edit.inputs_each
        more = fewer + edit.inputs_each
        raise UsageError(
            "input",
            NO_VALUE,
            f"{count} images were given, but each result of edit={name} needs {edit.inputs_each}",
            f"give {f'{fewer} or {more}' if fewer else more} images",
        )


def check_seeds(first: int, count: int) -> None:
    """Raise UsageError if the seeds of `count` results exceed 32 bits."""
    if first + count > 2**32:
        raise UsageError(
            "seed", first, f"the seed of the last result exceeds {2**32 - 1}", "use a smaller seed"
        )

"""Inputs of an edit: seeds, images of the dataset, or files."""

from collections.abc import Sequence

import torch

from diffusion_cli.commands.edit_checks import check_count, check_split
from diffusion_cli.commands.edit_conditions import condition_names, has_own_conditions
from diffusion_cli.commands.inputs import Complete, Input, conditioned_images, read_input, real_images
from diffusion_cli.commands.masks import completion
from diffusion_cli.commands.trained import LoadedModel
from diffusion_cli.conditions.condition import TEXT
from diffusion_cli.config import EditConfig
from diffusion_cli.data.conditioned import text_conditioned
from diffusion_cli.data.resampling import Spacing, spacing_of
from diffusion_cli.editing import Edit
from diffusion_cli.formats import HighDepthImage, Volume
from diffusion_cli.generate import SeededNoise
from diffusion_cli.runs.schema import check_dataset
from diffusion_cli.runs.texts import load_text_encoder
from diffusion_cli.system.trusted_paths import unnamed


def given_inputs(config: EditConfig, trained: LoadedModel, edit: Edit) -> tuple[Edit, list[Input]]:
    """Return the edit for the inputs, and the inputs; UsageError if there are none, or too many or few."""
    if edit.seeds is not None:
        return edit, _of_seeds(edit.seeds, edit, trained)
    if isinstance(config.input, str) and config.input in ("val", "train"):
        edit, given = _of_split(config.input, config, trained, edit)
    else:
        given = _of_files(config, trained, edit)
    check_count(len(given), edit, config.edit_name)
    return edit.sized(tuple(given[0].pixels.shape)), given


def _of_seeds(seeds: Sequence[int], edit: Edit, trained: LoadedModel) -> list[Input]:
    """Return noise of each seed."""
    shape = trained.model.space.shape_of(edit.results)
    noise = SeededNoise(seeds, shape, torch.device("cpu")).noise()
    return [Input(f"seed_{seed}", image) for seed, image in zip(seeds, noise, strict=True)]


def _of_split(split: str, config: EditConfig, trained: LoadedModel, edit: Edit) -> tuple[Edit, list[Input]]:
    """Return the edit for images of a split, and these images or their condition images."""
    check_split(split)
    dataset = trained.dataset(config.data_dir, config.data_paths)
    names = condition_names(trained.model) if has_own_conditions(edit, trained) else ()
    if TEXT in names:
        encoder = load_text_encoder(trained.model.info, trained.device, trained.folder)
        dataset = text_conditioned(dataset, encoder)
    if edit.takes_condition_image:
        return edit.of_rows(), conditioned_images(dataset, split, config.num_images, names)
    return edit, real_images(dataset, split, config.num_images, names)


def _of_files(config: EditConfig, trained: LoadedModel, edit: Edit) -> list[Input]:
    """Return the images of a file, a folder or an archive."""
    assert config.input is not None
    return read_input(
        config.input,
        list(edit.accepts()) if config.fit else edit.accepts(),
        config.fit,
        config.num_images,
        trained.model.info.form,
        mask_path=edit.mask_path,
        complete=_completion(config, trained),
        spacing=_spacing(trained),
    )


def _spacing(trained: LoadedModel) -> Spacing | None:
    """Return the sides of the voxels of a model of volumes, if its dataset has some."""
    form, node = trained.model.info.form, trained.model.info.config.dataset or {}
    if not isinstance(form, Volume):
        return None
    given, fill = node.get("spacing"), node.get("fill")
    return spacing_of(given, form.low if fill is None else fill)


def _completion(config: EditConfig, trained: LoadedModel) -> Complete | None:
    """Return the reader of photos and their masks for a model with a channel of masks, or None for others."""
    info, shape = trained.model.info, trained.model.shape
    node = info.config.dataset or {}
    if node.get("masks") is None or not isinstance(info.form, HighDepthImage) or check_dataset(node, shape):
        return None
    path = config.dataset.masks or (None if "masks" in unnamed(node) else node["masks"])
    return completion(path, node, info.data_rules, info.form, shape, config.fit)

"""Folders that `diffuse export format=safetensors` writes: weights, with the configuration in their metadata.

The configuration is untrusted: the caller validates its nodes before anything is built from them.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from diffusion_cli.convert.base import (
    Autoencoder,
    Network,
    Node,
    PretrainedModel,
    Process,
    Weights,
    licence,
    parse,
)
from diffusion_cli.convert.diffusers_folder import CONFIG, INDEX
from diffusion_cli.errors import FormatError
from diffusion_cli.system.hub import CARD
from diffusion_cli.system.tensors import AGAIN, read_metadata, read_tensors
from diffusion_cli.system.untrusted import LARGEST_NUMBER, MOST_PIXELS, from_json, reason, whole_numbers

WEIGHTS = "model.safetensors"
AUTOENCODER = "autoencoder.safetensors"
"""Weights of the autoencoder of latents."""
ENTRY = "diffuse"
"""Entry of the metadata with the description of the model, as JSON."""
NODES = ("model", "schedule", "parameterization", "objective")
"""Parts of the configuration that are published: others contain paths of this machine."""
SAMPLER: Node = {"_target_": "diffusion_cli.samplers.DDIM", "eta": 0.0, "spacing": "trailing"}
"""Usual sampler; the description has none."""
STRICT = ConfigDict(strict=True, frozen=True)

Sizes = Annotated[list[PositiveInt], Field(min_length=2, max_length=4)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Latent(BaseModel):
    model_config = STRICT
    shape: Sizes
    mean: list[Finite]
    std: list[Finite]
    autoencoder: Node


class _Description(BaseModel):
    model_config = STRICT
    task: Literal["diffusion", "autoencoder"]
    shape: Sizes
    network_shape: Sizes
    num_classes: PositiveInt | None
    class_names: list[str] | None
    sample_format: dict[str, Any]
    latent: _Latent | None
    config: dict[str, Node]

    def node(self, name: str) -> Node:
        """Return a part of the configuration; FormatError if it is missing."""
        if name not in self.config:
            raise FormatError(f"config.{name} is missing")
        return self.config[name]

    @property
    def label_dropout(self) -> Any:
        """Probability of training without the label; 0 for an objective without it."""
        return self.node("objective").get("label_dropout", 0.0)


def is_described(file: Path) -> bool:
    """Return whether a file has the metadata of such an export."""
    try:
        return file.suffix == ".safetensors" and ENTRY in read_metadata(file)
    except (OSError, FormatError):
        return False


def is_export(names: Collection[str]) -> bool:
    """Return whether the names of the files in a folder are those of such an export."""
    return WEIGHTS in names and not {INDEX, CONFIG} & {*names}


def export_files(paths: Collection[str]) -> list[str]:
    """Return the files of a repository with an export that `read_export` reads."""
    return [path for path in paths if path in (WEIGHTS, AUTOENCODER, CARD)]


def read_export(folder: Path) -> PretrainedModel:
    """Return the model of an export; its weights are read when they are needed.

    Raises:
        FormatError: the folder has no model, or a malformed description.
        OSError: a file cannot be read.
    """
    description = _description(folder / WEIGHTS)
    files = {WEIGHTS: folder / WEIGHTS}
    network = Network(
        node=description.node("model"),
        shape=tuple(description.network_shape),
        num_classes=description.num_classes,
        null_class=description.task == "diffusion" and description.label_dropout != 0,
    )
    autoencoder = None
    if description.latent is not None:
        autoencoder = _autoencoder(folder, description, description.latent)
        files[AUTOENCODER] = folder / AUTOENCODER
    elif description.network_shape != description.shape:
        raise FormatError("its progressive resolution was not finished", "export a finished run")
    names = description.class_names
    return PretrainedModel(
        kind=_kind(network.node),
        network=network,
        weights=lambda: read_tensors(folder / WEIGHTS),
        process=_process(description) if description.task == "diffusion" else None,
        autoencoder=autoencoder,
        class_names=None if names is None else tuple(names),
        form=description.sample_format,
        files=files,
        licence=licence(folder),
    )


def read_exported_autoencoder(folder: Path) -> PretrainedModel:
    """Return the autoencoder of an export, alone or that of a latent model; errors as `read_export`."""
    model = read_export(folder)
    if model.process is None:
        return model
    if model.autoencoder is None:
        raise FormatError("is a model of pixels, without an autoencoder", "choose an autoencoder")
    return PretrainedModel(
        kind=_kind(model.autoencoder.network.node),
        network=model.autoencoder.network,
        weights=model.autoencoder.weights,
        process=None,
        form=model.form,
        files={AUTOENCODER: folder / AUTOENCODER},
    )


def _description(file: Path) -> _Description:
    """Return the description in the metadata of a file; FormatError, which names the file, if it is malformed."""
    text = read_metadata(file).get(ENTRY)
    if text is None:
        raise FormatError(
            f"{file.name} has no description of a model", "give a folder that diffuse export wrote"
        )
    try:
        content = from_json(text.encode())
        if not isinstance(content, Mapping):
            raise FormatError("is not a JSON object")
        if any(abs(number) > LARGEST_NUMBER for number in whole_numbers(content)):
            raise FormatError(f"has a number larger than {LARGEST_NUMBER}")
        description = parse(_Description, content)
        if math.prod(description.shape) > MOST_PIXELS or math.prod(description.network_shape) > MOST_PIXELS:
            raise FormatError("shape is too large for an image")
        names = description.class_names
        if names is not None and len(names) != description.num_classes:
            raise FormatError("does not name as many classes as num_classes")
    except FormatError as error:
        raise FormatError(f"{file.name}: its description {reason(error)}", AGAIN) from error
    return description


def _process(description: _Description) -> Process:
    """Return the noise process of a denoiser."""
    schedule, parameterization, objective = (description.node(name) for name in NODES[1:])
    return Process(schedule=schedule, parameterization=parameterization, objective=objective, sampler=SAMPLER)


def _autoencoder(folder: Path, description: _Description, latent: _Latent) -> Autoencoder:
    """Return the autoencoder of a latent model; FormatError if it has other latents."""
    if (
        latent.shape != description.network_shape
        or not len(latent.mean) == len(latent.std) == latent.shape[0]
    ):
        raise FormatError(f"{WEIGHTS}: its description has contradictory latents", AGAIN)
    if min(latent.std) <= 0:
        raise FormatError(
            f"{WEIGHTS}: its description has std={min(latent.std)}: must be greater than 0", AGAIN
        )

    def weights() -> Weights:
        return read_tensors(folder / AUTOENCODER)

    network = Network(node=latent.autoencoder, shape=tuple(description.shape))
    return Autoencoder(network=network, weights=weights, mean=tuple(latent.mean), std=tuple(latent.std))


def _kind(node: Node) -> str:
    return f"{str(node.get('_target_')).rpartition('.')[2][:80]} of diffuse"

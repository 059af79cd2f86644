"""Descriptions of the models of other programs. This module does not import torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from diffusion_cli.errors import FormatError, format_value
from diffusion_cli.system.hub import CARD
from diffusion_cli.system.untrusted import read

if TYPE_CHECKING:
    from torch import Tensor

Node = dict[str, Any]
"""`_target_`, the dotted name of a class, and its arguments."""
Weights = dict[str, "Tensor"]
"""Tensors by the names of a state dict."""
LICENCE = "license:"


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of this package."""

    node: Node
    """Class of `diffusion_cli.networks` and all of its options."""
    shape: tuple[int, ...]
    """Shape [C, *sizes] of its inputs."""
    num_classes: int | None = None
    """Number of classes, without the null class; None for an unconditional network."""
    null_class: bool = True
    """Whether the last row of the class embedding is a trained null class, as classifier-free guidance needs it."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """The noise process of a denoiser, and how its program samples from it."""

    schedule: Node
    parameterization: Node
    objective: Node
    sampler: Node
    """Sampler with the settings of the other program, such as `spacing` and `variance`."""
    clip: bool | Literal["keep_eps"] = True
    """Whether its sampler clips predicted images to [-1, 1]; "keep_eps": without the matching change of eps."""
    remarks: tuple[str, ...] = ()
    """Settings with which its sampler makes other images than `sampler`."""
    assumptions: tuple[str, ...] = ()
    """What is assumed, for a source that does not state its process."""


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """The autoencoder of a latent model."""

    network: Network
    weights: Callable[[], Weights]
    """Reads its weights, by the names of the network."""
    mean: tuple[float, ...]
    """Mean per channel of its latents z; the latents of the denoiser are (z - mean) / std."""
    std: tuple[float, ...]
    """Standard deviation per channel of its latents."""


@dataclass(frozen=True, kw_only=True)
class PretrainedModel:
    """A model that another program wrote."""

    kind: str
    """Class and program, for messages: "UNet2DModel of diffusers"."""
    network: Network
    weights: Callable[[], Weights]
    """Reads the weights, by the names of the network, with the number format of the files."""
    process: Process | None
    """None for an autoencoder."""
    autoencoder: Autoencoder | None = None
    """None for a model of pixels."""
    class_names: tuple[str, ...] | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    """Files with weights, by their path in the source."""
    licence: str | None = None
    """Licence that its model card states."""
    commit: str | None = None
    """Commit of the Hugging Face Hub; None for a folder."""
    remarks: tuple[str, ...] = ()
    """Settings with which its pipeline makes other images than the same parts here."""
    form: Mapping[str, Any] | None = None
    """Format of its images, as `SampleFormat.to_dict`; None if the source does not state it."""


class UnknownSize(FormatError):
    """The source does not state the size of its images."""


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def parse(model: type[ConfigT], config: Mapping[str, Any]) -> ConfigT:
    """Return the fields of a configuration as a pydantic model; FormatError, about the first that is invalid.

    Args:
        model: strict model with bounds, because the configuration is untrusted.
        config: content of a config.json.
    """
    try:
        return model.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise FormatError(f"{key} is missing") from error
        problem = first["msg"].replace("Input should be", "must be", 1).removeprefix("Value error, ")
        raise FormatError(f"{key}={format_value(first['input'])[:80]}: {problem}") from error


def licence(folder: Path) -> str | None:
    """Return the licence that the model card, README.md, states in its first lines."""
    try:
        lines = read(folder / CARD, 2**20).decode(errors="replace").splitlines()
    except (OSError, FormatError):
        return None
    if not lines or lines[0].strip() != "---":
        return None
    stated = (line.removeprefix(LICENCE).strip(" '\"") for line in lines[1:100] if line.startswith(LICENCE))
    return next((name[:80] for name in stated if name), None)

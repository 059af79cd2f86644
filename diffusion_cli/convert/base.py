"""Descriptions of the models of other programs. This module does not import torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Node = dict[str, Any]
"""`_target_`, the dotted name of a class, and its arguments."""
Weights = dict[str, "Tensor"]
"""Tensors by the names of a state dict."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of this package."""

    node: Node
    """Class of `diffusion_cli.networks` and its options."""
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


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """The autoencoder of a latent model."""

    network: Network
    weights: Callable[[], Weights]
    """Reads its weights, by the names of the network."""
    scale: float = 1.0
    """Factor between its latents and those of the denoiser."""


@dataclass(frozen=True, kw_only=True)
class PretrainedModel:
    """A model that another program wrote."""

    kind: str
    """Class and program, for messages: "UNet2DModel of diffusers"."""
    network: Network
    weights: Callable[[], Weights]
    """Reads the weights, by the names of the network."""
    process: Process | None
    """None for an autoencoder."""
    autoencoder: Autoencoder | None = None
    """None for a model of pixels."""
    class_names: tuple[str, ...] | None = None
    files: tuple[str, ...] = field(default=())
    """Names of the files with weights, for messages."""

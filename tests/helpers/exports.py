"""Small models to export, as loaded from a run, with random weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from diffusion_cli.cli import run
from diffusion_cli.conditions import Condition
from diffusion_cli.config import CONF, build
from diffusion_cli.convert.base import Node
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.diffusion.latents import Latents, Pixels, Space
from diffusion_cli.export import Diffusers, Exportable
from diffusion_cli.generate import guided
from diffusion_cli.networks import ImageAutoencoder
from diffusion_cli.runs.load import LoadedAutoencoder, LoadedDenoiser
from diffusion_cli.runs.schema import LatentInfo
from diffusion_cli.samplers import Sampler, integrate
from diffusion_cli.system.tensors import digest
from helpers import checkpoint_info
from helpers.networks import randomised


def option(group: str, name: str, **values: Any) -> Node:
    """The node of an option, with other values."""
    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text()) | values


UNET = option(
    "model", "unet_tiny", channels=8, channel_mult=[1, 2], norm_groups=4, num_heads=1, head_channels=None
)
DIT = option("model", "dit_tiny", hidden_size=16, depth=1, num_heads=2, embedding_layout="cos_sin_inclusive")
KL = option("model", "kl_tiny", channels=8, channel_mult=[1, 2], latent_channels=2, norm_groups=4)
VQ = {
    "_target_": "diffusion_cli.networks.VQModel", "channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1,
    "latent_channels": 2, "feature_channels": 2, "codebook_size": 16, "norm_groups": 4,
    "gradient_checkpointing": False,
}  # fmt: skip
MEAN, STD = [0.5, -0.2], [1.5, 0.7]
"""Usual statistics of the latents."""


def denoiser(
    model: Node = UNET,
    shape: tuple[int, ...] = (1, 8, 8),
    classes: int | None = None,
    *,
    schedule: Node | None = None,
    parameterization: str = "eps",
    latent: Node | None = None,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    **changes: Any,
) -> LoadedDenoiser:
    """A denoiser of pixels, or of the latents of the autoencoder `latent`."""
    schedule = schedule or option("schedule", "linear")
    parameters = option("parameterization", parameterization)
    names = None if classes is None else tuple(f"class {number}" for number in range(classes))
    model = model | {"class_conditional": classes is not None}
    info = checkpoint_info(
        shape, model=model, schedule=schedule, parameterization=parameters, class_names=names, **changes
    )
    space: Space = Pixels(shape)
    if latent is not None:
        autoencoder = randomised(build(latent, shape, None)).eval()
        assert isinstance(autoencoder, ImageAutoencoder)
        space = Latents(autoencoder, shape, mean, std)
        described = LatentInfo(
            shape=space.shape,
            mean=list(mean),
            std=list(std),
            autoencoder=latent,
            sha256="",
            source="/private/ae",
            cache={},
        )
        info = info.model_copy(update={"latent": described})
    network = randomised(build(model, space.shape, classes)).eval().requires_grad_(False)
    module = Denoiser(network, build(schedule), build(parameters)).eval()
    return LoadedDenoiser(info, 7, digest(network.state_dict()), module, space)


def autoencoder(shape: tuple[int, ...] = (1, 8, 8), model: Node = KL) -> LoadedAutoencoder:
    """A trained autoencoder."""
    network = randomised(build(model, shape, None)).eval().requires_grad_(False)
    assert isinstance(network, ImageAutoencoder)
    info = checkpoint_info(shape, task="autoencoder", model=model, schedule=None, parameterization=None)
    return LoadedAutoencoder(info, 7, digest(network.state_dict()), network)


def sampled(
    model: LoadedDenoiser,
    noise: Tensor,
    steps: int = 5,
    labels: Tensor | None = None,
    *,
    clip: bool = True,
    **settings: Any,
) -> Tensor:
    """The images of a model for noise, as `diffuse sample` makes them, before they are rounded."""
    method: Sampler = build(option("sampler", "ddim", **settings), model.denoiser.schedule)
    denoise = guided(model, NoGuidance(), None if labels is None else Condition.of(labels), clip)
    with torch.no_grad():
        *_, x = integrate(method, denoise, noise, method.grid(steps), lambda: torch.randn_like(noise))
        return model.space.decode(x).clamp(-1, 1)


def imported(model: Exportable, name: str = "x") -> Path:
    """A run with the weights of a model, in the working folder."""
    folder = Path("sources", name)
    folder.mkdir(parents=True)
    Diffusers().write(model, folder)
    assert run(["import", f"source={folder}", f"name={name}"]) == 0
    return Path("outputs", name)

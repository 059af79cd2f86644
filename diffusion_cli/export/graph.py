"""Models as programs of torch.export: graphs of tensor operations with their weights, without Python code."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Latents
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.export.base import Exportable
from diffusion_cli.networks import ImageAutoencoder
from diffusion_cli.runs.load import LoadedAutoencoder

EXAMPLES = 2
"""Images of the batch that is traced; a dimension of 1 would become a constant."""


class Graph(NamedTuple):
    """A traced module with the names of its arguments and results."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class DenoiserGraph(nn.Module):
    """Denoiser with tensors as results: x_t, t and y to x0, eps and, with a variance head, its output."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        prediction = self.denoiser(x, t, y)
        results = (prediction.x0, prediction.eps, prediction.variance)
        return tuple(result for result in results if result is not None)


class LevelsGraph(nn.Module):
    """Noise schedule: times t [B] to alpha and sigma [B] in float32."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule(t)
        return alpha.float(), sigma.float()


class _Latent(nn.Module):
    """An autoencoder with the mean and standard deviation per channel of its latents z, where x = (z - mean) / std."""

    mean: Tensor
    std: Tensor

    def __init__(self, autoencoder: ImageAutoencoder, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))


class EncoderGraph(_Latent):
    """Images [B, C, H, W] in [-1, 1] to latents x [B, L, h, w], without noise."""

    def forward(self, images: Tensor) -> Tensor:
        z, _ = self.autoencoder.moments(images).chunk(2, dim=1)
        return (z - self.mean) / self.std


class DecoderGraph(_Latent):
    """Latents x [B, L, h, w] to images [B, C, H, W], not clipped to [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.autoencoder.decode(x * self.std + self.mean)


def graphs(model: Exportable) -> dict[str, Graph]:
    """Return the programs of a model by name, for any batch size, in float32 on the CPU.

    A denoiser has `denoiser` and `schedule`; one of latents, and an autoencoder, have `encoder` and `decoder`.
    `schedule` gives the alpha and sigma that a sampler needs beside x0 and eps. A model that torch.export cannot trace
    raises one of many types of errors.
    """
    if isinstance(model, LoadedAutoencoder):
        channels = model.network.latent_channels
        return _of_autoencoder(
            Latents(model.network, model.shape, [0.0] * channels, [1.0] * channels), model.shape
        )
    denoiser, space = model.denoiser, model.space
    x, t = torch.zeros(EXAMPLES, *space.shape), torch.full((EXAMPLES,), 0.5)
    arguments = {"x": x, "t": t}
    if denoiser.num_classes is not None:
        arguments["y"] = torch.zeros(EXAMPLES, dtype=torch.int64)
    results = ("x0", "eps", "variance") if denoiser.learns_variance else ("x0", "eps")
    found = {
        "denoiser": _traced(DenoiserGraph(denoiser), arguments, results),
        "schedule": _traced(LevelsGraph(denoiser.schedule), {"t": t}, ("alpha", "sigma")),
    }
    return found | (_of_autoencoder(space, model.shape) if isinstance(space, Latents) else {})


def _of_autoencoder(space: Latents, image: tuple[int, ...]) -> dict[str, Graph]:
    parts = (space.autoencoder, space.mean, space.std)
    images, x = torch.zeros(EXAMPLES, *image), torch.zeros(EXAMPLES, *space.shape)
    return {
        "encoder": _traced(EncoderGraph(*parts), {"images": images}, ("x",)),
        "decoder": _traced(DecoderGraph(*parts), {"x": x}, ("images",)),
    }


@torch.no_grad()
def _traced(module: nn.Module, arguments: dict[str, Tensor], results: tuple[str, ...]) -> Graph:
    batch = ({0: Dim("batch")},) * len(arguments)
    program = torch.export.export(module.eval(), tuple(arguments.values()), dynamic_shapes=batch)
    return Graph(program, tuple(arguments), results)

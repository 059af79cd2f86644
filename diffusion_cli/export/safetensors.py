"""Export as safetensors: the weights by the names of this package, and the configuration in their metadata."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from diffusion_cli.convert.diffuse_folder import AUTOENCODER, ENTRY, NODES, WEIGHTS
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Latents
from diffusion_cli.export.base import Exportable, ExportFormat
from diffusion_cli.runs.load import LoadedDenoiser
from diffusion_cli.runs.weights import save_weights

EXAMPLE = """import json
from safetensors import safe_open
from diffusion_cli.config import build

with safe_open("{source}/{file}", "pt") as file:
    model = json.loads(file.metadata()["{entry}"])
    weights = {{name: file.get_tensor(name) for name in file.keys()}}
network = build(model["config"]["model"], tuple(model["network_shape"]), model["num_classes"])
network.load_state_dict(weights)
"""


class Safetensors(ExportFormat):
    """Weights with their configuration, for programs of one's own; the autoencoder of latents has its own file."""

    name = "safetensors"
    library = "diffuse-cli"

    def check(self, model: Exportable) -> None:
        """Raise UsageError for a model with other conditions than classes."""
        self.refuse_conditions(model)

    def write(self, model: Exportable, folder: Path) -> None:
        description = describe(model)
        if not isinstance(model, LoadedDenoiser):
            _save(model.network, folder / WEIGHTS, description)
            return
        _save(model.denoiser.network, folder / WEIGHTS, description)
        if isinstance(model.space, Latents):
            _save(model.space.autoencoder, folder / AUTOENCODER, description["latent"])

    def example(self, model: Exportable, source: str) -> str:
        return EXAMPLE.format(source=source, file=WEIGHTS, entry=ENTRY)


def describe(model: Exportable) -> dict[str, Any]:
    """Return the description of a model as plain data, without paths."""
    info = model.info
    latent = info.latent
    names = info.stated_class_names
    parts = NODES if info.task == Denoiser.task else NODES[:1]
    return {
        "task": info.task,
        "shape": list(model.shape),
        "network_shape": list(info.network_shape),
        "num_classes": info.num_classes,
        "class_names": None if names is None else list(names),
        "sample_format": info.form.to_dict(),
        "latent": None
        if latent is None
        else {
            "shape": list(latent.shape),
            "mean": latent.mean,
            "std": latent.std,
            "autoencoder": latent.autoencoder,
        },
        "config": {name: node for name in parts if (node := getattr(info.config, name)) is not None},
    }


def _save(network: nn.Module, path: Path, description: dict[str, Any]) -> None:
    save_weights(network.state_dict(), path, (ENTRY, json.dumps(description, sort_keys=True)))

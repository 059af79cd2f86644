"""What `sample` and `eval` begin with: a trained model, a sampler, and a record of both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_cli.checkpoint import Model, find_run, load_model
from diffusion_cli.config import EvalConfig, SampleConfig, build
from diffusion_cli.precision import device_of, resolve
from diffusion_cli.samplers import Sampler


@dataclass(frozen=True)
class Trained:
    """A run's model with the sampler that the command line chose for it."""

    folder: Path
    model: Model
    sampler: Sampler
    device: torch.device
    settings: dict[str, Any]
    """All that an image depends on, its seed apart, as plain data."""


def open_run(config: SampleConfig | EvalConfig) -> Trained:
    """Load what a command names; ValueError if there is no such run or device."""
    folder = find_run(config.run, config.output_dir)
    device = device_of(config.device)
    model = load_model(folder, config.weights, device)
    sampler: Sampler = build(config.sampler, model.denoiser.schedule)
    settings = {
        "weights": config.weights,
        "weights_sha256": model.digest,
        "sampler": config.sampler,
        "steps": config.steps,
        "clip_x0": config.clip_x0,
        "precision": resolve(config.precision, device),
    }
    return Trained(folder, model, sampler, device, settings)

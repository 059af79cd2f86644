"""Sampling of 16 images with 5 steps of each sampler, and the time within network calls."""

from collections.abc import Iterator
from statistics import median

import torch
import yaml

from benchmarks.ours import model_of
from benchmarks.race import Cells, NetworkClock, Table, timed
from benchmarks.sample import write_samples
from diffusion_cli import config
from diffusion_cli.config import build

STEPS = 5


def tables(rounds: int, device: torch.device) -> Iterator[Table]:
    """All samplers with the DDPM network, including PNG files."""
    model = model_of("ddpm", device)
    clock = NetworkClock(model.denoiser.network, device)
    rows: list[Cells] = []
    measured = {}
    for name, file in config.options("sampler").items():
        node = yaml.safe_load(file.read_text()) | ({"rtol": 0.1, "atol": 0.1} if name == "ode" else {})
        sampler, pairs = build(node, model.denoiser.schedule), []
        for _ in range(rounds):
            clock.seconds = 0.0
            seconds = timed(lambda sampler=sampler: write_samples(model, sampler, STEPS, "fp32"), device)()
            pairs.append((seconds, clock.seconds))
        whole, within = median(a for a, _ in pairs), median(b for _, b in pairs)
        rows.append((f"`{name}`", f"{whole:.4g}", f"{within:.4g}", f"{whole / within:.4f}"))
        measured[name] = {
            "seconds": [a for a, _ in pairs],
            "seconds_within_network": [b for _, b in pairs],
        }
    yield Table(
        f"Sampling 16 images of 32x32 with the DDPM network in {STEPS} steps, PNG files and all, fp32. The target of "
        "the ratio is below 1.02.",
        ("sampler", "whole, s", "within network calls, s", "ratio"),
        rows,
        measured,
    )

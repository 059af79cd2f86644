"""`diffuse eval`: sample a trained model, and compare with real images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_cli import __version__
from diffusion_cli.checkpoint import find_run, load_model
from diffusion_cli.config import EvalConfig, build
from diffusion_cli.data import Dataset
from diffusion_cli.generate import generate
from diffusion_cli.metrics import Features, Metric, append_history, evaluate
from diffusion_cli.precision import device_of, resolve


def run(config: EvalConfig) -> None:
    """Measure every metric in one pass over fresh samples; print them and add them to the run's metrics.json."""
    folder = find_run(config.run, config.output_dir)
    device = device_of(config.device)
    model = load_model(folder, config.weights, device)
    sampler = build(config.sampler, model.denoiser.schedule)
    sampler.grid(config.steps)
    dataset: Dataset = build(model.config["dataset"], config.data_dir)
    cache_dir = Path(config.cache_dir or "~/.cache/diffuse").expanduser()
    metrics: dict[str, Metric] = {name: build(node) for name, node in config.metric.items()}
    features: Features = build(config.features, dataset, cache_dir, device)
    sampling: dict[str, Any] = {
        "run": folder.name,
        "step": model.step,
        "weights": config.weights,
        "weights_sha256": model.digest,
        "ema": model.config["ema"],
        "sampler": config.sampler,
        "steps": config.steps,
        "clip_x0": config.clip_x0,
        "seeds": [config.seed, config.seed + config.num_samples - 1],
        "precision": resolve(config.precision, device),
        "device": device.type,
        "versions": {"diffuse": __version__, "torch": torch.__version__},
    }

    def samples() -> Iterator[tuple[Tensor, Tensor | None]]:
        seeds = range(config.seed, config.seed + config.num_samples)
        for _, images, labels in generate(
            model,
            sampler,
            config.steps,
            seeds,
            config.batch_size,
            clip=config.clip_x0,
            precision=config.precision,
        ):
            yield images, labels

    report = evaluate(
        metrics, features, samples(), dataset, cache_dir,
        count=config.num_samples, sampling=sampling, force=config.force,
    )  # fmt: skip
    append_history(folder / "metrics.json", report.to_dict())
    name = config.sampler["_target_"].rpartition(".")[2]
    print(
        f"\n{folder.name} at step {model.step}, {config.num_samples} samples by {name} in {config.steps} steps, "
        f"{config.weights} weights\n{report.table()}\nWith their protocol in {folder / 'metrics.json'}"
    )

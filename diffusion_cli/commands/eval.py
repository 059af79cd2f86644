"""`diffuse eval`: sample a trained model, and compare with real images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_cli import __version__
from diffusion_cli.commands.trained import open_run
from diffusion_cli.config import EvalConfig, build
from diffusion_cli.data import Dataset
from diffusion_cli.generate import generate
from diffusion_cli.metrics import Features, Metric, append_history, evaluate


def run(config: EvalConfig) -> None:
    """Measure every metric in one pass over fresh samples; print them and add them to the run's metrics.json."""
    trained = open_run(config)
    folder, model = trained.folder, trained.model
    device = next(model.denoiser.parameters()).device
    dataset: Dataset = build(model.config["dataset"], config.data_dir)
    cache_dir = Path(config.cache_dir or "~/.cache/diffuse").expanduser()
    metrics: dict[str, Metric] = {name: build(node) for name, node in config.metric.items()}
    features: Features = build(config.features, dataset, cache_dir, device)
    sampling: dict[str, Any] = {
        "run": folder.name,
        "step": model.step,
        "ema": model.config["ema"],
        **trained.settings,
        "seeds": [config.seed, config.seed + config.num_samples - 1],
        "device": device.type,
        "versions": {"diffuse": __version__, "torch": torch.__version__},
    }

    def samples() -> Iterator[tuple[Tensor, Tensor | None]]:
        seeds = range(config.seed, config.seed + config.num_samples)
        for _, images, labels, calls in generate(
            model,
            trained.sampler,
            config.steps,
            seeds,
            config.batch_size,
            clip=config.clip_x0,
            precision=config.precision,
        ):
            sampling["network_calls"] = max(sampling.get("network_calls", 0), calls)
            yield images, labels

    report = evaluate(
        metrics, features, samples(), dataset, cache_dir,
        count=config.num_samples, sampling=sampling, force=config.force,
    )  # fmt: skip
    append_history(folder / "metrics.json", report.to_dict())
    name = config.sampler["_target_"].rpartition(".")[2]
    print(
        f"\n{folder.name} at step {model.step}, {config.num_samples} samples by {name} in "
        f"{sampling['network_calls']} network calls each, "
        f"{config.weights} weights\n{report.table()}\nWith their protocol in {folder / 'metrics.json'}"
    )

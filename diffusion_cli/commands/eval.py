"""`diffuse eval`: sample a trained model and compare with real images, or ask it about real images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_cli import __version__
from diffusion_cli.commands.trained import Trained, open_run
from diffusion_cli.config import EvalConfig, build
from diffusion_cli.data import Dataset
from diffusion_cli.generate import generate
from diffusion_cli.guidance import Unguided
from diffusion_cli.metrics import (
    Features,
    Metric,
    ModelMetric,
    Report,
    Subject,
    append_history,
    evaluate,
    examine,
    read_history,
)


def run(config: EvalConfig) -> None:
    """Measure every metric, those of samples in one pass; print them and add them to the run's metrics.json."""
    trained = open_run(config)
    folder, model = trained.folder, trained.model
    read_history(folder / "metrics.json")  # a damaged one is refused before anything is measured
    dataset = trained.dataset(config.data_dir)
    metrics = {name: build(node) for name, node in config.metric.items()}
    of_model = [metric for metric in metrics.values() if isinstance(metric, ModelMetric)]
    of_samples = {name: metric for name, metric in metrics.items() if isinstance(metric, Metric)}
    about = {
        "run": folder.name,
        "step": model.step,
        "ema": model.config["ema"],
        **trained.settings,
        "device": trained.device.type,
        "versions": {"diffuse": __version__, "torch": torch.__version__},
    }
    if of_samples:
        trained.check(config.steps)  # refused before anything is measured
    elif config.label is not None or not isinstance(trained.guidance, Unguided):
        raise ValueError(
            f"metric={','.join(metrics)}: makes no samples, which label and guidance are for; leave them out"
        )
    reports = []
    if of_model:
        subject = Subject(
            model, dataset, folder, trained.device, config.seed, config.batch_size, config.clip_x0, config.precision
        )  # fmt: skip
        keys = ("run", "step", "ema", "weights", "weights_sha256", "precision", "device", "versions")
        reports.append(examine(of_model, subject, {key: about[key] for key in keys}))
    if of_samples:
        reports.append(_of_samples(config, trained, dataset, of_samples, about))
    for report in reports:
        print(report.table())
        if report.results:
            append_history(folder / "metrics.json", report.to_dict())
    if any(report.results for report in reports):
        print(f"With their protocol in {folder / 'metrics.json'}")


def _of_samples(
    config: EvalConfig, trained: Trained, dataset: Dataset, metrics: dict[str, Metric], about: dict[str, Any]
) -> Report:
    """Sample the model and measure the samples."""
    cache_dir = Path(config.cache_dir or "~/.cache/diffuse").expanduser()
    features: Features = build(config.features, dataset, cache_dir, trained.device)
    seeds = range(config.seed, config.seed + config.num_samples)
    sampling = about | {"seeds": [seeds[0], seeds[-1]], "network_calls": 0}

    def samples() -> Iterator[tuple[Tensor, Tensor | None]]:
        for batch in generate(
            trained.model,
            trained.sampler,
            config.steps,
            seeds,
            config.batch_size,
            guidance=trained.guidance,
            labels=trained.labels,
            clip=config.clip_x0,
            precision=config.precision,
        ):
            sampling["network_calls"] = max(sampling["network_calls"], batch.calls)
            yield batch.images, batch.labels

    report = evaluate(
        metrics, features, samples(), dataset, cache_dir,
        count=config.num_samples, sampling=sampling, force=config.force,
    )  # fmt: skip
    if trained.labels is not None and set(trained.labels) != set(range(dataset.num_classes or 0)):
        report.notes.append("the samples are of some classes only, the real images of all")
    name = config.sampler["_target_"].rpartition(".")[2]
    print(
        f"\n{trained.folder.name} at step {trained.model.step}, {config.num_samples} samples by {name} in "
        f"{sampling['network_calls']} network calls each, {config.weights} weights"
    )
    return report

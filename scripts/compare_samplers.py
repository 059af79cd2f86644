"""Compare samplers at equal numbers of network calls on one trained model: a table of Frechet distances.

    diffuse train name=demo
    python scripts/compare_samplers.py outputs/demo --table docs/results/samplers.md

Each sampler has the settings of its YAML file and as many steps as the number of calls allows. The distance is that of
`diffuse eval metric=fid features=classifier`, for several values of `features.seed`. Results are stored beside the run,
so that the command can be resumed, and several can run at once.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml

from diffusion_cli.config import CONF, build, summary
from diffusion_cli.data import ExternalImages
from diffusion_cli.data.class_shares import label_settings, labels_in_turn
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.generate import SamplingPipeline, class_condition, generate
from diffusion_cli.metrics import DatasetReference, FeatureExtractors, FrechetDistance, GivenSamples, evaluate
from diffusion_cli.runs.load import LoadedDenoiser, load_model
from diffusion_cli.samplers import Sampler, integrate
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.precision import resolve

CALLS = (5, 10, 20, 50)
CLASSIFIERS = (0, 1, 2)
"""Values of `features.seed`, because the distance depends on the classifier."""


def calls_of(sampler: Sampler, steps: int) -> int:
    """Return the number of network calls of a run, counted with a network that returns 0."""
    count = 0

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        nonlocal count
        count += 1
        return Prediction(torch.zeros_like(x), x, sampler.schedule(t)[1])

    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for _ in integrate(sampler, denoise, x, sampler.grid(steps), lambda: x):
        pass
    return count


def steps_for(sampler: Sampler, calls: int) -> int:
    """Return the largest number of steps with at most `calls` network calls; 0 if there is none."""
    return max((n for n in range(1, calls + 1) if calls_of(sampler, n) <= calls), default=0)


def measure(
    model: LoadedDenoiser, sampler: Sampler, steps: int, arguments: argparse.Namespace, cache: Path
) -> dict[str, Any]:
    """Return the distance for each classifier, and the network calls per sample."""
    dataset = build(model.info.config.dataset, arguments.data_dir)
    reference = DatasetReference(dataset, split="train", stats=None)
    counts = None if model.num_classes is None else reference.class_counts(model.info.class_names or ())
    node = yaml.safe_load((CONF / "features" / "classifier.yaml").read_text())
    batches = list(
        generate(
            SamplingPipeline(
                model=model,
                sampler=sampler,
                steps=steps,
                guidance=NoGuidance(),
                condition=class_condition(labels_in_turn({} if counts is None else label_settings(counts))),
                clip=True,
                precision=resolve(arguments.precision, torch.device("cpu")),
            ),
            range(arguments.num_samples),
            500,
        )
    )
    images = MemoryImages(torch.cat([batch.images for batch in batches]), None)
    results = [
        evaluate(
            {"fid": FrechetDistance(reference_distance=True, infinity=0, bootstrap=0)},
            FeatureExtractors({**node, "seed": seed}, dataset, cache, torch.device("cpu")),
            GivenSamples(ExternalImages(images, None), None, {}, "samples"),
            reference,
            batch_size=500,
        ).report.results[0]
        for seed in CLASSIFIERS
    ]
    return {
        "distances": [result.value for result in results],
        "reference_distances": [result.details["reference_distance"] for result in results],
        "calls": batches[0].calls,
        "steps": steps,
    }


def main() -> None:
    """Evaluate missing results, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--samplers", nargs="*", help="samplers to evaluate (default all)")
    parser.add_argument("--table", type=Path, help="Markdown page to update")
    arguments = parser.parse_args()

    model = load_model(arguments.run, "ema", torch.device("cpu"))
    cache = Path("~/.cache/diffuse").expanduser()
    files = {file.stem: file for file in sorted(CONF.glob("sampler/*.yaml"))}
    folder = arguments.run / "samplers"
    how = {
        "weights": model.digest,
        "num_samples": arguments.num_samples,
        "precision": resolve(arguments.precision, torch.device("cpu")),
    }
    for name in arguments.samplers or files:
        sampler: Sampler = build(yaml.safe_load(files[name].read_text()), model.denoiser.schedule)
        sampler.per_image = False  # batches are faster, and the distance covers the whole set
        for calls in CALLS if name != "ode" else (0,):
            path = folder / f"{name}-{calls}.json"
            steps = steps_for(sampler, calls) if calls else 1
            if steps == 0 or how.items() <= _stored(path).items():
                continue
            torch.manual_seed(0)
            result = how | measure(model, sampler, steps, arguments, cache)
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(result))
            print(name, calls, result, flush=True)
    if arguments.table:
        write_table(arguments.table, folder, files)


def _stored(path: Path) -> dict[str, Any]:
    """Return a stored result; empty if missing."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_table(path: Path, folder: Path, files: dict[str, Path]) -> None:
    """Replace the table between the marks of a Markdown page."""
    heads = " | ".join(f"{calls} calls" for calls in CALLS)
    lines = [f"| sampler | {heads} | description |", "|---" * (len(CALLS) + 2) + "|"]
    for name, file in files.items():
        cells = []
        for calls in CALLS:
            result = _stored(folder / f"{name}-{calls}.json")
            cells.append(_cell(result) if result else "")
        result = _stored(folder / f"{name}-0.json")
        if result:
            cells[-1] = f"{_cell(result)} at {result['calls']}"
        lines.append(f"| `{name}` | {' | '.join(cells)} | {summary(file)} |")
    text = path.read_text()
    start, end = text.index("<!-- table -->\n") + len("<!-- table -->\n"), text.index("<!-- end -->")
    path.write_text(text[:start] + "\n" + "\n".join(lines) + "\n\n" + text[end:])


def _cell(result: dict[str, Any]) -> str:
    """Return mean and standard deviation over the classifiers."""
    distances = result["distances"]
    return f"{mean(distances):.2f} ± {stdev(distances):.2f}"


if __name__ == "__main__":
    main()

"""Compare the sampling cost of pixel-space and latent models with the distance of their samples to real images.

    diffuse eval run=pixels metric=fid features=classifier
    diffuse eval run=latents metric=fid features=classifier
    python scripts/compare_spaces.py outputs/pixels outputs/latents

Floating-point operations are counted per image: for a network call, for all calls of the newest evaluation, and for
the decoder.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.race import flops
from diffusion_cli.runs.load import LoadedDenoiser, load_model

GIGA = 1e9


class Row(NamedTuple):
    """Cost and distance of one run."""

    run: str
    space: str
    parameters: float
    call: float
    sample: float
    decoder: float
    distance: float
    reference_distance: float

    def __str__(self) -> str:
        numbers = f"{self.call:.3g} | {self.decoder:.3g} | {self.sample:.3g} | {self.distance:.3g}"
        return (
            f"| {self.run} | {self.space} | {self.parameters / 1e6:.2f}M | {numbers} | "
            f"{self.distance / self.reference_distance:.3g} |"
        )


def row(run: Path) -> Row:
    """Return the newest Frechet distance of a run, and the cost of its samples."""
    model = load_model(run, "ema", torch.device("cpu"))
    found = [
        result
        for report in json.loads((run / "metrics.json").read_text())
        for result in report["results"]
        if result["name"].startswith(("fid", "frechet_"))
    ]
    newest = found[-1]
    call, decoder = costs(model)
    calls = newest["protocol"]["sampling"]["network_calls"]
    parameters = sum(parameter.numel() for parameter in model.denoiser.network.parameters())
    return Row(
        run.name, "x".join(map(str, model.space.shape)), parameters, call, calls * call + decoder, decoder,
        newest["value"], newest["details"]["reference_distance"],
    )  # fmt: skip


@torch.inference_mode()
def costs(model: LoadedDenoiser) -> tuple[float, float]:
    """Return the GFLOP of a network call and of decoding, per image."""
    x, t = torch.zeros(1, *model.space.shape), torch.tensor(0.5, dtype=torch.float64)
    call = flops(lambda: model.denoiser(x, t)) / GIGA
    return call, flops(lambda: model.space.decode(x)) / GIGA


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of evaluated runs")
    print(
        "| run | space | network | GFLOP per call | of the decoder | per sample | Frechet distance "
        "| / reference distance |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for run in parser.parse_args().runs:
        print(row(run))


if __name__ == "__main__":
    main()

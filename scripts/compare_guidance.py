"""Print and plot class accuracy and Frechet distance as functions of the guidance scale.

    diffuse train name=digits_cfg model.class_conditional=true
    diffuse eval -m run=digits_cfg precision=fp32 features=classifier metric=[fid,classifier] guidance=cfg \\
        guidance.scale=1,1.5,2,3,5
    python scripts/compare_guidance.py outputs/digits_cfg --plot docs/images/guidance.png

Reads the newest result of each guidance and scale from the `metrics.json` of the runs.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import yaml

from diffusion_cli.config import options


class Row(NamedTuple):
    """Results at one scale."""

    guidance: str
    scale: float
    accuracy: float
    distance: float
    calls: int


def rows(run: Path) -> list[Row]:
    """Return the newest result of each guidance and scale of a run, sorted by scale."""
    names = {yaml.safe_load(file.read_text())["_target_"]: name for name, file in options("guidance").items()}
    newest: dict[tuple[str, float], Row] = {}
    for entry in json.loads((run / "metrics.json").read_text()):
        results = {result["name"]: result for result in entry["results"]}
        if not {"class_accuracy", "frechet_classifier"} <= set(results):
            continue
        sampling = results["frechet_classifier"]["protocol"]["sampling"]
        guidance = sampling["guidance"]
        kind, scale = names[guidance["_target_"]], guidance.get("scale")
        if scale is not None:
            accuracy, distance = (results[name]["value"] for name in ("class_accuracy", "frechet_classifier"))
            newest[kind, scale] = Row(kind, scale, accuracy, distance, sampling["network_calls"])
    return sorted(newest.values())


def main() -> None:
    """Print the table and draw the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of evaluated runs")
    parser.add_argument("--plot", type=Path, help="output PNG")
    arguments = parser.parse_args()
    measured = {run.name: rows(run) for run in arguments.runs}
    print(
        "| run | guidance | scale | class accuracy | Frechet distance | network calls |\n|---|---|---|---|---|---|"
    )
    for name, some in measured.items():
        for row in some:
            print(
                f"| {name} | {row.guidance} | {row.scale:g} | {row.accuracy:.4f} | {row.distance:.3f} | {row.calls} |"
            )
    if arguments.plot:
        draw(measured, arguments.plot)


def draw(measured: dict[str, list[Row]], path: Path) -> None:
    """Plot distance against error rate, with one line per run and guidance, annotated with scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=100)
    for name, some in measured.items():
        for kind in dict.fromkeys(row.guidance for row in some):
            line = [row for row in some if row.guidance == kind]
            x, y = [1 - row.accuracy for row in line], [row.distance for row in line]
            axes.plot([max(value, 1e-4) for value in x], y, "o-", label=f"{name}, {kind}")
            for row, right, up in zip(line, x, y, strict=True):
                axes.annotate(f"{row.scale:g}", (max(right, 1e-4), up), (4, 4), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("fraction of misclassified samples (left edge: none)")
    axes.set_ylabel("Frechet distance")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()

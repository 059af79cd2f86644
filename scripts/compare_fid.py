"""Compare FID, KID, IS, precision and recall of two image folders by diffuse, torch-fidelity and pytorch-fid.

    pip install pytorch-fid
    python scripts/compare_fid.py samples/ reference/ --weights weights-inception-2015-12-05-6726825d.pth --rounds 2

All use the same weights, take turns, and cache nothing between rounds. Prints the values, their relative differences,
and images per second with the median ratio.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from diffusion_cli.cli import run

METRICS = "metric=[fid,kid,is,precision_recall]"
SIZE = 100  # KID subset size


def diffuse(arguments: argparse.Namespace, resize: str = "tensorflow") -> dict[str, float]:
    """Return the values of diffuse, run as a command."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "eval", f"samples={arguments.samples}", "reference=images", f"reference.path={arguments.reference}",
            METRICS if resize == "tensorflow" else "metric=fid", "features=inception", f"features.resize={resize}",
            f"features.weights={arguments.weights}", f"output_dir={folder}", f"cache_dir={folder}/cache", "force=true",
            f"batch_size={arguments.batch_size}", f"processes={arguments.processes}",
            "metric.fid.reference_distance=false",
        ]  # fmt: skip
        if resize == "tensorflow":
            words.append(f"metric.kid.subset_size={SIZE}")
        if run(words):
            raise SystemExit("diffuse eval failed")
        (history,) = Path(folder).glob("evaluations/*/metrics.json")
        (entry,) = json.loads(history.read_text())
    return {result["name"]: result["value"] for result in entry["results"]}


def torch_fidelity(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the values of torch-fidelity."""
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=str(arguments.samples), input2=str(arguments.reference), fid=True, kid=True, isc=True, prc=True,
        kid_subset_size=SIZE, cuda=torch.cuda.is_available(), cache=False, verbose=False,
        feature_extractor_weights_path=str(arguments.weights), feature_extractor="inception-v3-compat",
    )  # fmt: skip
    return {
        "fid": found["frechet_inception_distance"],
        "kid": found["kernel_inception_distance_mean"],
        "is": found["inception_score_mean"],
        "precision": found["precision"],
        "recall": found["recall"],
    }


def pytorch_fid(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the FID of pytorch-fid, which resizes and scales pixels differently."""
    from pytorch_fid import fid_score, inception  # pyright: ignore[reportMissingImports]

    state = torch.load(arguments.weights, map_location="cpu", weights_only=True)
    with mock.patch.object(inception, "load_state_dict_from_url", return_value=state):
        folders = [str(arguments.samples), str(arguments.reference)]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return {"fid": float(fid_score.calculate_fid_given_paths(folders, 50, device, 2048, num_workers=0))}


def main() -> None:
    """Evaluate in turns, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--weights", type=Path, required=True, help="file of torch-fidelity's InceptionV3")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--pytorch-fid", action="store_true", help="also compare with pytorch-fid")
    arguments = parser.parse_args()
    images = sum(len(list(folder.glob("*.png"))) for folder in (arguments.samples, arguments.reference))
    turns: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
        "diffuse": diffuse, "torch-fidelity": torch_fidelity,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    found: dict[str, dict[str, float]] = {}
    for _ in range(arguments.rounds):
        for name, measure in turns.items():
            start = time.perf_counter()
            found[name] = measure(arguments)
            seconds[name].append(time.perf_counter() - start)
    print("| metric | diffuse | torch-fidelity | relative difference |\n|---|---|---|---|")
    for name, theirs in found["torch-fidelity"].items():
        ours = found["diffuse"][name]
        print(
            f"| {name} | {ours:.9g} | {theirs:.9g} | {abs(ours / theirs - 1) if theirs else abs(ours):.1e} |"
        )
    ratios = [b / a for a, b in zip(seconds["diffuse"], seconds["torch-fidelity"], strict=True)]
    for name, some in seconds.items():
        print(f"{name}: {images / statistics.median(some):.1f} images/s")
    print(
        f"diffuse evaluates {statistics.median(ratios):.2f} times as many images per second ({len(ratios)} rounds)"
    )
    if arguments.pytorch_fid:
        ours, theirs = diffuse(arguments, "pytorch")["fid"], pytorch_fid(arguments)["fid"]
        difference = abs(ours / theirs - 1)
        print(f"| fid, features.resize=pytorch | {ours:.9g} | pytorch-fid: {theirs:.9g} | {difference:.1e} |")


if __name__ == "__main__":
    main()

"""Train the feature classifiers shipped with the package, and write them with their index.

    python scripts/train_classifiers.py --data-dir data

Each is trained with the default settings of `features=classifier` on the default training split of its dataset, in one
CPU thread. The same type of processor and version of torch give the same bytes; others may round differently. Check
`git diff diffusion_cli/metrics/features/classifiers` before replacing files, because values from other weights are not
comparable with published ones.
"""

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save
from torch import Tensor

from diffusion_cli.config import CONF, build
from diffusion_cli.data import Dataset
from diffusion_cli.metrics.features.classifier_training import Recipe, accuracy
from diffusion_cli.metrics.features.shipped import FOLDER, INDEX
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.tensors import digest

CPU = torch.device("cpu")
LEAST_ACCURACY = 0.99
SEEDS = {"digits": (0, 1, 2), "mnist": (0,)}
LICENCES = {
    "digits": "CC BY 4.0 (UCI Machine Learning Repository: Optical Recognition of Handwritten Digits)",
    "mnist": "CC BY-SA 3.0 (LeCun and Cortes, as stated in the documentation of Keras)",
}


def recipe(dataset: Dataset, seed: int) -> Recipe:
    """Return the default recipe of `features=classifier` for a dataset, with a seed."""
    node = yaml.safe_load((CONF / "features" / "classifier.yaml").read_text())
    settings = {key: value for key, value in node.items() if key != "_target_"}
    return Recipe(**settings | {"seed": seed}, classes=dataset.num_classes or 0, flip=dataset.flip)


def train(dataset: Dataset, seed: int, licence: str, folder: Path) -> dict[str, Any]:
    """Train and write one classifier, and return its entry of the index.

    The accuracy is that of the written float16 weights. Raises ValueError if it is below 0.99.
    """
    settings, images, val = recipe(dataset, seed), dataset.load("train"), dataset.load("val")
    network = settings.train(images, CPU)
    halves = {name: halved(value) for name, value in network.state_dict().items()}
    network.load_state_dict(halves)
    share = accuracy(network, val, CPU)
    if share is None or share < LEAST_ACCURACY:
        raise ValueError(
            f"{dataset.name}, seed {seed}: validation accuracy {share} is below {LEAST_ACCURACY}"
        )
    content = save(halves)
    path = folder / f"{dataset.name}-{seed}.safetensors"
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return {
        "file": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "features_digest": digest(network.state_dict()),
        "dataset": dataset.name,
        "train_sha256": images.digest(),
        "val_sha256": val.digest(),
        "val_accuracy": share,
        "recipe": asdict(settings),
        "licence": "Apache-2.0",
        "data_licence": licence,
    }


def halved(value: Tensor) -> Tensor:
    """Convert floating-point tensors to float16."""
    return value.half() if value.is_floating_point() else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default="data", help="folder of downloaded datasets")
    arguments = parser.parse_args()
    rows = []
    for name, seeds in SEEDS.items():
        node = yaml.safe_load((CONF / "dataset" / f"{name}.yaml").read_text())["dataset"]
        dataset = build(node, arguments.data_dir)
        for seed in seeds:
            row = train(dataset, seed, LICENCES[name], FOLDER)
            rows.append(row)
            print(
                f"| {name} | {seed} | {row['val_accuracy']:.4f} | `{row['features_digest'][:12]}` |",
                flush=True,
            )
    with atomic_write(INDEX) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

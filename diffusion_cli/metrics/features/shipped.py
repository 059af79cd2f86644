"""Feature classifiers shipped with the package: the same weights on every machine."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.features.classifier_training import Recipe
from diffusion_cli.system.untrusted import read_json

FOLDER = Path(__file__).with_name("classifiers")
INDEX = FOLDER / "index.json"
"""List of objects, one per classifier, written by `scripts/train_classifiers.py`."""


class Weights(NamedTuple):
    """Weights of a trained classifier."""

    state: Mapping[str, Tensor]
    val_accuracy: float | None
    """Accuracy on the validation images, 0 to 1; None if not measured."""


def shipped(recipe: Recipe, train_digest: str, val_digest: str) -> Weights | None:
    """Return the shipped float16 weights for exactly this recipe and these training images, or None.

    Images are compared by `Images.digest()`, so the name of the dataset does not matter. The accuracy is None for
    other validation images. Raises UsageError if the file is damaged.
    """
    from safetensors.torch import load

    wanted = {"recipe": asdict(recipe), "train_sha256": train_digest}
    row = next((row for row in read_json(INDEX) if wanted.items() <= row.items()), None)
    if row is None:
        return None
    path = FOLDER / row["file"]
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != row["sha256"]:
        raise UsageError("features", "classifier", f"{path} is damaged", "reinstall diffuse-cli")
    same = row["val_sha256"] == val_digest
    return Weights(load(content), row["val_accuracy"] if same else None)

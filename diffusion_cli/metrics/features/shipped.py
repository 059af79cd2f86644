"""The feature classifiers that come with the package: the same weights on every machine."""

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
"""A list of objects, one a classifier; `scripts/train_judges.py` writes it."""


class Weights(NamedTuple):
    """The weights of a trained classifier."""

    state: Mapping[str, Tensor]
    val_accuracy: float | None
    """Share of the validation images that it classifies correctly; None where it is not measured."""


def shipped(recipe: Recipe, train_digest: str, val_digest: str) -> Weights | None:
    """The shipped weights, float16, for exactly this recipe and these training images; None without them.

    Images are compared by `Images.digest()`, so the name of the dataset does not matter. The accuracy is that in the
    index, or None for other validation images. Raises UsageError if the file is damaged.
    """
    from safetensors.torch import load

    wanted = {"recipe": asdict(recipe), "train_sha256": train_digest}
    row = next((row for row in read_json(INDEX) if wanted.items() <= row.items()), None)
    if row is None:
        return None
    path = FOLDER / row["file"]
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != row["sha256"]:
        raise UsageError("features", "classifier", f"{path} is damaged", "install diffuse-cli again")
    same = row["val_sha256"] == val_digest
    return Weights(load(content), row["val_accuracy"] if same else None)

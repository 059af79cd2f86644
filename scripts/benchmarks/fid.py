"""Throughput of Inception features in images/s, of torch-fidelity and diffuse."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.peers import imported
from benchmarks.race import Contestant, Table, ceilings, flops, paced, raced
from diffusion_cli.data import Digits
from diffusion_cli.metrics import InceptionFeatures

IMAGES = 64


def tables(rounds: int, device: torch.device) -> Iterator[Table]:
    """A batch of 32x32 images, with the same weights."""
    images = torch.randint(256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        torch.save({}, weights)
        theirs = _untrained(weights).to(device)
        torch.save(theirs.state_dict(), weights)
        ours = {
            precision: InceptionFeatures(
                Digits("", val_fraction=0.2, flip=False), Path(folder), device,
                weights=str(weights), resize="tensorflow", precision=precision,
            )
            for precision in ("fp32", "bf16")
        }  # fmt: skip

    @torch.inference_mode()
    def reference() -> None:
        theirs(images.to(device))

    nominal = flops(reference)
    contestants = [
        Contestant("torch-fidelity fp32", paced(reference, device), IMAGES, nominal),
        *(
            Contestant(
                f"diffuse {precision}", paced(partial(features, images), device), IMAGES, nominal, precision
            )
            for precision, features in ours.items()
        ),
    ]
    yield raced(
        f"Features of {IMAGES} images of 3x32x32 by Inception. GFLOP/s are of the operations of torch-fidelity's.",
        contestants,
        rounds,
        ceilings(device),
    )


def _untrained(weights: Path) -> torch.nn.Module:
    """Return torch-fidelity's network with initial weights, because published ones may be unavailable."""
    extractor = imported("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    untrained = type(
        "Untrained", (extractor,), {"load_state_dict": lambda self, *arguments, **settings: None}
    )
    return untrained("untrained", ["2048", "logits_unbiased"], str(weights))

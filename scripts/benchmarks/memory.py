"""Peak memory of fid, kid and is for 50,000 images against 50,000, without that of programs and network."""

import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.probe import afresh, resident
from benchmarks.race import Table
from diffusion_cli.data import ExternalImages, Images, NoDataset
from diffusion_cli.metrics import (
    FeatureBatch,
    FeatureExtractors,
    Features,
    FrechetDistance,
    GivenReference,
    GivenSamples,
    InceptionScore,
    KernelDistance,
    evaluate,
)

COUNT = 50_000
LIMIT = 3e9


class Noise(Images):
    """Images of 32x32 generated on access, which take no memory."""

    shape, labels = (3, 32, 32), None

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(index[0]))
        return torch.randint(256, (len(index), *self.shape), dtype=torch.uint8, generator=generator)


class Projection(Features):
    """Placeholder for Inception with the same outputs, which takes no time."""

    name, resize, note, digest = "projection", "none", "", "0" * 64
    dim, classes, chunk = 2048, 1008, 250

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.matrix = torch.randn(3072, self.dim + self.classes, device=device) / 3072

    def extract(self, images: torch.Tensor) -> FeatureBatch:
        values = images.flatten(1).float() @ self.matrix
        return FeatureBatch(values[:, : self.dim], values[:, self.dim :])


def tables(rounds: int, device: torch.device) -> Iterator[Table]:
    """One round in a new process, regardless of `rounds`, because a peak never falls."""
    taken, seconds = afresh(_evaluate, device.type)
    row = (f"{taken / 1e9:.3f}", f"{LIMIT / 1e9:g}", f"{2 * COUNT / seconds:.0f}")
    yield Table(
        f"fid, kid and is of {COUNT:,} images against {COUNT:,}, beyond programs and network.",
        ("memory, GB", "limit, GB", "images/s without the network"),
        [row],
        {"bytes": taken, "limit_bytes": LIMIT, "seconds": seconds},
    )


def _evaluate(device: str) -> tuple[int, float]:
    """Return peak memory of an evaluation in bytes, and its duration in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = NoDataset("noise", Noise.shape)
        networks = FeatureExtractors({}, dataset, Path(folder), torch.device(device))
        networks.chosen = Projection(networks.device)
        reference = GivenReference(dataset, path="noise")
        reference.images = Noise(COUNT)
        before, start = resident(), time.perf_counter()
        evaluate(
            {
                "fid": FrechetDistance(reference_distance=False, infinity=0, bootstrap=0),
                "kid": KernelDistance(subsets=100, subset_size=1000, seed=2020),
                "is": InceptionScore(splits=10),
            },
            networks,
            GivenSamples(ExternalImages(Noise(COUNT), None), None, {}, "samples"),
            reference,
            batch_size=250,
        )
        seconds = time.perf_counter() - start
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, seconds

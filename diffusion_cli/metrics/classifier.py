"""A small classifier of the dataset itself: features for images that Inception has never seen the like of."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from tqdm import tqdm

from diffusion_cli.cache import optional, report_damage
from diffusion_cli.checkpoint import digest, whole_file
from diffusion_cli.data import Batches, Dataset, Images
from diffusion_cli.foreign import check_tensors
from diffusion_cli.metrics.features import FeatureBatch, Features, check_pixels, exact_convolutions
from diffusion_cli.seeding import mix

FORMAT = 1


class Classifier(nn.Module):
    """Six convolutions, each with batch norm and ReLU, averaged over the image; then one linear layer.

    Images are float32 [B, channels, H, W] in [-1, 1] of any size; features are [B, dim], at least 0.
    """

    def __init__(self, channels: int, width: int, dim: int, classes: int) -> None:
        super().__init__()
        widths = [channels, width, width, 2 * width, 2 * width, dim, dim]
        strides = [1, 2, 1, 2, 1, 1]
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths, widths[1:], strides, strict=False):
            layers += [
                nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x).mean(dim=(2, 3))
        return features, self.head(features)


class ClassifierFeatures(Features):
    """The last activations of a small network, trained to tell the classes of the real training images.

    It is trained once, for `steps` batches of images shifted by up to `shift` pixels, and kept in `cache_dir`
    under a name that follows from the images and these settings. Equal settings give equal weights on one
    machine; distances of different weights cannot be compared, and the digest tells them apart.

    Raises ValueError for a dataset without classes or without pixels.
    """

    name = "classifier"
    resize = "none"
    knows_labels = True

    def __init__(
        self,
        dataset: Dataset,
        cache_dir: Path,
        device: torch.device,
        *,
        dim: PositiveInt,
        width: PositiveInt,
        steps: PositiveInt,
        batch_size: PositiveInt,
        learning_rate: PositiveFloat,
        shift: NonNegativeInt,
        seed: NonNegativeInt,
    ) -> None:
        if dataset.num_classes is None:
            raise ValueError(
                f"features=classifier: {dataset.name} has no classes to learn; take features=inception"
            )
        self.dim, self.width, self.classes = dim, width, dataset.num_classes
        self.steps, self.batch_size, self.learning_rate = steps, batch_size, learning_rate
        self.shift, self.seed = shift, seed
        self.device = device
        train, held_out = dataset.load("train"), dataset.load("held_out")
        check_pixels(train.gather(torch.zeros(1, dtype=torch.int64, device=train.device)))
        self.network = self._initial(dataset.shape[0]).to(device)
        path = self._path(cache_dir, dataset, train, held_out)
        saved = restored(path, self.network)
        if saved is None:
            with exact_convolutions():
                self._train(Batches(train, batch_size, seed, dataset.flip, device=device))
            self.network.eval()
            self.held_out_accuracy = self._accuracy(held_out) if len(held_out) else None
            self._save(path)
        else:
            self.network.load_state_dict(saved["state"])
            self.network.eval()
            self.held_out_accuracy = saved["held_out_accuracy"]
        self.digest = digest(self.network.state_dict())
        accuracy = (
            "" if self.held_out_accuracy is None else f"; held-out accuracy {self.held_out_accuracy:.4f}"
        )
        self.note = (
            f"features are those of a classifier trained on {dataset.name}/train (weights "
            f"{self.digest[:12]}{accuracy}), not of Inception: compare only numbers with the same weights"
        )

    def extract(self, images: Tensor) -> FeatureBatch:
        return FeatureBatch(*self.network(images.float() / 127.5 - 1))

    def _settings(self) -> dict[str, Any]:
        names = ("dim", "width", "classes", "steps", "batch_size", "learning_rate", "shift", "seed")
        return {"format": FORMAT, **{name: getattr(self, name) for name in names}}

    def _path(self, cache_dir: Path, dataset: Dataset, train: Images, held_out: Images) -> Path:
        facts = {**self._settings(), "flip": dataset.flip, "data": [train.digest(), held_out.digest()]}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return cache_dir / f"classifier-{dataset.name}-{key[:16]}.pt"

    def _initial(self, channels: int) -> Classifier:
        """The untrained network, a function of the seed; global random numbers are left as they were."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(self.seed, "classifier"))
            return Classifier(channels, self.width, self.dim, self.classes)

    def _train(self, batches: Batches) -> None:
        """Minimise the cross-entropy with AdamW, the rate rising and falling in one cycle."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=self.steps)
        progress = tqdm(range(self.steps), desc="training the feature classifier", unit="step", delay=1.0)
        for step, batch in zip(progress, batches, strict=False):
            _, logits = self.network(shifted(batch.images, self.shift, mix(self.seed, "shift", step)))
            assert batch.labels is not None
            loss = nn.functional.cross_entropy(logits, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()

    def _accuracy(self, images: Images) -> float:
        """The fraction of images whose class has the highest score."""
        assert images.labels is not None
        correct = 0
        for rows in torch.arange(len(images), device=images.device).split(self.chunk):
            logits = self(images.gather(rows)).logits
            assert logits is not None
            predicted = logits.argmax(1)
            correct += int((predicted == images.labels[rows.to(images.labels.device)].to(self.device)).sum())
        return correct / len(images)

    def _save(self, path: Path) -> None:
        state = {key: value.cpu() for key, value in self.network.state_dict().items()}
        with optional(), whole_file(path) as temporary:
            torch.save(
                {"state": state, "digest": digest(state), "held_out_accuracy": self.held_out_accuracy},
                temporary,
            )


def restored(path: Path, network: Classifier) -> dict[str, Any] | None:
    """What `path` holds of a network trained like this one; None without a file, or if it is damaged."""
    if not path.is_file():
        return None
    try:
        check_tensors(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state, wanted = saved["state"], network.state_dict()
        # First, for a few bytes can be said to be the numbers of a tensor of any size.
        if {key: value.shape for key, value in state.items()} != {
            key: value.shape for key, value in wanted.items()
        }:
            raise ValueError("the weights are those of another network")
        if digest(state) != saved["digest"]:
            raise ValueError("the weights are not those that were saved")
        if not isinstance(saved["held_out_accuracy"], float | None):
            raise ValueError("the accuracy is no number")
    except Exception as error:  # a damaged file fails in many ways in the parsers of ZIP and pickle
        report_damage(path, error)
        return None
    return saved


def shifted(images: Tensor, reach: int, seed: int) -> Tensor:
    """Each image [B, C, H, W] moved by its own -reach..reach pixels in both directions, edges repeated."""
    count, _, height, width = images.shape
    generator = torch.Generator().manual_seed(seed)
    down, right = torch.randint(2 * reach + 1, (2, count, 1), generator=generator).to(images.device)
    rows = torch.arange(height, device=images.device) + down
    columns = torch.arange(width, device=images.device) + right
    padded = nn.functional.pad(images, (reach, reach, reach, reach), mode="replicate")
    batch = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

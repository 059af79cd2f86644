"""Network and training of `features=classifier` and `metric=label_error`, independent of the number of threads."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_cli.data import Batch, Batches, Images, shows_signals, to_model_range
from diffusion_cli.metrics.features.base import exact_convolutions
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.seeding import mix

CHUNK = 1024  # images per forward pass


def class_loss(outputs: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of class scores [B, classes] over images with a class; 0 without such images."""
    assert batch.labels is not None
    total = nn.functional.cross_entropy(outputs, batch.labels, ignore_index=-1, reduction="sum")
    return total / (batch.labels >= 0).sum().clamp(min=1)


class FeatureClassifier(nn.Module):
    """Six convolutions with batch norm and ReLU, global average pooling, and a linear layer.

    Maps images, float32 [B, channels, H, W] in [-1, 1], to features [B, dim] >= 0 and outputs [B, classes]: the class
    scores, or those of `AttributeHeads`.

    Args:
        channels: image channels.
        width: channels of the first convolution.
        dim: number of features.
        classes: number of outputs.
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


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the weights of a trained classifier, apart from the training images."""

    dim: int
    """Number of features."""
    width: int
    """Channels of the first convolution."""
    classes: int
    """Number of outputs: classes, or those of `AttributeHeads`."""
    steps: int
    """Training steps."""
    batch_size: int
    learning_rate: float
    """Peak learning rate of AdamW."""
    shift: int
    """Largest random shift of a training image, in pixels."""
    seed: int
    """Seed of the initial weights, the batches and the shifts."""
    flip: bool
    """Whether training images are randomly flipped horizontally."""

    def initial(self, channels: int) -> FeatureClassifier:
        """Return the untrained network, a function of the seed; the global random state is unchanged."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(self.seed, "classifier"))
            return FeatureClassifier(channels, self.width, self.dim, self.classes)

    def train(
        self,
        images: Images,
        device: torch.device,
        loss_of: Callable[[Tensor, Batch], Tensor] = class_loss,
        task: str = "feature classifier",
    ) -> FeatureClassifier:
        """Train a network with AdamW and a one-cycle learning rate; return it in evaluation mode.

        Uses one CPU thread, or deterministic GPU convolutions, so that the weights depend on this recipe, the images
        and the type of processor, but not on the number of threads or processes.

        Args:
            images: the training images.
            device: device of the network.
            loss_of: loss of the outputs for a batch, 0-d; by default the cross-entropy of the labels.
            task: name of the network for the progress bar.
        """
        network = self.initial(images.shape[0]).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=self.steps)
        progress = ProgressBar(total=self.steps, desc=f"training the {task}", unit="step", delay=1.0)
        batches = Batches(images, self.batch_size, self.seed, self.flip, device=device)
        rows = not shows_signals(images)  # whose rows are channels
        with one_thread(), exact_convolutions(), progress:
            for step, batch in zip(range(self.steps), batches, strict=False):
                _, outputs = network(shifted(batch.images, self.shift, mix(self.seed, "shift", step), rows))
                loss = loss_of(outputs, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cycle.step()
                progress.update()
        return network.eval()


@torch.inference_mode()
def accuracy(network: FeatureClassifier, images: Images, device: torch.device) -> float | None:
    """Return the classification accuracy over images with a class, 0 to 1; None without such images."""
    if len(images) == 0:
        return None
    assert images.labels is not None
    count = int((images.labels >= 0).sum())
    if count == 0:
        return None
    correct = 0
    with exact_convolutions():
        for rows in torch.arange(len(images), device=images.device).split(CHUNK):
            _, logits = network(to_model_range(images[rows].to(device)))
            labels = images.labels[rows.to(images.labels.device)]
            correct += int((logits.argmax(1) == labels.to(device)).sum())
    return correct / count


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Context in which torch uses one CPU thread, because the number of threads changes rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def shifted(images: Tensor, reach: int, seed: int, rows: bool = True) -> Tensor:
    """Shift each image [B, C, H, W] randomly by up to `reach` pixels in both directions, repeating edge pixels.

    Without `rows`, images are shifted along their rows alone.
    """
    count, _, height, width = images.shape
    generator = torch.Generator().manual_seed(seed)
    down, right = torch.randint(2 * reach + 1, (2, count, 1), generator=generator).to(images.device)
    y = torch.arange(height, device=images.device) + (down if rows else torch.full_like(down, reach))
    x = torch.arange(width, device=images.device) + right
    padded = nn.functional.pad(images, (reach, reach, reach, reach), mode="replicate")
    batch = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)

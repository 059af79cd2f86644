"""Progressive resolution: the image size and batch size of each training step, and its batches."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_cli.conditions.condition import IMAGE
from diffusion_cli.data.base import Images
from diffusion_cli.data.batches import Batch, Batches
from diffusion_cli.data.memory import to_device
from diffusion_cli.errors import UsageError


class Stage(NamedTuple):
    """Training steps at one image size."""

    first: int
    """First step of the stage."""
    shape: tuple[int, ...]
    """Shape of the images, [C, *sides]."""
    batch_size: int
    """Batch size over all devices."""

    @property
    def size(self) -> int:
        """Length of the short side."""
        return min(self.shape[1:])


class ResolutionSchedule:
    """Consecutive stages of training, the last one unlimited; a step number determines its stage.

    Args:
        stages: the stages in order.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.all = tuple(stages)

    @classmethod
    def from_sizes(
        cls,
        shape: tuple[int, ...],
        batch_size: int,
        sizes: Sequence[int] | None,
        steps: Sequence[int],
        batches: Sequence[int] | None,
    ) -> Self:
        """Create the stages of a progressive schedule.

        Args:
            shape: full shape of the images, [C, *sides].
            batch_size: batch size of the last stage.
            sizes: short sides of the stages, increasing to the full size; None: one stage.
            steps: number of steps of each stage but the last.
            batches: batch size of each stage but the last; None: `batch_size`.

        Raises:
            UsageError: images cannot be reduced to a size by averaging blocks of pixels, or the last size is not the
                full size.
        """
        sizes = [min(shape[1:])] if sizes is None else sizes
        each = [*(batches or [batch_size] * (len(sizes) - 1)), batch_size]
        begins = [sum(steps[:number]) for number in range(len(sizes))]
        shapes = _shapes(shape, sizes)
        return cls([Stage(*stage) for stage in zip(begins, shapes, each, strict=True)])

    @property
    def last(self) -> Stage:
        """Last stage, at full size."""
        return self.all[-1]

    @property
    def grow(self) -> bool:
        """Whether there is more than one stage."""
        return len(self.all) > 1

    def at(self, step: int) -> Stage:
        """Return the stage of step 0, 1, ..."""
        return next(stage for stage in reversed(self.all) if stage.first <= step)

    def after(self, steps: int) -> Stage:
        """Return the stage of the last of `steps` finished steps."""
        return self.at(max(0, steps - 1))

    def images(self, steps: int) -> int:
        """Return the number of images of the first `steps` steps."""
        ends = [*(stage.first for stage in self.all[1:]), steps]
        return sum(
            max(0, min(end, steps) - stage.first) * stage.batch_size
            for stage, end in zip(self.all, ends, strict=True)
        )

    def steps(self, images: int) -> int:
        """Return the number of steps needed to train on `images` images."""
        stage = next(stage for stage in reversed(self.all) if self.images(stage.first) <= images)
        return stage.first + math.ceil((images - self.images(stage.first)) / stage.batch_size)

    def key(self, stage: Stage) -> str:
        """Return the configuration key of a stage's batch size."""
        return "batch_size" if stage is self.last else "stage_batch"

    def __str__(self) -> str:
        first, *others = self.all
        return f"size {first.size}" + "".join(f", {stage.size} from step {stage.first}" for stage in others)


def _shapes(shape: tuple[int, ...], sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the image shape for each short side; UsageError as `ResolutionSchedule.from_sizes`."""
    channels, *sides = shape
    short, named = min(sides), "x".join(map(str, sides))
    common = math.gcd(*sides)
    possible = [short // factor for factor in range(common, 0, -1) if common % factor == 0]
    for size in sizes:
        if size not in possible:
            raise UsageError(
                "progressive",
                list(sizes),
                f"images of {named} cannot be reduced to {size} by averaging blocks of pixels",
                f"use sizes among {possible}",
            )
        yield channels, *(side * size // short for side in sides)
    if sizes[-1] != short:
        raise UsageError(
            "progressive",
            list(sizes),
            f"ends at {sizes[-1]}, but the images are {named}",
            f"end with {short}",
        )


def reduced(images: Tensor, shape: Sequence[int]) -> Tensor:
    """Reduce images [B, C, *sides] to `shape` [C, *sides], which divides theirs, by averaging blocks of pixels."""
    sides = tuple(shape[1:])
    return images if images.shape[2:] == sides else interpolate(images, sides, mode="area")


def at_size(batch: Batch, shape: Sequence[int]) -> Batch:
    """Return a batch with its images and condition images reduced to `shape` [C, *sides], which divides theirs."""
    condition, image = batch.condition, None if batch.condition is None else batch.condition.get(IMAGE)
    if condition is not None and image is not None:
        condition = condition.replaced({IMAGE: reduced(image, shape)})
    return batch._replace(images=reduced(batch.images, shape), condition=condition)


class ProgressiveBatches:
    """Endless batches of all stages from step `start`, `parts` per step.

    All stages share one endless stream of images, as in `Batches`: each step begins where the previous one ended,
    whatever their batch sizes. Images are reduced on the training device. See `Batches` for arguments and errors.
    """

    def __init__(
        self,
        images: Images,
        stages: ResolutionSchedule,
        seed: int,
        flip: bool,
        *,
        start: int = 0,
        parts: int = 1,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str | None = None,
        num_workers: int = 0,
        repeats: int = 1,
    ) -> None:
        images = to_device(images, images.device if device is None else device)
        self.stages = [stage for stage in stages.all if stage.first >= stages.at(start).first]
        self.batches = [
            Batches(
                images, stage.batch_size // parts, seed, flip, start=max(start, stage.first) * parts, rank=rank,
                world_size=world_size, device=device, num_workers=num_workers, parts=parts,
                skipped=stages.images(stage.first) - stage.first * stage.batch_size, repeats=repeats,
            )
            for stage in self.stages
        ]  # fmt: skip

    def __iter__(self) -> Iterator[Batch]:
        starts = [batches.start for batches in self.batches[1:]]
        for stage, batches, end in zip(self.stages, self.batches, [*starts, None], strict=True):
            for batch in islice(batches, None if end is None else end - batches.start):
                yield at_size(batch, stage.shape)

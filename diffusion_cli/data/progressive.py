"""Progressive resolution: the image size and batch size of each step, and the batches of all steps."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_cli.data.base import Images
from diffusion_cli.data.batches import Batch, Batches
from diffusion_cli.data.memory import to_device
from diffusion_cli.errors import UsageError


class Stage(NamedTuple):
    """The steps that train at one size."""

    first: int
    """The first of them."""
    shape: tuple[int, ...]
    """Channels and sides of the images."""
    batch_size: int
    """Images a step, over all devices."""

    @property
    def size(self) -> int:
        """The short side."""
        return min(self.shape[1:])


class ResolutionSchedule:
    """Stages one after the other, the last without end; what a step trains on follows from its number alone."""

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
        """The stages of images of a `shape` [C, *sides], the short side `sizes`, from small to all of it.

        Each but the last has its number of `steps` and of images a step in `batches`, by default that of the last,
        `batch_size`. Without sizes there is one stage. Raises UsageError where images cannot be reduced to a size by
        averaging blocks of pixels, or the last is not all of it.
        """
        sizes = [min(shape[1:])] if sizes is None else sizes
        each = [*(batches or [batch_size] * (len(sizes) - 1)), batch_size]
        begins = [sum(steps[:number]) for number in range(len(sizes))]
        shapes = _shapes(shape, sizes)
        return cls([Stage(*stage) for stage in zip(begins, shapes, each, strict=True)])

    @property
    def last(self) -> Stage:
        """That of the images as they are."""
        return self.all[-1]

    @property
    def grow(self) -> bool:
        """Whether there is more than one."""
        return len(self.all) > 1

    def at(self, step: int) -> Stage:
        """The stage of step 0, 1, ..."""
        return next(stage for stage in reversed(self.all) if stage.first <= step)

    def after(self, steps: int) -> Stage:
        """The stage that weights come from which have had so many steps."""
        return self.at(max(0, steps - 1))

    def images(self, steps: int) -> int:
        """How many images the first `steps` train on."""
        ends = [*(stage.first for stage in self.all[1:]), steps]
        return sum(
            max(0, min(end, steps) - stage.first) * stage.batch_size
            for stage, end in zip(self.all, ends, strict=True)
        )

    def steps(self, images: int) -> int:
        """How many steps it takes to train on so many images."""
        stage = next(stage for stage in reversed(self.all) if self.images(stage.first) <= images)
        return stage.first + math.ceil((images - self.images(stage.first)) / stage.batch_size)

    def key(self, stage: Stage) -> str:
        """The key of the configuration that says a stage's images a step."""
        return "batch_size" if stage is self.last else "stage_batch"

    def __str__(self) -> str:
        first, *others = self.all
        return f"size {first.size}" + "".join(f", {stage.size} from step {stage.first}" for stage in others)


def _shapes(shape: tuple[int, ...], sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The shape of images reduced to each size of their short side; UsageError as `ResolutionSchedule.from_sizes`."""
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
                f"take sizes among {possible}",
            )
        yield channels, *(side * size // short for side in sides)
    if sizes[-1] != short:
        raise UsageError(
            "progressive",
            list(sizes),
            f"ends at {sizes[-1]}, and the images are {named}",
            f"end with {short}",
        )


def reduced(images: Tensor, shape: Sequence[int]) -> Tensor:
    """The images [B, C, *sides] at a smaller `shape` [C, *sides] that divides theirs: the means of blocks of pixels."""
    sides = tuple(shape[1:])
    return images if images.shape[2:] == sides else interpolate(images, sides, mode="area")


class ProgressiveBatches:
    """The batches of all stages from step `start` on, without end, in `parts` a step.

    One endless stream of images, as `Batches` has it, goes through all of them: a step begins where the one before it
    ended, whatever their sizes. Images are reduced on the device that trains. Raises what `Batches` raises.
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
    ) -> None:
        images = to_device(images, images.device if device is None else device)
        self.stages = [stage for stage in stages.all if stage.first >= stages.at(start).first]
        self.batches = [
            Batches(
                images, stage.batch_size // parts, seed, flip, start=max(start, stage.first) * parts, rank=rank,
                world_size=world_size, device=device, num_workers=num_workers, parts=parts,
                skipped=stages.images(stage.first) - stage.first * stage.batch_size,
            )
            for stage in self.stages
        ]  # fmt: skip

    def __iter__(self) -> Iterator[Batch]:
        starts = [batches.start for batches in self.batches[1:]]
        for stage, batches, end in zip(self.stages, self.batches, [*starts, None], strict=True):
            for batch in islice(batches, None if end is None else end - batches.start):
                yield batch._replace(images=reduced(batch.images, stage.shape))

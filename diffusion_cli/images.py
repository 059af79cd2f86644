"""Pictures of results."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.formats import SampleFormat, Shape, Uint8Image
from diffusion_cli.formats.files import is_gray, opened
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.untrusted import read, reason

WRITERS = 4  # threads; each waits for the disk most of the time


class Writer:
    """Writes files by a few threads, at most `waiting` of them handed over and not there yet, while others are made.

    Leaving it, for whatever reason, waits for the files that were handed over. What the first of them raised that could
    not be written is raised at a later call or on leaving, unless something else went wrong first.
    """

    def __init__(self, waiting: int) -> None:
        self.waiting, self.written = waiting, 0
        """What was handed over and is there now, as far as has been looked."""
        self._under_way: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(WRITERS)
        return self

    def __call__(self, save: Callable[..., None], *arguments: Any) -> None:
        """Have `save(*arguments)` called, once there is room for it."""
        self._look(self.waiting - 1)
        self._under_way.append(self._pool.submit(save, *arguments))

    def _look(self, most: int) -> None:
        """Take what is written off the line, and wait until at most so many are left on it."""
        while self._under_way and (len(self._under_way) > most or self._under_way[0].done()):
            self._under_way.popleft().result()
            self.written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if kind is None:
            self._look(0)


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Lay out uint8 images [N, C, H, W] in rows of `columns` (null: square), one pixel apart, as [C, H', W'].

    Small images are enlarged by a whole factor to at least 32 pixels, each pixel a square.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    return rows(images.split(columns))


def rows(images: Sequence[Tensor]) -> Tensor:
    """Lay out uint8 images in rows of unlike lengths, each [n, C, H, W], as `grid` does."""
    columns = max(map(len, images))
    blanks = [row.new_full((columns - len(row), *row.shape[1:]), 255) for row in images]
    cells = torch.stack([torch.cat(pair) for pair in zip(images, blanks, strict=True)])
    scale = max(1, 32 // cells.shape[-1])
    cells = cells.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    framed = F.pad(cells, (1, 1, 1, 1), value=255)
    lines, columns, channels, height, width = framed.shape
    return framed.permute(2, 0, 3, 1, 4).reshape(channels, lines * height, columns * width)


def read_images(files: Sequence[Path]) -> Tensor:
    """Saved pictures of one size, uint8 [N, C, H, W]; UsageError names a file that is none, or of another size."""
    with _naming(files[0]):
        first = opened(read(files[0]))
    return read_stored(files, Uint8Image(), (1 if is_gray(first) else 3, first.height, first.width))


def read_stored(files: Sequence[Path], form: SampleFormat, shape: Shape) -> Tensor:
    """Saved results of a format and shape, as stored, [N, *shape]; UsageError names a file that is not one."""
    samples = []
    for file in files:
        with _naming(file):
            samples.append(form.read(read(file), shape))
    return torch.stack(samples)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(file, NO_VALUE, reason(error), "move it away to have it made anew") from error


def save_stored(sample: Tensor, path: Path, form: SampleFormat) -> None:
    """Write a sample as stored, [*shape], in a form, whole or not at all."""
    with atomic_write(path) as temporary:
        form.write(sample.cpu(), temporary)


def save_png(image: Tensor, path: Path) -> None:
    """Write a uint8 image [C, H, W] of 1 or 3 channels as PNG, whole or not at all."""
    save_stored(image, path, Uint8Image())


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Write uint8 images [N, C, H, W] as one PNG."""
    save_png(grid(images.cpu(), columns), path)


def save_rows(images: Sequence[Tensor], path: Path) -> None:
    """Write rows of uint8 images, each [n, C, H, W], as one PNG."""
    save_png(rows([row.cpu() for row in images]), path)


def save_gif(images: Tensor, path: Path, milliseconds: int = 120) -> None:
    """Write uint8 images [N, C, H, W] as an animation there and back without end, whole or not at all."""
    frames = [
        Image.fromarray(grid(image[None].cpu()).permute(1, 2, 0).squeeze(2).numpy())
        for image in [*images, *images.flip(0)[1:-1]]
    ]
    with atomic_write(path) as temporary:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0
        )

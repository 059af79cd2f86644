"""Reading and writing of images, grids and animations."""

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

from diffusion_cli.captions import Captions, captioned, class_name, enlargement
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.formats import Completed, SampleFormat, Shape, Uint8Image
from diffusion_cli.formats.files import is_gray, opened
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.untrusted import read, reason

PLAIN = Captions()
PAIRS_IN_ROW = 8  # condition images, with their samples and originals below
LONGEST_ROW = 10  # most images of a class that stay in one row
SHORTEST, LARGEST = 32, 256  # pixels to which an image in a grid is enlarged, of its short and long side
WRITERS = 4  # threads, which mostly wait for the disk


class Writer:
    """Context manager that writes files in background threads.

    Exiting it waits for all files. The first error of a write is raised at a later call or on exit, unless another
    exception is being raised.

    Args:
        waiting: maximum number of files in the queue.
    """

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self._under_way: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(WRITERS)
        return self

    def __call__(self, save: Callable[..., None], *arguments: Any) -> None:
        """Queue the call `save(*arguments)`, waiting until the queue has room."""
        self._look(self.waiting - 1)
        self._under_way.append(self._pool.submit(save, *arguments))

    def _look(self, most: int) -> None:
        """Remove finished files from the queue, and wait until at most `most` are left."""
        while self._under_way and (len(self._under_way) > most or self._under_way[0].done()):
            self._under_way.popleft().result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if kind is None:
            self._look(0)


def grid(images: Tensor, columns: int | None = None, captions: Captions = PLAIN) -> Tensor:
    """Arrange uint8 images [N, C, H, W] in a grid, one pixel apart, as [C, H', W'].

    Small images are enlarged by an integer factor, to at least 32 pixels high and wide unless they are much longer, and
    to the width of the names of columns.

    Args:
        images: the images.
        columns: images per row; None: a square grid.
        captions: words in the margins at the left and at the top.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    return rows(images.split(columns), captions)


def stacked(groups: Sequence[tuple[Sequence[Tensor], Captions]]) -> Tensor:
    """Arrange groups of rows below each other, each with its captions, as `rows` does; all are enlarged alike."""
    words = [word for _, captions in groups for word in captions.columns]
    pictures = [rows(images, captions, words) for images, captions in groups]
    width = max(picture.shape[2] for picture in pictures)
    return torch.cat([F.pad(one, (0, width - one.shape[2]), value=255) for one in pictures], dim=1)


def rows(images: Sequence[Tensor], captions: Captions = PLAIN, words: Sequence[str] = ()) -> Tensor:
    """Arrange rows of uint8 images, each [n, C, H, W] with any n, as `grid` does.

    Args:
        images: the rows.
        captions: words in the margins.
        words: words besides those of the columns to whose width the images are enlarged.
    """
    columns = max(map(len, images))
    blanks = [row.new_full((columns - len(row), *row.shape[1:]), 255) for row in images]
    cells = torch.stack([torch.cat(pair) for pair in zip(images, blanks, strict=True)])
    short, long = sorted(cells.shape[-2:])
    scale = max(1, min(math.ceil(SHORTEST / short), LARGEST // long))
    scale *= enlargement([*captions.columns, *words], scale * cells.shape[-1], scale * cells.shape[-2])
    cells = cells.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    framed = F.pad(cells, (1, 1, 1, 1), value=255)
    lines, columns, channels, height, width = framed.shape
    picture = framed.permute(2, 0, 3, 1, 4).reshape(channels, lines * height, columns * width)
    return captioned(picture, captions, (height, width)) if any(captions) else picture


def by_class(
    images: Tensor,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    names: Sequence[str] | None,
    *,
    always: bool = False,
) -> tuple[list[Tensor], Captions]:
    """Return rows of images for `save_rows`: the rows of each class, with its name, else a square without words.

    Args:
        images: images [N, C, H, W].
        seeds: seed of each image; seed n has the class labels[n mod K].
        labels: classes in turn; None without classes.
        names: names of the classes, if known.
        always: rows of classes even if there are fewer than two images per class.
    """
    columns = math.ceil(math.sqrt(len(images)))
    classes = list(dict.fromkeys(labels or []))
    if labels is None or (2 * len(classes) > len(images) and not always):
        return list(images.split(columns)), PLAIN
    lines: list[Tensor] = []
    words: list[str] = []
    members = {
        label: [place for place, seed in enumerate(seeds) if labels[seed % len(labels)] == label]
        for label in classes
    }
    most = max(map(len, members.values()))
    columns = most if most <= LONGEST_ROW else columns
    for label, mine in members.items():
        if mine:
            parts = images[mine].split(columns)
            lines += parts
            words += [class_name(label, names), *[""] * (len(parts) - 1)]
    return lines, Captions(words)


def as_image(condition: Tensor, channels: int) -> Tensor:
    """Return condition images [B, C', *sizes] with the channels of the images, to show: the first ones, or gray."""
    if condition.shape[1] >= channels:
        return condition[:, :channels]
    return condition[:, :1].expand(-1, channels, *condition.shape[2:])


def beside_originals(conditions: Tensor, samples: Tensor, originals: Tensor) -> tuple[list[Tensor], Captions]:
    """Return rows of images [N, C, H, W] for `save_rows`: condition images, samples and originals below each other."""
    lines = [part.split(PAIRS_IN_ROW) for part in (conditions, samples, originals)]
    rows = [row for group in zip(*lines, strict=True) for row in group]
    return rows, Captions(["condition", "sample", "original"] * len(lines[0]))


def read_images(files: Sequence[Path]) -> Tensor:
    """Return image files of one size, uint8 [N, C, H, W]; UsageError names an invalid file, or one of another size."""
    with _naming(files[0]):
        first = opened(read(files[0]))
    return read_stored(files, Uint8Image(), (1 if is_gray(first) else 3, first.height, first.width))


def read_stored(files: Sequence[Path], form: SampleFormat, shape: Shape) -> Tensor:
    """Return saved samples of a format and shape, [N, *shape]; UsageError names an invalid file."""
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
        raise UsageError(file, NO_VALUE, reason(error), "move it away to create it again") from error


def save_stored(sample: Tensor, path: Path, form: SampleFormat) -> None:
    """Write a stored sample [*shape] in a format, atomically, after its further files."""
    for suffix, data in form.beside(sample.cpu()).items():
        with atomic_write(path.with_suffix(suffix)) as temporary:
            temporary.write_bytes(data)
    with atomic_write(path) as temporary:
        form.write(sample.cpu(), temporary)


def save_completed(completed: Completed, path: Path) -> None:
    """Write a result with the known values of its input, atomically."""
    with atomic_write(path) as temporary:
        completed.write(temporary)


def save_png(image: Tensor, path: Path) -> None:
    """Write a uint8 image [C, H, W] with 1 or 3 channels as PNG, atomically."""
    save_stored(image, path, Uint8Image())


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Write a grid of uint8 images [N, C, H, W] as PNG."""
    save_png(grid(images.cpu(), columns), path)


def save_rows(images: Sequence[Tensor], path: Path, captions: Captions = PLAIN) -> None:
    """Write rows of uint8 images, each [n, C, H, W], as PNG with captions."""
    save_png(rows([row.cpu() for row in images], captions), path)


def save_gif(images: Tensor, path: Path, milliseconds: int = 120, names: Sequence[str] = ()) -> None:
    """Write uint8 images [N, C, H, W] as a looping GIF that plays forwards and backwards, atomically.

    Args:
        images: the frames.
        path: the file.
        milliseconds: time of a frame.
        names: words above each frame.
    """
    strip = rows([images.cpu()], Captions(columns=names)).chunk(len(images), dim=2)  # frames of one size
    frames = [
        Image.fromarray(frame.permute(1, 2, 0).squeeze(2).numpy()) for frame in [*strip, *strip[::-1][1:-1]]
    ]
    with atomic_write(path) as temporary:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0
        )

"""An endless, seekable stream of training batches, the same for any number of processes."""

import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, tee
from pickle import PicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from diffusion_cli.conditions import Condition
from diffusion_cli.data.base import Images
from diffusion_cli.data.memory import MemoryImages, to_device
from diffusion_cli.errors import NO_VALUE, MachineError, UsageError
from diffusion_cli.system.seeding import mix
from diffusion_cli.system.signals import STOPPING

AHEAD = 2  # batches that a thread prefetches


class Batch(NamedTuple):
    """B images with conditions and row numbers, all on one device."""

    number: int
    """Index k of the batch in the stream."""
    images: Tensor
    """float32 [B, C, H, W] in [-1, 1]."""
    condition: Condition | None
    """Conditions of the images, or None without any."""
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  # overrides tuple.index
    """Rows of the images in the dataset, int64 [B]."""
    labels: Tensor | None = None
    """Class labels, int64 [B], -1 for a missing one; None without classes. A condition may use "label" otherwise."""

    def part(self, share: Tensor) -> "Batch":
        """Return the batch of the images at positions `share` (int64)."""
        condition = None if self.condition is None else self.condition.rows(share)
        labels = None if self.labels is None else self.labels[share]
        return Batch(self.number, self.images[share], condition, self.index[share], labels)


class Together(Images):
    """Images with others of the same rows and sizes as further channels, so that they are read and flipped together.

    Args:
        images: the images.
        others: the other images, by name.
    """

    def __init__(self, images: Images, others: Mapping[str, Images]) -> None:
        self.images, self.others = images, others
        self.channels = [images.shape[0], *(each.shape[0] for each in others.values())]
        self.shape = (sum(self.channels), *images.shape[1:])
        self.labels, self.device = None, images.device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        parts = [each[index.to(each.device)] for each in (self.images, *self.others.values())]
        if len({part.dtype for part in parts}) > 1:
            parts = [to_model_range(part) for part in parts]
        return torch.cat([part.to(self.device) for part in parts], 1)

    def divided(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the images, and the others by name, of pixels [B, *shape]."""
        images, *others = pixels.split(self.channels, 1)
        return images, dict(zip(self.others, others, strict=True))


def _in_memory(images: Images) -> bool:
    """Return whether images are in memory, all on one device."""
    parts = [images.images, *images.others.values()] if isinstance(images, Together) else [images]
    return all(isinstance(part, MemoryImages) and part.device == images.device for part in parts)


class UnreadableError(MachineError):
    """Images that could be read at the start can no longer be read."""


class Batches:
    """Endless batches k = start, start + 1, ..., each a function of (images, batch_size, seed, k) alone.

    Batch k is the positions k B .. (k + 1) B - 1 of an endless stream; position p is row `order(p // N)[p % N]`.
    Every epoch is a permutation of the N rows, and batches run across epoch boundaries.

    Args:
        images: the images of one split.
        batch_size: batch size B over all processes; a multiple of `world_size`.
        seed: seed of the permutations and the flips.
        flip: whether to flip each image horizontally with probability 1/2.
        start: index of the first batch.
        rank: index of this process, which gets its contiguous slice of each batch.
        world_size: number of processes. The union of their slices is the batch of a single process.
        device: device of the batches; None: that of the images. Images in memory are moved there once.
        num_workers: worker processes that prefetch images from disk; 0: threads of this process.
        parts: number of consecutive batches that form one larger batch; the flips do not depend on it.
        skipped: positions of the stream to skip, as after batches of another size.
        repeats: number of times in a row that a larger batch of `parts` is given.

    Raises:
        UsageError: there are no images, or the batch size is not a multiple of `world_size`.
        UnreadableError: images cannot be read, while iterating.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        seed: int,
        flip: bool,
        *,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str | None = None,
        num_workers: int = 0,
        parts: int = 1,
        skipped: int = 0,
        repeats: int = 1,
    ) -> None:
        if len(images) == 0:
            raise UsageError("dataset", NO_VALUE, "this split has no images")
        if batch_size % world_size:
            raise UsageError(
                "batch_size",
                batch_size,
                f"must be a multiple of the number of processes, {world_size}",
            )
        self.device = images.device if device is None else torch.device(device)
        self.images = to_device(images, self.device)
        self.batch_size, self.seed, self.flip, self.start = batch_size, seed, flip, start
        self.parts, self.skipped, self.repeats = parts, skipped, repeats
        self.share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        beside = {
            name: source.beside
            for name, source in self.images.conditions.items()
            if source.beside is not None
        }
        self.read = Together(self.images, beside) if beside else self.images
        self.num_workers = 0 if _in_memory(self.read) else num_workers
        self._order = (-1, torch.empty(0, dtype=torch.int64))

    def __iter__(self) -> Iterator[Batch]:
        once, kept = self._once(), deque[Batch](maxlen=self.parts if self.repeats > 1 else 1)
        for k in count(self.start):
            source = self.source(k)
            while not kept or kept[-1].number < source:
                kept.append(next(once))
            yield kept[source - kept[-1].number - 1]._replace(number=k)

    def _once(self) -> Iterator[Batch]:
        """Yield the batches without their repetitions, so that each is read once, from the step of the first one."""
        for k, rows, pixels in self._fetch():
            # Transfer and flip uint8 pixels before the cast: a quarter of the bytes.
            pixels = pixels.to(self.device, non_blocking=True)
            if self.flip:
                pixels = self.images.hflip(
                    pixels, self.flip_mask(k)[self.share].to(self.device, non_blocking=True)
                )
            images, beside = to_model_range(pixels), {}
            if isinstance(self.read, Together):
                images, beside = self.read.divided(images)
            draw = mix(self.seed, "condition", k // self.parts)
            condition = self.images.condition(rows, images, draw, beside)
            labels = self.images.labels_of(rows, self.device)
            yield Batch(k, images, condition, rows.to(self.device, non_blocking=True), labels)

    def source(self, k: int) -> int:
        """Return the index that batch k would have without repetitions."""
        step, part = divmod(k, self.parts)
        return step // self.repeats * self.parts + part

    def rows(self, k: int) -> Tensor:
        """Return the dataset rows of batch k over all processes, without repetitions, int64 [batch_size]."""
        size, position = len(self.images), self.skipped + k * self.batch_size
        end = position + self.batch_size
        pieces = []
        while position < end:
            epoch, offset = divmod(position, size)
            pieces.append(self.order(epoch)[offset : offset + end - position])
            position += len(pieces[-1])
        return torch.cat(pieces)

    def order(self, epoch: int) -> Tensor:
        """Return the permutation of the rows in an epoch, a function of (seed, epoch, N)."""
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, "order", epoch))
            self._order = (epoch, torch.randperm(len(self.images), generator=generator))
        return self._order[1]

    def flip_mask(self, k: int) -> Tensor:
        """Return which images of batch k over all processes are flipped, as `rows`, int64 [batch_size] of 0 and 1."""
        step, part = divmod(k, self.parts)
        generator = torch.Generator().manual_seed(mix(self.seed, "flip", step))
        flips = torch.randint(2, (self.parts * self.batch_size,), generator=generator)
        return flips[part * self.batch_size : (part + 1) * self.batch_size]

    def _stream(self) -> Iterator[tuple[int, Tensor]]:
        for k in count(self.source(self.start - self.start % self.parts)):
            yield k, self.rows(k)[self.share]

    def _fetch(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (k, rows, pixels) of this process's slice of every batch."""
        stream, ahead = tee(self._stream())
        # The iterator has no name: a traceback that references this frame would keep the worker processes alive.
        for (k, these), pixels in zip(
            stream,
            fetched(self.read, (rows for _, rows in ahead), self.num_workers, self.device),
            strict=False,
        ):
            if isinstance(pixels, Exception):
                raise UnreadableError(str(pixels)) from pixels
            yield k, these, pixels


def fetched(
    images: Images,
    rows: Iterable[Tensor],
    num_workers: int,
    device: torch.device | str = "cpu",
    key: str = "dataset.num_workers",
) -> Iterator["Fetched"]:
    """Yield the pixels of each item of `rows` (int64 [B]) in order, prefetched for `device`.

    Images on disk are read by `num_workers` processes, or by a thread if 0; images in memory are indexed directly.
    Raises UnreadableError, which names `key`, if a worker process dies.
    """
    pin = torch.device(device).type == "cuda"
    if _in_memory(images) and images.device.type == torch.device(device).type:
        return map(_Fetcher(images).fetch, rows)
    return (
        _from_workers(images, rows, num_workers, pin, key) if num_workers else _from_thread(images, rows, pin)
    )


def _from_thread(images: Images, rows: Iterable[Tensor], pin: bool) -> Iterator["Fetched"]:
    thread = ThreadPoolExecutor(1)
    fetch = _Fetcher(images, pin).fetch
    coming: deque[Future[Fetched]] = deque()
    try:
        for these in rows:
            coming.append(thread.submit(fetch, these))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def _from_workers(
    images: Images, rows: Iterable[Tensor], num_workers: int, pin: bool, key: str
) -> Iterator["Fetched"]:
    # More workers than cores are no mistake: they wait for the disk.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    loader: Iterable = DataLoader(
        _Fetcher(images, key=key),
        sampler=(these.tolist() for these in rows),  # lists: tensors would use shared memory
        batch_size=None,  # each item is a whole batch
        num_workers=num_workers,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # the default would draw from the global generator
    )
    try:
        iterator = _deaf_to_deaths(loader)
    except (PicklingError, AttributeError, TypeError) as error:  # a dataset of the user, without fork
        problem = f"the dataset cannot be sent to other processes ({' '.join(str(error).split())})"
        raise UsageError(
            key, num_workers, problem, "set 0, or define its functions at the top of a module"
        ) from error
    while True:
        try:
            item = next(iterator, None)
        except (RuntimeError, OSError, EOFError) as error:  # errors of images are returned as items
            raise UnreadableError(
                f"{key}={num_workers}: a worker process died ({' '.join(str(error).split())}), possibly out of memory; "
                "use fewer workers, or 0"
            ) from error
        if item is None:
            return
        yield item


def _deaf_to_deaths(loader: Iterable[Any]) -> Iterator[Any]:
    """Return an iterator over `loader` without torch's SIGCHLD handler.

    The handler would raise in the middle of unrelated code, such as the writing of a checkpoint. The death of a
    worker is noticed anyway when the next batch is due.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return iter(loader)  # torch installs no handler here
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    signal.signal(signal.SIGCHLD, before)
    return iterator


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which reach the whole process group; only the parent may end a run."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


Fetched = Tensor | Exception
"""Pixels, or the error that prevented reading them; a worker that raised would show the user a traceback."""


class _Fetcher(MapDataset):
    """Map-style dataset from rows to pixels, run by worker processes."""

    def __init__(self, images: Images, pin: bool = False, key: str = "") -> None:
        self.images, self.pin, self.key = images, pin, key

    def fetch(self, rows: Tensor) -> Fetched:
        """Return the pixels of the rows of a batch, pinned if `pin`."""
        try:
            pixels = self.images[rows.to(self.images.device, non_blocking=True)]
        except (OSError, ValueError) as error:
            return error
        return pixels.pin_memory() if self.pin else pixels

    def __getitem__(self, rows: list[int]) -> Fetched:
        pixels = self.fetch(torch.tensor(rows))
        if isinstance(pixels, Tensor):
            try:
                pixels.share_memory_()  # here, because the parent would wait forever if the queue failed to do it
            except RuntimeError as error:
                return OSError(f"{self.key}: shared memory is full ({error}); enlarge /dev/shm, or set 0")
        return pixels


def to_model_range(images: Tensor) -> Tensor:
    """Map uint8 pixels 0..255 to float32 x / 127.5 - 1 in [-1, 1]; return floating-point images unchanged."""
    if images.is_floating_point():
        return images
    return images.to(torch.float32).div_(127.5).sub_(1)

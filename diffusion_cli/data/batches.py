"""An endless, seekable stream of training batches, the same for any number of processes."""

import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, tee
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from diffusion_cli.data.base import Images
from diffusion_cli.data.memory import MemoryImages, to_device
from diffusion_cli.errors import NO_VALUE, MachineError, UsageError
from diffusion_cli.system.seeding import mix
from diffusion_cli.system.signals import STOPPING

AHEAD = 2  # batches that a thread reads while the last one is worked on


class Batch(NamedTuple):
    """B images with what is known about them, all on one device."""

    number: int
    """The batch's place k in the stream."""
    images: Tensor
    """float32 [B, C, H, W] in [-1, 1]."""
    labels: Tensor | None
    """int64 [B], or None without classes."""
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  # a tuple has a method of this name
    """int64 [B], the rows of the dataset that the images are."""

    def part(self, share: Tensor) -> "Batch":
        """Those of its images at the places `share`, int64."""
        labels = None if self.labels is None else self.labels[share]
        return Batch(self.number, self.images[share], labels, self.index[share])


class UnreadableError(MachineError):
    """Images that were there at the start cannot be read any more."""


class Batches:
    """The batches k = start, start + 1, ... without end, each a function of (images, batch_size, seed, k).

    Batch k holds the positions k B .. (k + 1) B - 1 of an endless stream, in which position p is row
    `order(p // N)[p % N]`: every epoch is a permutation of the N rows, and batches run across its end.
    With `flip`, each image is mirrored left to right with probability 1/2. Where they are the `parts` that larger
    batches are cut into, what is mirrored does not depend on the cut.

    With `skipped` the stream has moved on by so many more positions, as where earlier batches were of another size.

    `batch_size` is that of all `world_size` processes together; process `rank` gets its contiguous share, so
    that the union of the shares is the batch of a single process. Images held in memory are moved to `device`
    once and batched there; others are read ahead, by `num_workers` processes (0: by threads of this one).

    Raises UsageError if there are no images, or the batch cannot be shared out evenly; while iterating,
    UnreadableError.
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
    ) -> None:
        if len(images) == 0:
            raise UsageError("dataset", NO_VALUE, "this split has no images to make batches of")
        if batch_size % world_size:
            raise UsageError(
                "batch_size",
                batch_size,
                f"is the size over all processes and must be a multiple of their number, {world_size}",
            )
        self.device = images.device if device is None else torch.device(device)
        self.images = to_device(images, self.device)
        self.batch_size, self.seed, self.flip, self.start = batch_size, seed, flip, start
        self.parts, self.skipped = parts, skipped
        self.share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.num_workers = 0 if isinstance(self.images, MemoryImages) else num_workers
        self._order = (-1, torch.empty(0, dtype=torch.int64))

    def __iter__(self) -> Iterator[Batch]:
        for k, rows, pixels in self._fetch():
            # Pixels travel as uint8, and are flipped before they are cast: a quarter of the bytes.
            pixels = pixels.to(self.device, non_blocking=True)
            if self.flip:
                pixels = self.images.hflip(
                    pixels, self.flip_mask(k)[self.share].to(self.device, non_blocking=True)
                )
            labels = self.images.labels
            if labels is not None:
                labels = labels[rows.to(labels.device, non_blocking=True)].to(self.device, non_blocking=True)
            yield Batch(k, to_model_range(pixels), labels, rows.to(self.device, non_blocking=True))

    def rows(self, k: int) -> Tensor:
        """The rows of the dataset in batch k of all processes together, int64 [batch_size]."""
        size, position = len(self.images), self.skipped + k * self.batch_size
        end = position + self.batch_size
        pieces = []
        while position < end:
            epoch, offset = divmod(position, size)
            pieces.append(self.order(epoch)[offset : offset + end - position])
            position += len(pieces[-1])
        return torch.cat(pieces)

    def order(self, epoch: int) -> Tensor:
        """The permutation of the rows in one epoch, a function of (seed, epoch) and their number."""
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, "order", epoch))
            self._order = (epoch, torch.randperm(len(self.images), generator=generator))
        return self._order[1]

    def flip_mask(self, k: int) -> Tensor:
        """Which images of batch k of all processes are mirrored, int64 [batch_size] of 0 and 1."""
        step, part = divmod(k, self.parts)
        generator = torch.Generator().manual_seed(mix(self.seed, "flip", step))
        flips = torch.randint(2, (self.parts * self.batch_size,), generator=generator)
        return flips[part * self.batch_size : (part + 1) * self.batch_size]

    def _stream(self) -> Iterator[tuple[int, Tensor]]:
        for k in count(self.start):
            yield k, self.rows(k)[self.share]

    def _fetch(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """This process's share of every batch, as (k, rows, pixels)."""
        stream, ahead = tee(self._stream())
        # Named nowhere: a traceback that keeps this frame would keep the worker processes with it.
        for (k, these), pixels in zip(
            stream,
            fetched(self.images, (rows for _, rows in ahead), self.num_workers, self.device),
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
    """The pixels of each of the `rows` (int64 [B]) of images that go to `device`, in that order, read ahead.

    They are read by processes, or with `num_workers` 0 by a thread; those in memory where they are wanted, by neither.
    Raises UnreadableError, about `key`, if a process dies.
    """
    pin = torch.device(device).type == "cuda"
    if isinstance(images, MemoryImages) and images.device.type == torch.device(device).type:
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
    loader: Iterable = DataLoader(
        _Fetcher(images, key=key),
        sampler=(these.tolist() for these in rows),  # plain numbers: a tensor would take shared memory too
        batch_size=None,  # every item is a whole batch already
        num_workers=num_workers,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # otherwise a draw from the global one
    )
    iterator = _deaf_to_deaths(loader)
    while True:
        try:
            item = next(iterator, None)
        except (RuntimeError, OSError, EOFError) as error:  # what befalls images comes as an item
            raise UnreadableError(
                f"{key}={num_workers}: a process that reads the images has died "
                f"({' '.join(str(error).split())}), as where memory runs out; take fewer, or 0"
            ) from error
        if item is None:
            return
        yield item


def _deaf_to_deaths(loader: Iterable[Any]) -> Iterator[Any]:
    """The iterator of a loader, without the signal handler by which torch raises wherever the program is.

    It would pass for a fault of what is interrupted, as a checkpoint's writing. The death shows all the same, where
    the next batch is waited for.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return iter(loader)  # torch sets none either
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    signal.signal(signal.SIGCHLD, before)
    return iterator


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; only the parent knows how to end a run."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


Fetched = Tensor | Exception
"""Pixels; or why there are none, which raised in a worker would reach the user as a traceback of text."""


class _Fetcher(MapDataset):
    """Rows in, pixels out: what a worker process runs."""

    def __init__(self, images: Images, pin: bool = False, key: str = "") -> None:
        self.images, self.pin, self.key = images, pin, key

    def fetch(self, rows: Tensor) -> Fetched:
        """The pixels of the rows of a batch; with `pin` in memory that a GPU copies from by itself."""
        try:
            pixels = self.images[rows.to(self.images.device, non_blocking=True)]
        except (OSError, ValueError) as error:
            return error
        return pixels.pin_memory() if self.pin else pixels

    def __getitem__(self, rows: list[int]) -> Fetched:
        pixels = self.fetch(torch.tensor(rows))
        if isinstance(pixels, Tensor):
            try:
                pixels.share_memory_()  # now: where the queue finds no room for it, the parent waits for ever
            except RuntimeError as error:
                return OSError(
                    f"{self.key}: no room to pass images on ({error}); enlarge /dev/shm, or take 0"
                )
        return pixels


def to_model_range(images: Tensor) -> Tensor:
    """Bytes 0..255 as float32 x / 127.5 - 1 in [-1, 1], both ends exact; real numbers as they are."""
    if images.is_floating_point():
        return images
    return images.to(torch.float32).div_(127.5).sub_(1)

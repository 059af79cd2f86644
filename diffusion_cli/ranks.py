"""Several processes at one piece of work: each does its share, and what they made is put together in order."""

import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessException, start_processes

T = TypeVar("T")
MESSAGES = (ValueError, OSError, ImportError)


class Ranks:
    """The processes of this program that work together: those of torch's process group, or this one alone."""

    def __init__(self) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.world = distributed.get_world_size() if together else 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, item: T) -> list[T]:
        """What each process gave, in the order of their ranks; tensors should be on the CPU."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        distributed.all_gather_object(items, item)
        return items

    def agree(self, item: T) -> T:
        """What the first process gave."""
        return self.gather(item)[0]

    def one_by_one(self, make: Callable[[], T]) -> T:
        """What `make` returns, called by the first process before the others, which find what it has stored."""
        made = make() if self.first else None
        self.gather(None)
        return make() if made is None else made


def run_in_processes(count: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Call `work(*arguments)` in `count` new processes that form a group; what one of them raises is raised here.

    Each has its share of the CPU's threads, and a GPU of its own as far as there are.
    """
    errors = get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        processes = start_processes(
            _join,
            (count, torch.get_num_threads(), meeting, errors, work, arguments),
            nprocs=count,
            join=False,
            start_method="spawn",
        )
        assert processes is not None
        try:
            while not processes.join():
                pass
        except ProcessException:
            if errors.empty():
                raise
            raise errors.get() from None


def _join(
    rank: int, count: int, threads: int, meeting: str, errors: Any, work: Callable[..., Any], arguments: Any
) -> None:
    """Be one of the processes."""
    torch.set_num_threads(max(1, threads // count))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:  # the name of the machine need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    try:
        distributed.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=count, timeout=timedelta(days=7)
        )
        work(*arguments)
        distributed.barrier()
        distributed.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, MESSAGES):
            traceback.print_exc()
        with suppress(Exception):  # what cannot be sent has been printed
            errors.put(error)
        sys.exit(1)

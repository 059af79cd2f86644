"""Several processes at one piece of work: each does its share, and what they made is put together in order.

They are those that torchrun or srun started, on any number of nodes, or such as this program starts itself on this
machine. A process that fails says why and ends, and with it all others: those that wait for it learn at once that it is
gone, are ended after `GRACE` seconds by whoever started them, and where a whole node falls silent after `timeout`.
"""

import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import ProcessContext, ProcessException, start_processes

from diffusion_cli.errors import NO_VALUE, MachineError, UsageError, first_line
from diffusion_cli.system.compat import count_in_group
from diffusion_cli.system.signals import STOPPING, end, handling
from diffusion_cli.system.terminal import guarded, lost_output

T = TypeVar("T")
MESSAGES = (UsageError, OSError)
PARENT_CHECK = 0.5  # seconds between two looks of a new process whether the one that started it is there
GRACE = 10.0  # seconds that processes have to end by themselves once one of them has failed
FOREVER = timedelta(days=7)  # for what the first process does alone may take long


class LostProcess(MachineError):
    """Another of the processes that work together has ended."""


class ProcessInfo(NamedTuple):
    """Where a process stands among those that work together."""

    rank: int
    world: int
    local_rank: int = 0
    """Among those of its node."""
    local_world: int = 1

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return self.world // self.local_world


def started() -> ProcessInfo:
    """Where torchrun or srun put this process; Place(0, 1) where it was started alone.

    Raises UsageError where srun has put more processes on one node than on another.
    """
    env = os.environ
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= env.keys():
        world = int(env["WORLD_SIZE"])
        return ProcessInfo(
            int(env["RANK"]), world, int(env["LOCAL_RANK"]), int(env.get("LOCAL_WORLD_SIZE", world))
        )
    if "SLURM_STEP_ID" in env:  # within srun; a batch script's own process has no step
        tasks = _counts(env["SLURM_STEP_TASKS_PER_NODE"])
        if len(set(tasks)) > 1:
            raise UsageError(
                "srun",
                NO_VALUE,
                f"started {env['SLURM_STEP_TASKS_PER_NODE']} tasks per node",
                "start the same number on each node with --ntasks-per-node",
            )
        return ProcessInfo(int(env["SLURM_PROCID"]), sum(tasks), int(env["SLURM_LOCALID"]), tasks[0])
    return ProcessInfo(0, 1)


def _counts(text: str) -> list[int]:
    """SLURM's way to write numbers: "2(x3),1" is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _first_host(hosts: str) -> str:
    """The first of the hosts in SLURM's way to write them: "gpu[007-009,12],b1" begins with gpu007."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", hosts)
    assert match is not None, hosts
    return "".join(part or "" for part in match.groups())


def _address() -> str:
    """Where the first process of srun is: its node by name or, where no network knows that, the node of srun itself."""
    first = _first_host(os.environ["SLURM_STEP_NODELIST"])
    try:
        return socket.gethostbyname(first)
    except OSError:
        return os.environ["SLURM_LAUNCH_NODE_IPADDR"]


class Distributed:
    """The processes of this program that work together: those of torch's process group, or this one alone."""

    def __init__(self) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.world = distributed.get_world_size() if together else 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def all_gather(self, item: T) -> list[T]:
        """What each process gave, in the order of their ranks; tensors should be on the CPU."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        distributed.all_gather_object(items, item)
        return items

    def gather(self, item: T) -> list[T]:
        """What each process gave, for the first; nothing for the others."""
        if self.world == 1:
            return [item]
        items: list[Any] | None = [None] * self.world if self.is_main else None
        distributed.gather_object(item, items)
        return items or []

    def broadcast(self, item: T) -> T:
        """What the first process gave."""
        return self.all_gather(item)[0]

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Each number where it is highest among the processes; waits for these, never for their GPUs."""
        if self.world == 1:
            return list(numbers)
        votes = torch.tensor(numbers)
        distributed.all_reduce(votes, distributed.ReduceOp.MAX)
        return votes.tolist()

    def concatenated(self, tensor: Tensor) -> Tensor:
        """The tensors [B, ...] of all processes, of one shape and on one kind of device, as [world * B, ...]."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def shard(self, count: int, size: int) -> Iterator[range]:
        """This process's share of each round, in which all take in turn `size` of the things 0..count - 1."""
        for first in range(0, count, size * self.world):
            mine = first + self.rank * size
            yield range(min(mine, count), min(mine + size, count))

    def main_first(self, make: Callable[[], T]) -> T:
        """What `make` returns, called by the first process before the others, which find what it has stored."""
        made = make() if self.is_main else None
        self.all_gather(None)
        return make() if made is None else made


def launch(
    work: Callable[..., int | None], *arguments: Any, processes: int | None, timeout: timedelta = FOREVER
) -> int:
    """Call `work(*arguments)` in every process, and return what the first one's call did (None: 0).

    The processes are those that torchrun or srun started; else so many `processes` (None: 1) of this machine, which
    are started now, each with its share of the CPU's threads. Each has a GPU of its own as far as there are. What one
    of them raises is raised here, once. Raises UsageError where other processes were started than asked for.
    """
    place = started()
    if place.world > 1:
        if processes not in (None, place.world):
            raise UsageError(
                "processes", processes, f"torchrun or srun started {place.world}", "leave it null"
            )
        return _as_one_of(place, timeout, work, arguments)
    if processes is not None and processes > 1:
        return _in_new_processes(processes, timeout, work, arguments)
    return work(*arguments) or 0


def _as_one_of(
    place: ProcessInfo, timeout: timedelta, work: Callable[..., int | None], arguments: tuple[Any, ...]
) -> int:
    """Work as one of the processes that a launcher started, each of which runs this."""
    env = os.environ
    if "SLURM_STEP_ID" in env:
        job, step = int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"])
        env.setdefault("MASTER_ADDR", _address() if place.nodes > 1 else "127.0.0.1")
        env.setdefault("MASTER_PORT", str(15000 + (17 * job + step) % 15000))
    with _group(place, "env://", timeout):
        try:
            return _finished(work(*arguments))
        except Exception as error:
            lost = lost_process(error)
            if lost is None and not isinstance(error, MESSAGES):
                raise
            if _is_reported():
                sys.exit(1)
            raise lost or error from error


def _is_reported() -> bool:
    """Whether another process has reported a failure; marks it as reported."""
    try:
        return count_in_group("failures") > 1
    except RuntimeError:  # the first process keeps the store, and has gone
        return False


def lost_process(error: Exception) -> LostProcess | None:
    """What an error of torch's says about another process that has ended, or None if it is about something else."""
    text = str(error)
    of_group = isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and re.search(r"gloo|nccl", text, re.IGNORECASE)
    )
    # Of a connection that ended, or of a wait that did: not of memory, or of a set-up that cannot work.
    if not of_group or not re.search(r"clos|reset|time|broken|refused|remote|peer", text, re.IGNORECASE):
        return None
    return LostProcess(
        f"processes: one of them ended, so all stopped ({first_line(error)}); run the same command again to continue"
    )


@contextmanager
def _group(place: ProcessInfo, meeting: str, timeout: timedelta) -> Iterator[None]:
    """Be one of a group: tensors on the CPU travel by gloo, those on GPUs by NCCL."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback and place.nodes == 1:  # the name of the machine need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    try:
        distributed.init_process_group(
            backend, init_method=meeting, rank=place.rank, world_size=place.world, timeout=timeout
        )
    except RuntimeError as error:
        raise LostProcess(
            f"processes: could not connect all {place.world} ({first_line(error)}); check that all were started, "
            "and that MASTER_ADDR and MASTER_PORT are free and reachable"
        ) from error
    yield
    distributed.destroy_process_group()


def _finished(code: int | None) -> int:
    """The first process's code, when all have done their work."""
    return Distributed().broadcast(code or 0)


def _in_new_processes(
    count: int, timeout: timedelta, work: Callable[..., int | None], arguments: tuple[Any, ...]
) -> int:
    with tempfile.TemporaryDirectory() as folder:
        outcome = Path(folder) / "outcome"
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # until they can be passed on
        processes = start_processes(
            _be_one,
            (_Start(count, torch.get_num_threads(), os.getpid(), Path(folder), timeout), work, arguments),
            nprocs=count,
            join=False,
            start_method="spawn",
        )
        assert processes is not None
        with _forwarding(processes) as forwarded:
            try:
                while not processes.join(grace_period=GRACE):
                    pass
            except ProcessException:
                if outcome.exists():
                    raise pickle.loads(outcome.read_bytes()) from None
                print(file=sys.stderr)  # the line of a progress bar that nobody has ended
                if forwarded:
                    raise KeyboardInterrupt from None
                raise _why(processes) from None
        return pickle.loads(outcome.read_bytes())


@contextmanager
def _forwarding(processes: ProcessContext) -> Iterator[list[int]]:
    """Pass signals on to the processes, which know how to end, and wait for them; gives a list of those passed on."""
    forwarded: list[int] = []

    def forward(number: int, frame: object) -> None:
        forwarded.append(number)
        for process in processes.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    with handling(forward):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        yield forwarded


def _why(processes: ProcessContext) -> LostProcess:
    """What to say of processes that have ended without a word."""
    codes = [process.exitcode for process in processes.processes]
    killed = [(rank, -code) for rank, code in enumerate(codes) if code is not None and code < 0]
    # SIGTERM is what those get here that do not end by themselves.
    rank, number = min(killed, key=lambda one: one[1] == signal.SIGTERM, default=(0, 0))
    how = f"was ended by {signal.Signals(number).name}" if number else "failed"
    hint = " (possibly out of memory)" if number == signal.SIGKILL else ""
    return LostProcess(
        f"processes: rank {rank} of {len(codes)} {how}{hint}, so all stopped; run the same command again to continue"
    )


class _Start(NamedTuple):
    """How new processes start."""

    world: int
    threads: int
    """Threads of the process that starts them, which they share."""
    parent: int
    """Number of that process."""
    folder: Path
    """Where they meet, and leave their outcome."""
    timeout: timedelta


def _be_one(rank: int, start: _Start, work: Callable[..., int | None], arguments: tuple[Any, ...]) -> None:
    """Be one of the new processes."""
    count, threads, parent, folder, timeout = start
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    _end_with(parent)
    os.setpgid(0, 0)  # Ctrl-C reaches the process that started this one, which passes it on: once, not twice
    here = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    os.environ.update({key: str(value) for key, value in here.items()})  # as torchrun does
    torch.set_num_threads(max(1, threads // count))
    try:
        with guarded(), _group(started(), (folder / "meeting").as_uri(), timeout):
            code = _finished(work(*arguments))
            lost = lost_output()
        if lost:
            raise MachineError(lost)
        if rank == 0:
            _leave(folder, code)
        end(0)
    except KeyboardInterrupt:
        end(128 + signal.SIGINT)
    except Exception as error:
        if lost_process(error) is None:
            if not isinstance(error, MESSAGES):
                traceback.print_exc()
            _leave(folder, error)
        end(1)


def _end_with(parent: int) -> None:
    """Have this process end, as by SIGTERM, once its parent has: also if that was before now."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _leave(folder: Path, outcome: int | Exception) -> None:
    """Leave what has come of the work to the process that started this one, unless another has been earlier."""
    with suppress(Exception):  # what cannot be sent has been printed
        data = pickle.dumps(outcome)
        with (folder / "outcome").open("xb") as file:
            file.write(data)

"""Work in several processes: each does its share, and results are collected in order.

torchrun or srun start the processes, on any number of nodes, or this program starts them on this machine. If
a process fails, it prints the error, and all processes end. Those that wait for it detect the closed
connection. The launcher ends the rest after `GRACE` seconds. If a node does not respond, they end after
`timeout`.
"""

import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import ProcessContext, ProcessException, start_processes

from diffusion_cli.errors import NO_VALUE, MachineError, UsageError, first_line
from diffusion_cli.system import fork_server
from diffusion_cli.system.compat import count_in_group
from diffusion_cli.system.machine import check_cores
from diffusion_cli.system.signals import block, end, forward, handling, leave_group
from diffusion_cli.system.terminal import guarded, lost_output

T = TypeVar("T")
R = TypeVar("R")
MESSAGES = (UsageError, OSError)
GRACE = 10.0  # seconds for processes to end by themselves after one has failed
FOREVER = timedelta(days=7)  # other processes may wait long for rank 0


class LostProcess(MachineError):
    """Another process of the group has ended."""


class ProcessInfo(NamedTuple):
    """The rank of a process in its group, and the size of the group."""

    rank: int
    world: int
    local_rank: int = 0
    """Rank among the processes of its node."""
    local_world: int = 1

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return self.world // self.local_world


def started() -> ProcessInfo:
    """Return the rank that torchrun or srun gave this process; ProcessInfo(0, 1) without a launcher.

    Raises UsageError if srun started unequal numbers of processes on the nodes.
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


def _publish(place: ProcessInfo) -> None:
    """Set the variables that torchrun sets, which Lightning reads."""
    here = {
        "RANK": place.rank, "WORLD_SIZE": place.world, "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": place.local_world, "GROUP_RANK": place.rank // place.local_world,
    }  # fmt: skip
    os.environ.update({key: str(value) for key, value in here.items()})


def _counts(text: str) -> list[int]:
    """Parse SLURM's list of numbers: "2(x3),1" is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _first_host(hosts: str) -> str:
    """Return the first host of SLURM's list of hosts: gpu007 of "gpu[007-009,12],b1"."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", hosts)
    assert match is not None, hosts
    return "".join(part or "" for part in match.groups())


def _address() -> str:
    """Return the address of rank 0 under srun: its node, or the node of srun if that does not resolve."""
    first = _first_host(os.environ["SLURM_STEP_NODELIST"])
    try:
        return socket.gethostbyname(first)
    except OSError:
        return os.environ["SLURM_LAUNCH_NODE_IPADDR"]


class Distributed:
    """The processes of torch's process group, or this process alone."""

    def __init__(self) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.world = distributed.get_world_size() if together else 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def all_gather(self, item: T) -> list[T]:
        """Return the items of all processes by rank; tensors must be on the CPU."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        distributed.all_gather_object(items, item)
        return items

    def gather(self, item: T) -> list[T]:
        """Return the items of all processes by rank on rank 0, and an empty list on the others."""
        if self.world == 1:
            return [item]
        items: list[Any] | None = [None] * self.world if self.is_main else None
        distributed.gather_object(item, items)
        return items or []

    def broadcast(self, item: T) -> T:
        """Return the item of rank 0."""
        return self.all_gather(item)[0]

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Return the maximum of each number over the processes, without synchronising GPUs."""
        if self.world == 1:
            return list(numbers)
        votes = torch.tensor(numbers)
        distributed.all_reduce(votes, distributed.ReduceOp.MAX)
        return votes.tolist()

    def concatenated(self, tensor: Tensor) -> Tensor:
        """Return the tensors [B, ...] of all processes, of equal shapes and devices, as [world * B, ...]."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def shard(self, count: int, size: int) -> Iterator[range]:
        """Yield this process's range in each round; each process takes `size` of the items 0..count - 1."""
        for first in range(0, count, size * self.world):
            mine = first + self.rank * size
            yield range(min(mine, count), min(mine + size, count))

    def main_first(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0, then on the others, which find what rank 0 stored; return the result."""
        made = make() if self.is_main else None
        self.all_gather(None)
        return make() if made is None else made


def launch(
    work: Callable[..., R | None],
    *arguments: Any,
    processes: int | None,
    device: str = "cpu",
    key: str = "processes",
    timeout: timedelta = FOREVER,
) -> R | int:
    """Call `work(*arguments)` in every process, and return the result of rank 0 (None: 0).

    The processes are those of torchrun or srun. Without a launcher, `processes` (None: 1) are started on this
    machine with an equal share of the CPU threads. GPUs are assigned in turn. An exception of a process is
    raised here, once.

    Raises UsageError, about `key`, if torchrun or srun started another number than `processes`, or if `device` (cpu,
    cuda or auto) means CPUs and this machine has fewer cores.
    """
    place = started()
    if place.world > 1:
        if processes not in (None, place.world):
            raise UsageError(key, processes, f"torchrun or srun started {place.world}", "leave it null")
        return _as_one_of(place, timeout, work, arguments)
    if processes is not None and processes > 1:
        if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
            check_cores(key, processes)
        return _in_new_processes(processes, timeout, work, arguments)
    return work(*arguments) or 0


def _as_one_of(
    place: ProcessInfo, timeout: timedelta, work: Callable[..., R | None], arguments: tuple[Any, ...]
) -> R | int:
    """Run the work as one of the processes of a launcher, which all call this."""
    env = os.environ
    if "SLURM_STEP_ID" in env:
        job, step = int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"])
        env.setdefault("MASTER_ADDR", _address() if place.nodes > 1 else "127.0.0.1")
        env.setdefault("MASTER_PORT", str(15000 + (17 * job + step) % 15000))
        _publish(place)
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
    """Return whether another process has reported a failure, and mark one as reported."""
    try:
        return count_in_group("failures") > 1
    except RuntimeError:  # rank 0, which serves the store, has ended
        return False


def lost_process(error: Exception) -> LostProcess | None:
    """Return a torch error as a LostProcess if it means that another process ended, else None."""
    text = str(error)
    of_group = isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and re.search(r"gloo|nccl", text, re.IGNORECASE)
    )
    # A closed connection or a timeout; errors of memory and of the set-up are other errors.
    if not of_group or not re.search(r"clos|reset|time|broken|refused|remote|peer", text, re.IGNORECASE):
        return None
    return LostProcess(
        f"processes: one of them ended, so all stopped ({first_line(error)}); run the same command again to continue"
    )


@contextmanager
def _group(place: ProcessInfo, meeting: str, timeout: timedelta) -> Iterator[None]:
    """Context of a process group, with gloo for CPU tensors and NCCL for GPU tensors."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback and place.nodes == 1:  # the host name may not resolve
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


def _finished(result: R | None) -> R | int:
    """Return the result of rank 0 once all processes have finished."""
    return Distributed().broadcast(result or 0)


def _in_new_processes(
    count: int, timeout: timedelta, work: Callable[..., R | None], arguments: tuple[Any, ...]
) -> R | int:
    with tempfile.TemporaryDirectory() as folder:
        outcome = Path(folder) / "outcome"
        block(True)  # until they can be forwarded
        # A forked process cannot use CUDA if an import of the server has called it.
        forks = fork_server.is_running() and not torch.cuda.is_available()
        start = _Start(count, torch.get_num_threads(), dict(os.environ), Path(folder), timeout)
        processes = start_processes(
            _be_one,
            (start, work, arguments),
            nprocs=count,
            join=False,
            start_method="forkserver" if forks else "spawn",
        )
        assert processes is not None
        with _forwarding(processes) as forwarded:
            try:
                while not processes.join(grace_period=GRACE):
                    pass
            except ProcessException:
                if outcome.exists() and isinstance(found := pickle.loads(outcome.read_bytes()), Exception):
                    raise found from None
                print(file=sys.stderr)  # ends the line of a progress bar
                if forwarded:
                    raise KeyboardInterrupt from None
                raise _why(processes) from None
        return pickle.loads(outcome.read_bytes())


@contextmanager
def _forwarding(processes: ProcessContext) -> Iterator[list[int]]:
    """Context that forwards signals to the processes; yields a list of the forwarded signals."""
    forwarded: list[int] = []

    def forward_to_all(number: int, frame: object) -> None:
        forwarded.append(number)
        for process in processes.processes:
            if process.is_alive():
                forward(number, process.pid)

    with handling(forward_to_all):
        block(False)
        yield forwarded


def _why(processes: ProcessContext) -> LostProcess:
    """Return an error about processes that ended without an exception."""
    codes = [process.exitcode for process in processes.processes]
    killed = [(rank, -code) for rank, code in enumerate(codes) if code is not None and code < 0]
    # Remaining processes are ended with SIGTERM, so a process with another signal failed first.
    rank, number = min(killed, key=lambda one: one[1] == signal.SIGTERM, default=(0, 0))
    how = f"was ended by {signal.Signals(number).name}" if number else "failed"
    hint = " (possibly out of memory)" if how.endswith("SIGKILL") else ""
    return LostProcess(
        f"processes: rank {rank} of {len(codes)} {how}{hint}, so all stopped; run the same command again to continue"
    )


class _Start(NamedTuple):
    """Parameters of new processes."""

    world: int
    threads: int
    """CPU threads to share among them."""
    environment: dict[str, str]
    """Environment variables of the command; those of a fork server are older."""
    folder: Path
    """Folder of the rendezvous file and of the outcome."""
    timeout: timedelta


def _be_one(rank: int, start: _Start, work: Callable[..., int | None], arguments: tuple[Any, ...]) -> None:
    """Run the work in one of the new processes."""
    count, threads, environment, folder, timeout = start
    os.environ.clear()
    os.environ.update(environment)
    block(False)
    _end_with_command()
    leave_group()
    _publish(ProcessInfo(rank, count, rank, count))
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


def _end_with_command() -> None:
    """End this process with SIGTERM when the command that started it ends, or has ended already."""
    command = parent_process()
    assert command is not None

    def watch() -> None:
        command.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _leave(folder: Path, outcome: Any) -> None:
    """Store the outcome for the parent, unless another process has stored one."""
    with suppress(Exception):  # an exception that cannot be pickled has been printed
        data = pickle.dumps(outcome)
        with (folder / "outcome").open("xb") as file:
            file.write(data)

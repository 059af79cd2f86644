"""Locks on file systems that several machines share, some without hard links and without exchange of names."""

import errno
import importlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.protocol import append_history, read_history
from diffusion_cli.system import locks
from diffusion_cli.system.locks import Heartbeat, locked, run_lock
from helpers.locks import leave, owner

QUICK = Heartbeat(beat=0.05, patience=0.6)
FORK = multiprocessing.get_context("fork")


def refused(*_: Any) -> Any:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def as_on_nfs(*_: Any) -> bool:
    """As renameat2 with RENAME_EXCHANGE on NFS."""
    return False


def as_node(node: str | None) -> None:
    """Make this process one of another machine."""
    if node is not None:
        locks.machine_id = lambda: node
        locks.has_ended = lambda *_: False
        locks.socket.gethostname = lambda: node


FILE_SYSTEMS = {
    "local": (),
    "no links": ("os.link",),
    "NFS": ("exchange",),
    "neither": ("os.link", "exchange"),
}


@pytest.fixture(params=FILE_SYSTEMS.values(), ids=list(FILE_SYSTEMS))
def file_system(request, monkeypatch):
    """Take the calls from this process and its children that some file systems lack."""
    if "os.link" in request.param:
        monkeypatch.setattr(os, "link", refused)
    if "exchange" in request.param:
        for module in ("filelock._soft._exclusive._recovery", "filelock._filesystem._exchange"):
            monkeypatch.setattr(importlib.import_module(module), "exchange_names", as_on_nfs)


def hold(folder: Path, node: str | None, seconds: float) -> None:
    as_node(node)
    with run_lock(folder, QUICK):
        (folder / f"held {os.getpid()}").touch()
        time.sleep(seconds)
        (folder / f"held {os.getpid()}").unlink()


def held(folder: Path, process: Any) -> bool:
    """Whether the process has the lock by now."""
    end = time.monotonic() + 15
    while time.monotonic() < end and process.is_alive():
        if (folder / f"held {process.pid}").exists():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def unpatched(monkeypatch):
    """The names that `as_node` replaces, put back at the end."""
    for name in ("machine_id", "has_ended"):
        monkeypatch.setattr(locks, name, getattr(locks, name))
    monkeypatch.setattr(locks.socket, "gethostname", locks.socket.gethostname)


@pytest.fixture
def start(tmp_path):
    """Starts children that end with the test."""
    children = []

    def start(target: Any, *arguments: Any) -> Any:
        children.append(FORK.Process(target=target, args=arguments, daemon=True))
        children[-1].start()
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.join()


@pytest.mark.slow
@pytest.mark.usefixtures("unpatched", "file_system")
@pytest.mark.parametrize("nodes", [(None, None), ("n1", "n2")], ids=["one machine", "two machines"])
def test_a_run_has_one_holder_who_is_named_and_a_killed_one_is_succeeded(tmp_path, start, nodes):
    run = tmp_path / "run"
    first = start(hold, run, nodes[0], 60)
    assert held(run, first)
    as_node(nodes[1])
    host = nodes[0] or locks.socket.gethostname()
    for _ in range(2):
        with (
            pytest.raises(UsageError, match=f"trained by process {first.pid} on host {host}"),
            run_lock(run, QUICK),
        ):
            pass
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with run_lock(run, QUICK):
        assert owner(run)["pid"] == os.getpid()
    assert [file.name for file in run.iterdir()] == [f"held {first.pid}"]


@pytest.mark.slow
@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("stale", [False, True], ids=["free", "after a dead machine"])
def test_of_many_that_start_at_once_one_holds_the_run(tmp_path, start, stale):
    def contend(number: int, gate: Any) -> None:
        gate.wait()
        try:
            hold(tmp_path / "run", f"n{number}" if number % 2 else None, 3)
        except UsageError:
            sys.exit(2)

    if stale:
        leave(tmp_path / "run")
    gate = FORK.Barrier(6)
    children = [start(contend, number, gate) for number in range(6)]
    for child in children:
        child.join(20)
    assert sorted(child.exitcode for child in children) == [0, 2, 2, 2, 2, 2]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("file_system")
def test_a_file_that_many_change_loses_no_change(tmp_path, start):
    def add(number: int) -> None:
        as_node(f"n{number}" if number % 2 else None)
        for turn in range(3):
            append_history(
                tmp_path / "metrics.json", {"made": {"n": [number, turn]}, "results": [], "notes": []}
            )

    for child in [start(add, number) for number in range(6)]:
        child.join(20)
        assert child.exitcode == 0
    assert len(read_history(tmp_path / "metrics.json")) == 18
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_a_folder_that_cannot_be_written_to_is_read_without_a_lock(tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(locks.os, "open", refuse)
    with locked(tmp_path / "data"):
        pass


def test_the_lock_of_a_file_that_another_process_has_is_waited_for_by_name(tmp_path, start, capsys):
    def use() -> None:
        with locked(tmp_path / "data"):
            (tmp_path / "used").touch()
            time.sleep(2)
            (tmp_path / "data").touch()

    child = start(use)
    while not (tmp_path / "used").exists():
        time.sleep(0.01)
    with locked(tmp_path / "data"):
        assert (tmp_path / "data").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"diffuse: {tmp_path}/.data.lock: waiting for process {child.pid} on host ")

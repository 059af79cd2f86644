"""Locks on shared file systems: flock that other nodes do not see, and file systems without flock or hard links."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.protocol import append_history, read_history
from diffusion_cli.system import locks
from diffusion_cli.system.locks import LOCK, Heartbeat, locked, run_lock

QUICK = Heartbeat(beat=0.05, patience=0.6, settle=0.1)
FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.skipif(locks.fcntl is None, reason="takes fcntl")


def no_flock(*_: Any) -> None:
    raise OSError(38, "Function not implemented")


def no_locks(*_: Any) -> None:
    raise OSError(37, "No locks available")


def local(*_: Any) -> None:
    """As on another node, which does not see the lock."""


FLOCKS = {"flock": None, "node-local flock": local, "ENOSYS": no_flock, "ENOLCK": no_locks}


def as_node(flock: Any, node: str | None) -> None:
    """Make this process one of another machine."""
    if flock is not None:
        locks.fcntl.flock = flock  # pyright: ignore[reportOptionalMemberAccess]
    if node is not None:
        locks.machine_id = lambda: node
        locks.is_running = locks.has_ended = lambda *_: False
        locks.socket.gethostname = lambda: node


def hold(folder: Path, flock: Any, node: str | None, seconds: float) -> None:
    as_node(flock, node)
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
    monkeypatch.setattr(locks.fcntl, "flock", locks.fcntl.flock)  # pyright: ignore[reportOptionalMemberAccess]
    for name in ("machine_id", "is_running", "has_ended"):
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
@pytest.mark.usefixtures("unpatched")
@pytest.mark.parametrize("nodes", [(None, None), ("n1", "n2")], ids=["one machine", "two machines"])
@pytest.mark.parametrize("flock", FLOCKS.values(), ids=FLOCKS)
def test_a_run_has_one_holder_who_is_named_and_a_killed_one_is_succeeded(tmp_path, start, flock, nodes):
    if flock is None and nodes[0] is not None:
        pytest.skip("the kernel decides there")
    run = tmp_path / "run"
    first = start(hold, run, flock, nodes[0], 60)
    assert held(run, first)
    as_node(flock, nodes[1])
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
        assert json.loads((run / LOCK).read_text())["pid"] == os.getpid()
    assert not (run / LOCK).exists()


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("flock", FLOCKS.values(), ids=FLOCKS)
def test_of_many_that_start_at_once_one_holds_the_run(tmp_path, start, flock, links):
    def contend(number: int, gate: Any) -> None:
        if not links:
            os.link = no_links
        gate.wait()
        try:
            hold(tmp_path / "run", flock, f"n{number}" if number % 2 else None, 3)
        except UsageError:
            sys.exit(2)

    gate = FORK.Barrier(6)
    children = [start(contend, number, gate) for number in range(6)]
    for child in children:
        child.join(20)
    assert sorted(child.exitcode for child in children) == [0, 2, 2, 2, 2, 2]
    assert not (tmp_path / "run").exists()


def no_links(*_: Any) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.slow
@pytest.mark.parametrize("flock", FLOCKS.values(), ids=FLOCKS)
def test_a_file_that_many_change_loses_no_change(tmp_path, start, flock):
    def add(number: int) -> None:
        as_node(flock, f"n{number}" if number % 2 else None)
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


def test_datasets_of_torchvision_are_read_without_flock(tmp_path, monkeypatch):
    from torchvision import datasets

    from diffusion_cli.data.torchvision_sets import MNIST

    class Source:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.data, self.targets = np.zeros((1, 28, 28), np.uint8), [3]
            import torch

            self.data = torch.from_numpy(self.data)

    monkeypatch.setattr(locks.fcntl, "flock", no_flock)
    monkeypatch.setattr(datasets, "MNIST", Source)
    assert len(MNIST(str(tmp_path), size=28, flip=False).load("train")) == 1
    assert list(tmp_path.iterdir()) == []

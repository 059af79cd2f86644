"""The server that forks the processes of a command: what it imports, what it inherits, and when it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion_cli.commands import execution
from diffusion_cli.config import SampleConfig, TrainConfig, load
from diffusion_cli.system import fork_server
from diffusion_cli.system.signals import STOPPING

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")

PROGRAM = """
import json, multiprocessing, os, signal, sys
from diffusion_cli.system import fork_server


def work(queue):
    blocked = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    queue.put([sys.modules["colorsys"].__file__, blocked, fork_server.VARIABLE in os.environ])


if __name__ == "__main__":
    fork_server.allow()
    fork_server.start(["colorsys"])
    assert "colorsys" not in sys.modules
    context = multiprocessing.get_context("forkserver")
    queue = context.SimpleQueue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    print(json.dumps([queue.get(), sorted(os.environ)]))
    process.join()
"""
SLOW = """
import os, time
open(os.environ["FOUND"], "w").write(str(os.getpid()))
time.sleep(600)
"""
WAITS = """
import os, time
from diffusion_cli.system import fork_server
fork_server.allow()
fork_server.start(["slow_to_import"])
time.sleep(600)
"""


def test_a_forked_process_has_the_modules_and_blocks_the_signals_of_its_command(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "colorsys.py").write_text("raise SystemExit")  # no folder of the command's path
    done = subprocess.run(
        [sys.executable, "../program.py"],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        check=True,
    )
    (module, blocked, marked), environment = json.loads(done.stdout)
    assert module.startswith(sys.base_prefix)
    assert {int(number) for number in STOPPING} <= {*blocked}
    assert not marked
    assert {fork_server.VARIABLE, "PYTHONSAFEPATH"}.isdisjoint({*environment} - {*os.environ})


def test_the_server_ends_with_its_command_also_within_an_import(tmp_path):
    (tmp_path / "slow_to_import.py").write_text(SLOW)
    found = tmp_path / "found"
    environment = os.environ | {
        "FOUND": str(found),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }
    command = subprocess.Popen([sys.executable, "-c", WAITS], env=environment)
    end = time.monotonic() + 60
    while not (found.exists() and found.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    server = Path("/proc", found.read_text())
    for number in (signal.SIGTERM, signal.SIGUSR1):  # as a scheduler sends them to all processes
        os.kill(int(server.name), number)
    time.sleep(0.1)
    assert _is_running(server)
    command.kill()
    command.wait()
    while _is_running(server):
        assert time.monotonic() < end
        time.sleep(0.02)


def _is_running(process: Path) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except OSError:
        return False


def test_only_the_process_of_a_command_has_a_server(monkeypatch):
    monkeypatch.setattr(fork_server._State, "allowed", False)
    fork_server.start(["json"])
    assert not fork_server.is_running()


@pytest.mark.parametrize(("gpus", "count", "forks"), [(False, 2, True), (False, 1, False), (True, 2, False)])
def test_several_processes_on_cpus_are_forked(monkeypatch, gpus, count, forks):
    monkeypatch.setattr(execution, "gpu", lambda accelerator: gpus)
    training = load("train", ["name=a", f"trainer.devices={count}", "batch_size=16"])
    sampling = load("sample", ["run=a", f"processes={count}"])
    assert isinstance(training, TrainConfig)
    assert isinstance(sampling, SampleConfig)
    assert execution._forks(training) == execution._forks(sampling) == forks
    assert not execution._forks(load("report", ["run=a"]))

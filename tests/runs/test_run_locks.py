"""The lock of a run: its holder is named, and a dead holder is replaced."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from diffusion_cli.errors import UsageError
from diffusion_cli.system import locks
from diffusion_cli.system.locks import LOCK, Heartbeat, run_lock
from helpers import train
from helpers.faults import assert_goes_on, said

QUICK = Heartbeat(beat=0.05, patience=0.5, settle=0.1)


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def leave(folder: Path, **changes) -> Path:
    """A lock as a process of another machine has left it, or keeps it."""
    folder.mkdir(exist_ok=True)
    owner = {
        "host": "n3",
        "boot": "x",
        "pid": 123,
        "job": "45",
        "restart": None,
        "since": "2099-01-01 00:00:00+00:00",
    }
    (folder / LOCK).write_text(json.dumps(owner | {"token": "t", "beat": 0} | changes))
    return folder / LOCK


def test_the_holder_of_a_run_is_named(begun, whole, capsys):
    with run_lock(begun / "tiny"):
        assert train(begun, "max_steps=14") == 2
        assert f"name=tiny: is being trained by process {os.getpid()} on host " in said(capsys)
    assert_goes_on(begun, whole)


def test_the_lock_ends_with_its_process_though_a_child_of_it_lives(tmp_path, capsys):
    code = (
        "import os, sys, time; from pathlib import Path; from diffusion_cli.system.locks import run_lock\n"
        "with run_lock(Path(sys.argv[1])):\n"
        "    if os.fork(): os.write(1, b'held\\n')\n"
        "    else: os.write(1, f'child {os.getpid()}\\n'.encode())\n"
        "    time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = sorted(process.stdout.readline() for _ in range(2))
    with pytest.raises(UsageError, match=f"process {process.pid} on host"), run_lock(tmp_path / "run"):
        pass
    process.kill()
    process.wait()
    try:
        with run_lock(tmp_path / "run"):  # at once: on one machine there is nothing to wait for
            assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    finally:
        os.kill(int(lines[0].split()[1]), signal.SIGKILL)
    assert capsys.readouterr().err == ""


def test_a_silent_lock_of_another_machine_is_taken_over_whatever_its_clock(tmp_path, capsys):
    lock = leave(tmp_path / "run")
    with run_lock(tmp_path / "run", QUICK):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    before, after = capsys.readouterr().err.splitlines()
    assert ": locked by process 123 on host n3 (job 45), since 2099-01-01 00:00:00+00:00; waiting" in before
    assert "taken over from process 123 on host n3 (job 45)" in after
    assert not (tmp_path / "run").exists()


def test_a_lock_of_another_machine_that_shows_signs_of_life_is_respected(tmp_path):
    lock = leave(tmp_path / "run")
    threading.Timer(0.2, leave, [tmp_path / "run"], {"beat": 1}).start()
    words = (
        r"is being trained by process 123 on host n3 \(job 45\), since .*; wait for that process, or end it"
    )
    with pytest.raises(UsageError, match=words), run_lock(tmp_path / "run", QUICK):
        pass
    assert json.loads(lock.read_text())["token"] == "t"


def test_a_file_system_without_locks_is_watched(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    first, second = (run_lock(tmp_path / "run", QUICK._replace(patience=patience)) for patience in (0.5, 5))
    with first, pytest.raises(UsageError, match=f"process {os.getpid()} on host"), second:
        pass
    leave(tmp_path / "run")
    with run_lock(tmp_path / "run", QUICK):
        pass


def test_a_job_that_the_scheduler_began_again_waits_for_nobody(tmp_path, capsys, monkeypatch):
    leave(tmp_path / "run")
    monkeypatch.setenv("SLURM_JOB_ID", "45")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with run_lock(tmp_path / "run"):
        pass
    assert capsys.readouterr().err == ""


def test_of_two_that_take_one_lock_one_gives_way(tmp_path, monkeypatch):
    leave(tmp_path / "run")
    real = locks._Lock._settle

    def settle(self):
        leave(tmp_path / "run", host="n4", token="other")
        real(self)

    monkeypatch.setattr(locks._Lock, "_settle", settle)
    with (
        pytest.raises(UsageError, match="is being trained by process 123 on host n4"),
        run_lock(tmp_path / "run", QUICK),
    ):
        pass
    assert json.loads((tmp_path / "run" / LOCK).read_text())["token"] == "other"


def test_a_holder_that_was_taken_over_ends_at_once_and_saves_nothing(tmp_path, capfd):
    def hold() -> None:
        with run_lock(tmp_path / "run", QUICK):
            leave(tmp_path / "run")
            time.sleep(30)
            (tmp_path / "saved").touch()

    holder = multiprocessing.get_context("fork").Process(target=hold)
    holder.start()
    holder.join(20)
    assert holder.exitcode == 1
    assert not (tmp_path / "saved").exists()
    assert ": taken over by process 123 on host n3" in capfd.readouterr().err
    assert (tmp_path / "run" / LOCK).exists()  # which is the other's


def test_a_lock_that_cannot_be_kept_fresh_is_said_once_and_ends_nothing(tmp_path, capsys):
    with run_lock(tmp_path / "run", QUICK):
        shutil.rmtree(tmp_path / "run")
        time.sleep(0.5)
    (line,) = capsys.readouterr().err.splitlines()
    assert "heartbeat cannot be written (No such file or directory)" in line


def test_the_lock_shows_that_its_holder_lives(tmp_path):
    with run_lock(tmp_path / "run", QUICK):
        beats = set()
        while len(beats) < 3:
            beats.add(json.loads((tmp_path / "run" / LOCK).read_text())["beat"])


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff" * 9000, b"[" * 4000], ids=range(5))
def test_a_lock_that_says_nothing_is_taken_over_once_it_stands_still(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_bytes(text)
    with run_lock(tmp_path / "run", QUICK):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


def test_a_lock_that_leads_elsewhere_is_not_written_through(tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / LOCK).symlink_to(tmp_path / "mine")
    assert train(tmp_path, "max_steps=3") == 2
    assert said(capsys).endswith(".lock: is a link; remove it")
    (tmp_path / "tiny" / LOCK).unlink()
    os.mkfifo(tmp_path / "tiny" / LOCK)
    assert train(tmp_path, "max_steps=3") == 2
    assert ".lock: is not a file; remove it" in said(capsys)
    assert (tmp_path / "mine").read_text() == "mine"

"""The lock of a run: its holder is named, and a dead holder is replaced."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import SoftFileLease

from diffusion_cli.errors import UsageError
from diffusion_cli.system.locks import LOCK, Heartbeat, holder, run_lock
from diffusion_cli.system.process_identity import machine_id, start_time
from helpers import train
from helpers.faults import assert_goes_on, said
from helpers.locks import leave, owner

QUICK = Heartbeat(beat=0.05, patience=0.5)


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


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
            assert owner(tmp_path / "run")["pid"] == os.getpid()
    finally:
        os.kill(int(lines[0].split()[1]), signal.SIGKILL)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("earlier", [False, True], ids=["this version", "an earlier version"])
@pytest.mark.parametrize("clock", [0, 2**32], ids=["1970", "2106"])
def test_a_silent_lock_of_another_machine_is_taken_over_whatever_its_clock(tmp_path, capsys, clock, earlier):
    lock = leave(tmp_path / "run", earlier)
    os.utime(lock, (clock, clock))
    with run_lock(tmp_path / "run", QUICK):
        assert owner(tmp_path / "run")["pid"] == os.getpid()
    before, after = capsys.readouterr().err.splitlines()
    assert ": locked by process 123 on host n3 (job 45), since 2099-01-01 00:00:00+00:00; waiting" in before
    assert "taken over from process 123 on host n3 (job 45)" in after
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("earlier", [False, True], ids=["this version", "an earlier version"])
def test_a_lock_of_another_machine_that_shows_signs_of_life_is_respected(tmp_path, earlier):
    lock = leave(tmp_path / "run", earlier)
    threading.Timer(0.2, os.utime, [lock]).start()
    words = (
        r"is being trained by process 123 on host n3 \(job 45\), since .*; wait for that process, or end it"
    )
    with pytest.raises(UsageError, match=words), run_lock(tmp_path / "run", QUICK):
        pass
    assert owner(tmp_path / "run")["pid"] == 123


def test_a_lock_of_an_earlier_version_is_that_of_its_process(tmp_path):
    here = {"machine": machine_id(), "pid": os.getpid(), "start": start_time(os.getpid())}
    leave(tmp_path / "run", True, **here)
    assert (
        holder(tmp_path / "run")
        == f"process {os.getpid()} on host n3 (job 45), since 2099-01-01 00:00:00+00:00"
    )
    with pytest.raises(UsageError, match=f"process {os.getpid()} on host n3"), run_lock(tmp_path / "run"):
        pass
    ended = subprocess.Popen(["true"])
    ended.wait()
    leave(tmp_path / "run", True, **here | {"pid": ended.pid, "start": "1"})
    assert holder(tmp_path / "run") is None
    with run_lock(tmp_path / "run"):  # at once
        assert owner(tmp_path / "run")["pid"] == os.getpid()


def test_another_machine_with_the_same_host_name_is_respected(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    lock = leave(tmp_path / "run", host=socket.gethostname(), pid=ended.pid, machine="another")
    threading.Timer(0.2, os.utime, [lock]).start()
    with pytest.raises(UsageError, match=f"process {ended.pid} on host"), run_lock(tmp_path / "run", QUICK):
        pass
    SoftFileLease(lock, blocking=False).acquire().lock.release()  # which compares names of hosts


def test_a_process_has_a_lock_once(tmp_path):
    first, second = run_lock(tmp_path / "run"), run_lock(tmp_path / "run", QUICK)
    with first, pytest.raises(UsageError, match=f"process {os.getpid()} on host"), second:
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

    def rename(path: Path, target: Path) -> None:  # another process was faster
        leave(
            tmp_path / "run", host="n4", machine=machine_id(), pid=os.getpid(), start=start_time(os.getpid())
        )
        path.replace(target)

    monkeypatch.setattr(Path, "rename", rename)
    with (
        pytest.raises(UsageError, match=f"is being trained by process {os.getpid()} on host n4"),
        run_lock(tmp_path / "run", QUICK),
    ):
        pass
    assert owner(tmp_path / "run")["host"] == "n4"
    assert [file.name for file in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_holder_that_was_taken_over_ends_at_once_and_saves_nothing(tmp_path, capfd):
    def hold(removed: bool) -> None:
        with run_lock(tmp_path / "run", QUICK):
            if removed:
                (tmp_path / "run" / LOCK).unlink()
                time.sleep(0.5)
            leave(tmp_path / "run")
            time.sleep(30)
            (tmp_path / "saved").touch()

    for removed in (False, True):
        process = multiprocessing.get_context("fork").Process(target=hold, args=[removed])
        process.start()
        process.join(20)
        assert process.exitcode == 1
        assert not (tmp_path / "saved").exists()
        assert ": taken over by process 123 on host n3" in capfd.readouterr().err
        assert owner(tmp_path / "run")["pid"] == 123  # the lock is the other's
        (tmp_path / "run" / LOCK).unlink()


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
            beats.add((tmp_path / "run" / LOCK).stat().st_mtime_ns)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff" * 9000, b"[" * 4000], ids=range(5))
def test_a_lock_that_says_nothing_is_taken_over_once_it_stands_still(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_bytes(text)
    with run_lock(tmp_path / "run", QUICK):
        assert owner(tmp_path / "run")["pid"] == os.getpid()


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

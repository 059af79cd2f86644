"""What a killed process leaves: recognised, never in the way of the same command, and removed by a later one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion_cli.commands import compare, outputs
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.protocol import append_history
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.process_identity import has_ended, machine_id, start_time
from diffusion_cli.system.temporary_files import EXPIRY, is_temporary, remove_abandoned, temporary_path
from helpers import checkpoint_info


@pytest.fixture(scope="module")
def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left(folder: Path, name: str, pid: int, machine: str | None = None) -> Path:
    """The temporary file that a process killed while it wrote `name` left."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.{pid}-{machine_id() if machine is None else machine}01234567.tmp"
    path.write_text("{")
    return path


@pytest.fixture
def killed(tmp_path) -> Path:
    """A folder in which a process was killed by SIGKILL while it wrote manifest.json."""
    code = (
        "import os, sys; from pathlib import Path; from diffusion_cli.system.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1]) / 'manifest.json') as file: file.write_text('{'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=False)
    (file,) = (tmp_path / "out").iterdir()
    assert is_temporary(file)
    return tmp_path / "out"


def test_a_process_that_ended_is_told_from_one_that_runs(ended):
    assert has_ended(machine_id(), ended)
    assert not has_ended(machine_id(), os.getpid())
    assert not has_ended(machine_id(), os.getpid(), start_time(os.getpid()))
    assert not has_ended("00000000", ended)
    for damaged in (None, "1", 0, -1, 2**40, [1], True and 1.5):
        assert not has_ended(machine_id(), damaged)


@pytest.mark.skipif(start_time(os.getpid()) is None, reason="takes /proc")
def test_a_number_that_another_process_has_now_and_a_zombie_have_ended():
    assert has_ended(machine_id(), os.getpid(), "0")
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(machine_id(), zombie.pid)
    zombie.wait()


def test_only_files_that_nobody_will_finish_are_removed(tmp_path, ended):
    gone = left(tmp_path, "a.png", ended)
    running = left(tmp_path, "b.png", os.getpid())  # a writer may be stopped, or wait for a slow disk
    others = [
        left(tmp_path, "c.png", ended, "00000000"),
        left(tmp_path, "d.png", ended, ""),  # of an earlier version, without a machine
    ]
    mine = tmp_path / ".notes.1-2.tmp"
    mine.write_text("mine")
    (tmp_path / f".e.{ended}-{machine_id()}01234567.tmp").mkdir()
    remove_abandoned(tmp_path, tmp_path / "missing")
    assert not gone.exists()
    assert all(file.exists() for file in (*others, running, mine))
    past = time.time() - EXPIRY - 60
    for file in (*others, running, mine):
        os.utime(file, (past, past))
    remove_abandoned(tmp_path)
    assert not any(file.exists() for file in others)
    assert running.exists()
    assert mine.exists()


def test_a_temporary_file_has_the_name_of_one(tmp_path):
    for name in ("manifest.json", "a b.png", "ü\n.csv"):
        assert is_temporary(temporary_path(tmp_path / name))
    for name in ("manifest.json", ".tmp", ".manifest.json.tmp", ".manifest.json.12-xy.tmp"):
        assert not is_temporary(tmp_path / name)


def test_a_kill_at_the_claim_of_a_folder_of_images_refuses_nothing(killed, monkeypatch):
    settings = {"labels": None}
    model = type("Model", (), {"step": 1, "info": checkpoint_info()})
    assert outputs.claim(killed, settings, model)["settings"] == settings  # pyright: ignore[reportArgumentType]
    assert [file.name for file in killed.iterdir()] == ["manifest.json"]


def test_a_kill_at_the_claim_of_a_folder_of_comparisons_refuses_nothing(killed):
    compare._claim(killed)
    (killed / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and not written by diffuse compare"):
        compare._claim(killed)


def test_an_evaluation_removes_what_a_killed_one_left(tmp_path, ended):
    file = left(tmp_path, "metrics.json", ended)
    entry = {"made": {}, "results": [], "notes": []}
    append_history(tmp_path / "metrics.json", entry)
    assert not file.exists()


def test_a_file_is_written_whole_beside_leftovers(tmp_path, ended):
    left(tmp_path, "file", ended)
    with atomic_write(tmp_path / "file") as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"

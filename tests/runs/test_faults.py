"""Faults: what a user sees is one line with the remedy, and what was saved takes the run up to the last bit.

Faults that are tried elsewhere: in test_training.py a loss or weights that are no number, another configuration or
other data in the folder, a second process there, signals and kills; in test_data.py images that cannot be decoded.
"""

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
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import Precision
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands.outputs import claim
from diffusion_cli.data import ResolutionSchedule
from diffusion_cli.data.progressive import Stage
from diffusion_cli.diffusion.objectives import Weighted
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.checkpoint import BEST, LAST, read, save
from diffusion_cli.runs.find import find_run, recover
from diffusion_cli.runs.load import LoadedDenoiser, load_model
from diffusion_cli.system import locks
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.locks import LOCK, Heartbeat, run_lock
from diffusion_cli.training import out_of_memory as memory
from diffusion_cli.training.callbacks import CheckpointCallback
from diffusion_cli.training.logs import CSVFile, TensorBoard
from helpers import TINY, assert_same, state, train

CPU = torch.device("cpu")
TOMORROW = time.time() + 86400
QUICK = Heartbeat(beat=0.05, patience=0.5, settle=0.1)


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 14 steps that nothing befell."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, "max_steps=14") == 0
    return state(folder)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run stopped at step 10, with checkpoints of steps 5 and 10."""
    folder = tmp_path_factory.mktemp("half")
    assert train(folder, "max_steps=10") == 0
    return folder


@pytest.fixture
def begun(half, tmp_path):
    """A copy of it, to be spoilt."""
    shutil.copytree(half, tmp_path / "outputs")
    return tmp_path / "outputs"


def assert_goes_on(folder: Path, whole: dict) -> None:
    """The run in the folder ends as the one that nothing befell."""
    assert train(folder, "max_steps=14") == 0
    mine = state(folder)
    for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(mine[key], whole[key], key)
    assert_same(mine["callbacks"]["EMA"], whole["callbacks"]["EMA"])


def said(capsys) -> str:
    """The one line of an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "diffuse: " in line]
    (line,) = (line[line.index("diffuse: ") :] for line in lines)  # after the progress bar
    return line


@pytest.fixture
def disk(tmp_path):
    """Mounts file systems of a given size; a real disk that is full or may not be written to."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a file system takes root on Linux")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        action = "remount," if folder.is_mount() else ""
        subprocess.run(["mount", "-t", "tmpfs", "-o", action + options, "tmpfs", folder], check=True)
        return folder

    try:
        mount("size=16k")
    except subprocess.CalledProcessError:
        pytest.skip("this machine lets nobody mount a file system")
    yield mount
    subprocess.run(["umount", "-l", folder], check=True)


# --- Checkpoints -------------------------------------------------------


def flip(path: Path) -> None:
    """Change one bit of a weight, which torch itself does not see."""
    data = bytearray(path.read_bytes())
    weight = next(value for value in read(path).state["state_dict"].values() if value.numel() > 50)
    data[data.index(weight.numpy().tobytes()) + 7] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGES = {
    "a flipped bit": flip,
    "cut short": cut,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "another file": lambda path: path.write_text("<html>"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(begun, whole, capsys, damage):
    last = begun / "tiny" / LAST
    last.with_name("step_00000010.ckpt").unlink()
    damage(last)
    spoilt = last.read_bytes()
    assert_goes_on(begun, whole)
    assert said(capsys) == (
        f"diffuse: {last}: damaged checkpoint; using step 5, step_00000005.ckpt; the damaged file is now "
        "last.ckpt.damaged"
    )
    assert last.with_name("last.ckpt.damaged").read_bytes() == spoilt


def test_a_missing_last_checkpoint_too(begun, whole, capsys):
    (begun / "tiny" / LAST).unlink()
    assert find_run(None, str(begun)) == find_run("tiny", str(begun)) == begun / "tiny"
    assert_goes_on(begun, whole)
    assert "last.ckpt: missing checkpoint; using step 10, step_00000010.ckpt" in said(capsys)


def test_a_second_damaged_one_does_not_displace_the_first(begun):
    last = begun / "tiny" / LAST
    for text in ("one", "two"):
        last.write_text(text)
        recover(begun / "tiny")
    assert last.with_name("last.ckpt.damaged").read_text() == "one"
    assert last.with_name("last.ckpt.damaged1").read_text() == "two"


def test_where_no_checkpoint_is_whole_nothing_is_touched(begun, capsys):
    files = sorted((begun / "tiny" / LAST).parent.iterdir())
    for file in files:
        cut(file)
    before = [file.read_bytes() for file in files]
    assert train(begun, "max_steps=14") == 2
    assert "last.ckpt: damaged checkpoint, and the run has no intact one; restore a copy" in said(capsys)
    assert [file.read_bytes() for file in sorted(files[0].parent.iterdir())] == before


def test_sampling_falls_back_too_and_moves_nothing(begun, capsys):
    last = begun / "tiny" / LAST
    cut(last)
    before = sorted(file.name for file in last.parent.iterdir()), last.read_bytes()
    model = load_model(begun / "tiny", "ema", CPU)
    assert model.step == 10
    assert "using step 10, step_00000010.ckpt" in said(capsys)
    assert (sorted(file.name for file in last.parent.iterdir()), last.read_bytes()) == before
    assert model.digest == load_model(begun / "tiny", "ema", CPU, 10).digest


@pytest.mark.parametrize("step", [10, "best"])
def test_a_damaged_checkpoint_that_was_asked_for_is_named(begun, step):
    last = begun / "tiny" / LAST
    shutil.copy(last, begun / "tiny" / BEST)
    path = last.with_name("step_00000010.ckpt") if step == 10 else begun / "tiny" / BEST
    flip(path)
    with pytest.raises(
        ValueError, match=rf"{path.name}: invalid or damaged checkpoint \(.*\); choose another step="
    ):
        load_model(begun / "tiny", "ema", CPU, step)


def test_a_checkpoint_of_an_older_version_is_no_damage(begun, capsys):
    last = begun / "tiny" / LAST
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["diffuse"]["format"] = 1
    torch.save(checkpoint, last)
    before = last.read_bytes()
    assert train(begun, "max_steps=14") == 2
    assert "last.ckpt: has format 1, and this version reads formats 4 to 6; train the run again" in said(
        capsys
    )
    assert last.read_bytes() == before


def test_a_checkpoint_that_does_not_read_back_replaces_nothing(begun, whole, capsys, monkeypatch):
    real = torch.save

    def failing(checkpoint, file):
        real(checkpoint, file)
        file.seek(file.tell() // 2)
        file.write(b"\xff\x00\xff")

    monkeypatch.setattr(torch, "save", failing)
    assert train(begun, "max_steps=14", "checkpoint_every=2") == 2
    line = said(capsys)
    assert (
        "step_00000012.ckpt: reading it back gave other bytes than were written; use a folder on another disk"
        in line
    )
    assert line.endswith("the run is saved at step 10; the same command continues it")
    monkeypatch.undo()
    assert_goes_on(begun, whole)


def test_what_a_killed_process_had_begun_to_write_is_removed_and_no_more(begun, whole):
    run = begun / "tiny"
    ours = [run / LAST.parent / ".last.ckpt.123-0a.tmp", run / ".metrics.csv.123-0a.tmp"]
    other = run / ".metrics.json.123-0a.tmp"  # of an evaluation that may be at work
    for file in (*ours, other):
        file.write_text("half")
    assert_goes_on(begun, whole)
    assert not any(file.exists() for file in ours)
    assert other.exists()


def test_what_a_killed_pack_left_is_removed_by_the_next(tmp_path):
    words = ["data", "pack", "dataset=digits", f"output={tmp_path}/pack"]
    kill = "import os; from diffusion_cli.data import Pack; Pack._pixels = lambda *_: os.kill(os.getpid(), 9)"
    program = f"{kill}; from diffusion_cli.cli import run; run({words})"
    subprocess.run([sys.executable, "-c", program], check=False)
    assert [file.suffix for file in tmp_path.iterdir()] == [".tmp"]
    assert run(words) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["pack.npz"]


def test_a_link_of_a_temporary_name_leads_nowhere(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(tmp_path / "mine")
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_packed_checkpoint_is_not_unpacked(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "last.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(ValueError, match="damaged checkpoint"):
        read(tmp_path / "last.ckpt")


def test_a_run_of_the_future_is_the_newest_but_that_is_said(begun, capsys):
    shutil.copytree(begun / "tiny", begun / "late")
    for file in (begun / "tiny" / LAST.parent).iterdir():
        os.utime(file, (TOMORROW, TOMORROW))
    assert find_run(None, str(begun)) == begun / "tiny"
    assert "is the newest run, but its date is in the future; run= chooses another" in said(capsys)


def test_dates_do_not_say_which_checkpoint_is_the_newest(begun, whole):
    folder = (begun / "tiny" / LAST).parent
    (folder / "last.ckpt").unlink()
    os.utime(folder / "step_00000005.ckpt", (TOMORROW, TOMORROW))
    recover(begun / "tiny")
    assert state(begun)["global_step"] == 10
    assert_goes_on(begun, whole)


# --- Disks -------------------------------------------------------------


def test_a_full_disk_at_a_checkpoint(disk, capsys, whole):
    size = 8 << 20
    folder = disk(f"size={size}")
    assert train(folder, "max_steps=5") == 0
    left = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "other").write_bytes(bytes(left - 100_000))
    capsys.readouterr()
    assert train(folder, "max_steps=14") == 2
    line = said(capsys)
    assert "step_00000010.ckpt: cannot be written (No space left on device); free some space" in line
    assert line.endswith("the run is saved at step 5; the same command continues it")
    assert not list(folder.rglob("*.tmp"))
    disk(f"size={4 * size}")
    assert_goes_on(folder, whole)


def test_a_full_disk_at_a_preview(disk, capsys):
    folder = disk("size=8k")
    assert train(folder, "max_steps=14", "preview_every=2", "preview_steps=2") == 2
    line = said(capsys)
    assert "step_00000002.png: cannot be written (No space left on device)" in line
    assert line.endswith("the run is not saved yet")


def test_a_full_disk_at_the_claim_of_a_run(disk, capsys):
    folder = disk("size=16k")
    (folder / "other").write_bytes(bytes(16 << 10))
    assert train(folder, "max_steps=14") == 2
    assert f"output_dir={folder}: cannot lock the run tiny ([Errno 28] No space left on device" in said(
        capsys
    )
    assert [file.name for file in folder.iterdir()] == ["other"]


def test_a_full_disk_at_the_claim_of_a_folder_of_samples(disk, half):
    folder = disk("size=16k")
    (folder / "other").write_bytes(bytes(16 << 10))
    model: LoadedDenoiser = load_model(half / "tiny", "ema", CPU)
    with pytest.raises(
        OSError, match=r"manifest\.json: cannot be written \(No space left on device\); free some space"
    ):
        claim(folder / "samples", {}, model)


@pytest.mark.parametrize("batch_size", [4, 64])
def test_a_full_disk_at_a_sample_leaves_whole_images_and_the_rest_to_be_made(disk, capsys, half, batch_size):
    folder = disk("size=96k")
    words = ["sample", f"output_dir={half}", f"output={folder}/samples", "steps=1", "num_samples=64"]
    assert run([*words, f"batch_size={batch_size}"]) == 2
    line = said(capsys)
    assert ".png: cannot be written (No space left on device); free some space" in line
    manifest = json.loads((folder / "samples" / "manifest.json").read_text())
    assert "seeds" not in manifest
    assert not list(folder.rglob("*.tmp"))
    there = list(folder.rglob("0*.png"))
    assert 0 < len(there) < 64
    for file in there:
        Image.open(file).load()
    disk("size=8m")
    assert run(words) == 0
    assert f"has {len(there)} of 64 images" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_at_the_log_holds_its_rows_in_memory(tmp_path, capsys):
    log = CSVFile(tmp_path / "metrics.csv", 0)
    log.log_metrics({"loss": 1.0}, 1)
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    for step in (2, 3):
        log.log_metrics({"loss": 2.0}, step)
    assert capsys.readouterr().err == (
        f"diffuse: {log.path}: cannot be written (No space left on device); free some space, or use a writable "
        "folder; training continues, and rows are kept in memory\n"
    )
    assert log.path.read_text().split() == ["step,loss", "1,1.0", "2,2.0", "3,2.0"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_training_continues_without_event_files_on_a_full_disk(tmp_path, capsys):
    def logged(count: int) -> list[str]:
        for step in range(count):
            log.log_metrics({"loss": 1.0}, step)
            log.save()
        log.save()
        log.finalize("success")
        return capsys.readouterr().err.splitlines()

    log = TensorBoard().logger(tmp_path, 0)
    assert logged(2) == []
    log = TensorBoard().logger(tmp_path / "full", 0)
    log.log_metrics({"loss": 1.0}, 0)
    (file,) = tmp_path.glob("full/tensorboard/events*")
    file.unlink()
    file.symlink_to("/dev/full")
    assert logged(3) == [
        f"diffuse: {tmp_path}/full/tensorboard: cannot be written (No space left on device); training continues "
        "without logger=tensorboard"
    ]


@pytest.mark.parametrize(
    ("place", "damage"),
    [
        ("step", b"st\xe5p"),
        ("loss", b"lo\x00ss"),
        ("1,", b"q,"),
        ("2,0.5", b"2,0\xae5"),
        ("2,0.5", b'2,"0.5'),
    ],
)
def test_a_damaged_log_is_set_aside_and_its_whole_rows_stay(tmp_path, capsys, place, damage):
    path = tmp_path / "metrics.csv"
    content = b"step,loss\n1,0.5\n2,0.5\n3,0.5\n".replace(place.encode(), damage, 1)
    path.write_bytes(content)
    log = CSVFile(path, 9)
    log.log_metrics({"loss": 4.0}, 4)
    kept = path.read_text().split()
    rows = (
        [] if place == "step" else [row for row in ("1,0.5", "2,0.5", "3,0.5") if not row.startswith(place)]
    )
    expected = ["1,", "2,", "3,", "4,4.0"] if place == "loss" else [*rows, "4,4.0"]
    assert kept == ["step,loss", *expected]
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == content
    assert capsys.readouterr().err == (
        f"diffuse: {path}: is damaged; renamed to metrics.csv.damaged, and its complete rows are copied\n"
    )
    assert len(CSVFile(path, 9).rows) == len(kept) - 1
    assert not capsys.readouterr().err


def test_a_row_of_the_log_that_was_cut_short_is_passed_over(begun, whole):
    log = begun / "tiny" / "metrics.csv"
    for rest in ("7,0.", "\n,", "\nx"):
        with log.open("a") as file:
            file.write(rest)
    assert_goes_on(begun, whole)


def test_an_output_that_cannot_be_written_to(disk, capsys, half, whole):
    folder = disk("size=8m")
    shutil.copytree(half, folder, dirs_exist_ok=True)
    disk("ro")
    for words in ([], ["name=other"]):
        assert train(folder, "max_steps=14", *words) == 2
        line = said(capsys)
        assert f"output_dir={folder}: cannot lock the run" in line
        assert "Read-only file system" in line
    disk("rw")
    assert_goes_on(folder, whole)


def test_an_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert train(tmp_path / "file", "max_steps=3") == 2
    assert f"output_dir={tmp_path}/file: cannot lock the run tiny" in said(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; import torch; from diffusion_cli.runs.checkpoint import save;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "save({'a': torch.zeros(100_000)}, Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.ckpt"], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("free some space, or use a writable folder")
    assert not list(tmp_path.iterdir())


# --- Data --------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """A folder of images and the words that read them from disk all the time."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        Image.new("L", (8, 8), 30 * i).save(folder / f"{i}.png")
    return folder, [
        "dataset=folder", f"dataset.path={folder}", "dataset.resolution=8", "dataset.channels=1",
        "dataset.val_fraction=0", "dataset.in_memory=false", "model=unet_tiny", "batch_size=8", "checkpoint_every=2",
    ]  # fmt: skip


def after_saving(monkeypatch, step: int, fault) -> None:
    """Let a fault befall the run once the checkpoint of a step is there."""
    real = CheckpointCallback.save

    def spoiling(self, trainer, module):
        real(self, trainer, module)
        if trainer.global_step == step:
            fault()

    monkeypatch.setattr(CheckpointCallback, "save", spoiling)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_file_of_the_data_that_is_lost(tmp_path, capsys, monkeypatch, pictures, workers):
    folder, words = [*pictures]
    words = [*words, f"dataset.num_workers={workers}"]
    assert train(tmp_path / "whole", *words, "max_steps=20") == 0
    file = folder / "3.png"
    data = file.read_bytes()
    after_saving(monkeypatch, 4, file.unlink)
    capsys.readouterr()
    assert train(tmp_path / "parts", *words, "max_steps=20") == 2
    line = said(capsys)
    assert f"dataset.path={folder}: cannot use 1 of the images; repair or remove 3.png" in line
    saved = state(tmp_path / "parts")["global_step"]
    assert line.endswith(f"is saved at step {saved}; on the same data the same command continues it")
    assert train(tmp_path / "parts", *words, "max_steps=20") == 2
    assert "num_images=7: the run in " in said(capsys)
    file.write_bytes(data)
    monkeypatch.undo()
    assert train(tmp_path / "parts", *words, "max_steps=20", "dataset.in_memory=true") == 0
    assert_same(state(tmp_path / "parts")["state_dict"], state(tmp_path / "whole")["state_dict"])


def test_a_process_that_reads_images_is_killed(tmp_path, capsys, monkeypatch, pictures):
    _, words = pictures
    words = [*words, "dataset.num_workers=2"]
    after_saving(monkeypatch, 4, lambda: multiprocessing.active_children()[0].kill())
    assert train(tmp_path, *words, "max_steps=20") == 2
    line = said(capsys)
    assert "dataset.num_workers=2: a worker process died" in line
    assert "possibly out of memory; use fewer workers, or 0; the run is saved at step" in line
    monkeypatch.undo()
    assert train(tmp_path, *words, "max_steps=20", "dataset.num_workers=0") == 0
    assert train(tmp_path / "whole", *words, "max_steps=20") == 0
    assert_same(state(tmp_path)["state_dict"], state(tmp_path / "whole")["state_dict"])


def test_shared_memory_that_is_too_small_is_said_and_not_waited_for(tmp_path, pictures):
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("a small /dev/shm takes root on Linux")
    _, words = pictures
    call = [sys.executable, "-c", "from diffusion_cli.cli import main; main()", *TINY, *words]
    call += [f"output_dir={tmp_path}", "dataset.num_workers=2", "dataset.resolution=64", "max_steps=20"]
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(["unshare", "-m", "bash", "-c", script, "-", *call], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "dataset.num_workers: shared memory is full" in done.stderr.splitlines()[-1]
    assert "enlarge /dev/shm, or set 0" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_real_numbers_want_a_range(tmp_path, capsys):
    np.save(tmp_path / "images.npy", np.full((40, 8, 8), np.nan, np.float32))
    assert train(tmp_path, "dataset=array", f"dataset.path={tmp_path}/images.npy", "max_steps=3") == 2
    assert "dataset.range=null: floating-point images need a range; give [low,high]" in said(capsys)


# --- Locks -------------------------------------------------------------


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


def test_a_checkpoint_is_saved_under_its_name_only_once_whole(tmp_path):
    path = tmp_path / "a.ckpt"
    save({"a": torch.arange(10)}, path)
    assert torch.equal(torch.load(path)["a"], torch.arange(10))
    with pytest.raises(AttributeError):
        save({"a": lambda: None}, path)
    assert torch.equal(torch.load(path)["a"], torch.arange(10))
    assert list(tmp_path.iterdir()) == [path]


def test_killed_ten_times_no_bit_is_different():
    script = Path(__file__).parents[2] / "scripts" / "kill.py"
    done = subprocess.run([sys.executable, script, "--kills", "10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| bits different from the uninterrupted run | 0 |" in done.stdout


# --- Memory -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "line"),
    [
        (4, "but 4 do; set accumulate_grad_batches=4"),
        (8, "but 4 do; set accumulate_grad_batches=4"),  # 8 would, with nothing to spare
        (0, "nor does one;"),
    ],
)
def test_memory_that_runs_out_names_the_parts_that_fit(tmp_path, capsys, monkeypatch, most, line):
    loss = Weighted.__call__

    def limited(self, model, x0, *rest):
        if len(x0) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss(self, model, x0, *rest)

    monkeypatch.setattr(Weighted, "__call__", limited)
    assert train(tmp_path, "max_steps=3") == 2
    (said,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("diffuse:")]
    assert said.startswith("diffuse: batch_size=16: 16 images at a time do not fit in cpu memory, ")
    assert line in said
    if most:
        assert train(tmp_path, "max_steps=3", "accumulate_grad_batches=4") == 0


LIMITED = """
import resource, sys
import diffusion_cli.commands.train
from pathlib import Path
from diffusion_cli.cli import run
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 1_000_000_000,) * 2)
sys.exit(run(sys.argv[1:]))
"""


def test_the_trial_is_on_the_device_that_ran_out(monkeypatch):
    """Lightning moves the module to the CPU before anyone can look into the error."""
    module = torch.nn.Linear(1, 1)
    tried = []

    def fits(module, images, context):
        tried.append((images.device.type, module.weight.device.type, len(images)))
        return len(images) <= 2

    class Failed:
        world_size, accumulate_grad_batches, optimizers, global_step = 2, 1, (), 0
        precision_plugin = Precision()

    monkeypatch.setattr(memory, "_fits", fits)
    failed: Any = Failed()
    error, stages = torch.OutOfMemoryError(), ResolutionSchedule([Stage(0, (1, 2, 2), 16)])
    said = str(memory._advice(error, cast(Any, module), torch.device("meta"), stages, failed))
    assert said.endswith("in meta memory, but 2 do; set accumulate_grad_batches=4")
    assert tried == [("meta", "meta", 1), ("meta", "meta", 2), ("meta", "meta", 4)]
    lasting = RuntimeError("could not create a primitive")  # no trial after this one would go well
    said = str(memory._advice(lasting, cast(Any, module), torch.device("meta"), stages, failed))
    assert said.endswith("in meta memory; try accumulate_grad_batches=2")
    assert len(tried) == 3


def test_whole_checkpoints_are_not_removed_for_damaged_ones_of_later_steps(tmp_path):
    words = ["max_steps=20", "keep_last=3"]
    assert train(tmp_path, *words) == 0
    for name in ("last.ckpt", "step_00000020.ckpt"):
        os.truncate(tmp_path / "tiny" / "checkpoints" / name, 1000)
    assert train(tmp_path, "max_steps=17", "keep_last=1") == 0
    os.truncate(tmp_path / "tiny" / LAST, 1000)
    assert train(tmp_path, "max_steps=18") == 0


def test_what_is_said_to_fit_does(tmp_path):
    def limited(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, *TINY, f"output_dir={tmp_path}", "batch_size=4096", *words]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    words = ("model.channels=64", "max_steps=1", "validate_every=100")
    failed = limited(*words)
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
    accumulate = failed.stderr.rpartition("accumulate_grad_batches=")[2].strip()
    there = limited(*words, f"accumulate_grad_batches={accumulate}")
    assert there.returncode == 0, there.stderr

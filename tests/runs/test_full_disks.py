"""Full disks, limits on files, and data that are lost during training."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands.outputs import claim
from diffusion_cli.errors import MachineError
from diffusion_cli.runs.load import LoadedDenoiser, load_model
from diffusion_cli.system.cache import write_checksums
from diffusion_cli.system.files import atomic_write, write_npy
from diffusion_cli.training.checkpoints import CheckpointCallback
from diffusion_cli.training.logs import CSVFile, TensorBoard
from helpers import TINY, assert_same, state, train
from helpers.faults import assert_goes_on, said

CPU = torch.device("cpu")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


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


# --- Disks ------------------------------------------------------------


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
    (folder / "tiny" / "previews").mkdir(parents=True)
    (folder / "tiny" / "previews" / "real.png").touch()  # the picture of training images needs no room
    assert train(folder, "max_steps=14", "preview_every=2", "preview_steps=2") == 2
    err = capsys.readouterr().err
    assert (
        f"diffuse: no preview of step 2 ({folder}/tiny/previews/step_00000002.png: cannot be written (No"
        in err
    )
    assert "; training continues\n" in err
    assert err.splitlines()[-1].endswith("; the run is not saved yet")  # at the first checkpoint


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


def test_a_full_disk_at_an_array_is_a_line_with_the_file(disk):
    folder = disk("size=64k")
    file = folder / "large.npy"
    problem = r"large\.npy: cannot be written \(No space left on device\)"
    with pytest.raises(MachineError, match=problem), atomic_write(file) as temporary:
        write_npy(temporary, np.zeros(100_000))


def test_a_full_disk_at_checksums_is_no_empty_file(disk, tmp_path):
    folder = disk("size=64k")
    content = tmp_path / "features"
    content.write_bytes(b"abc")
    (folder / "other").write_bytes(bytes(64 << 10))
    with pytest.raises(MachineError, match=r"cannot be written \(No space left on device\)"):
        write_checksums(content, folder / "features")
    assert [file.name for file in folder.iterdir()] == ["other"]


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
        "diffuse: logger=tensorboard: No space left on device; training continues without it until it works"
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


# --- Data ------------------------------------------------------------


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

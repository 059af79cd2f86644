"""Damaged, missing and future checkpoints: the run falls back to an earlier one, and the error names the remedy."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.runs.checkpoint import BEST, LAST, read, save
from diffusion_cli.runs.find import find_run, recover
from diffusion_cli.runs.load import load_model
from diffusion_cli.system.files import atomic_write
from helpers import state, train
from helpers.faults import assert_goes_on, said

CPU = torch.device("cpu")
TOMORROW = time.time() + 86400
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


# --- Checkpoints ------------------------------------------------------------


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
    assert "last.ckpt: has format 1, and this version reads formats 4 to 8; train the run again" in said(
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
    names = (".metrics.csv.123-0a.tmp", ".base.safetensors.123-0a.tmp")
    ours = [run / LAST.parent / ".last.ckpt.123-0a.tmp", *(run / name for name in names)]
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


# --- Locks ------------------------------------------------------------


def test_a_checkpoint_is_saved_under_its_name_only_once_whole(tmp_path):
    path = tmp_path / "a.ckpt"
    save({"a": torch.arange(10)}, path)
    assert torch.equal(torch.load(path)["a"], torch.arange(10))
    with pytest.raises(AttributeError):
        save({"a": lambda: None}, path)
    assert torch.equal(torch.load(path)["a"], torch.arange(10))
    assert list(tmp_path.iterdir()) == [path]


def test_killed_five_times_no_bit_is_different():
    script = Path(__file__).parents[2] / "scripts" / "kill.py"
    done = subprocess.run([sys.executable, script, "--kills", "5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| bits different from the uninterrupted run | 0 |" in done.stdout


# --- Memory ------------------------------------------------------------


def test_whole_checkpoints_are_not_removed_for_damaged_ones_of_later_steps(tmp_path):
    words = ["max_steps=20", "keep_last=3"]
    assert train(tmp_path, *words) == 0
    for name in ("last.ckpt", "step_00000020.ckpt"):
        os.truncate(tmp_path / "tiny" / "checkpoints" / name, 1000)
    assert train(tmp_path, "max_steps=17", "keep_last=1") == 0
    os.truncate(tmp_path / "tiny" / LAST, 1000)
    assert train(tmp_path, "max_steps=18") == 0

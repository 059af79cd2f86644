"""A stranger's run folder: nothing is written or removed through its links, and its pipes are not waited for."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion_cli.cli import run
from diffusion_cli.config import load
from diffusion_cli.errors import UsageError
from diffusion_cli.report.page import is_ours
from diffusion_cli.runs.checkpoint import DamagedError, read
from diffusion_cli.runs.find import find_run, recover
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.own_folder import own_folder
from diffusion_cli.training.logs import CSVFile


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """A pipe that is opened waits for ever: end the test instead."""

    def end(number, frame):
        raise TimeoutError("waits")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def home(tmp_path) -> Path:
    """A folder elsewhere, with files that the run would prune and overwrite."""
    home = tmp_path / "home"
    home.mkdir()
    for name in (".notes.tmp", "step_00000005.ckpt", "step_00000010.png"):
        (home / name).write_text("mine")
    return home


def test_a_folder_of_a_run_may_be_missing_or_a_link_to_the_run(tmp_path):
    folder = tmp_path / "run"
    (folder / "previews").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    (folder / "pictures").symlink_to("previews")
    assert own_folder(tmp_path / "link", "samples", "new") == tmp_path / "link" / "samples" / "new"
    assert own_folder(folder, "pictures") == folder / "pictures"


@pytest.mark.parametrize("names", [("samples",), ("samples", "one"), ("samples", "one", "before")])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_out_of_the_run_is_refused_at_any_depth(tmp_path, home, names, dangling):
    link = tmp_path.joinpath("run", *names)
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "nowhere" if dangling else home)
    with pytest.raises(ValueError, match="is a link to a place outside"):
        own_folder(tmp_path / "run", "samples", "one")


def test_a_link_to_a_file_is_replaced_and_its_target_stays(tmp_path, home):
    (tmp_path / "run" / "samples").mkdir(parents=True)
    image = tmp_path / "run" / "samples" / "0.png"
    image.symlink_to(home / "step_00000010.png")
    assert own_folder(tmp_path / "run", "samples") == image.parent
    with atomic_write(image) as temporary:
        temporary.write_text("new")
    assert not image.is_symlink()
    assert image.read_text() == "new"
    assert (home / "step_00000010.png").read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoints", "previews", "tensorboard"])
def test_nothing_is_removed_through_a_link(tmp_path, home, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(home)
    with pytest.raises(ValueError, match="is a link to a place outside"):
        recover(tmp_path / "run")
    assert len(list(home.iterdir())) == 3


def test_a_file_in_place_of_a_folder_is_refused_before_training(tmp_path):
    (tmp_path / "ema").touch()
    with pytest.raises(UsageError, match="ema: is not a folder; move it away"):
        recover(tmp_path)


def test_training_refuses_the_links_of_its_folder_in_one_line(tmp_path, home, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "previews").symlink_to(home)
    assert run(["train", "name=run", f"output_dir={tmp_path}", "max_steps=1", "trainer=cpu"]) == 2
    line = f"diffuse: {tmp_path}/run/previews: is a link to a place outside {tmp_path}/run; replace it with a folder"
    assert line in capsys.readouterr().err
    assert len(list(home.iterdir())) == 3


def test_pipes_are_not_waited_for(tmp_path):
    pipe = tmp_path / "samples" / "pipe"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="is neither a file nor a folder; remove it"):
        own_folder(tmp_path, "samples")
    with pytest.raises(ValueError, match="is not a regular file; move it away"):
        CSVFile(pipe, 0)
    with pytest.raises(ValueError, match="is not a regular file"):
        is_ours(pipe)
    with pytest.raises(DamagedError, match="is not a regular file"):
        read(pipe)


def test_files_that_other_tasks_rename_are_skipped(tmp_path, monkeypatch):
    (tmp_path / "samples" / "folder").mkdir(parents=True)
    (tmp_path / "samples" / ".0.png.tmp").touch()
    listed = Path.iterdir

    def renamed(folder):
        paths = list(listed(folder))
        if folder.name == "samples":  # before an entry is looked at, all are renamed
            (folder / ".0.png.tmp").rename(tmp_path / "0.png")
            (folder / "folder").rename(tmp_path / "elsewhere")
        return iter(paths)

    monkeypatch.setattr(Path, "iterdir", renamed)
    assert own_folder(tmp_path, "samples") == tmp_path / "samples"
    assert (tmp_path / "0.png").exists()


def test_a_folder_that_vanishes_before_it_is_listed_is_skipped(tmp_path, monkeypatch):
    folder = tmp_path / "samples" / "folder"
    folder.mkdir(parents=True)
    lstat = Path.lstat

    def looked_at(path):
        about = lstat(path)
        if path == folder:
            folder.rmdir()
        return about

    monkeypatch.setattr(Path, "lstat", looked_at)
    assert own_folder(tmp_path, "samples") == tmp_path / "samples"
    assert not folder.exists()


def test_a_report_does_not_wait_for_a_pipe_in_its_place(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    os.mkfifo(tmp_path / "report.html")
    assert run(["report", f"run={tmp_path}"]) == 2
    assert (
        f"output={tmp_path}/report.html: is not a regular file; remove it, or choose another"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("last.ckpt", ""), ("best.ckpt", ", and step=best"), ("step_00000060.ckpt", ", and step=60")],
)
def test_a_checkpoint_in_place_of_a_run_names_the_run(tmp_path, name, remedy):
    file = tmp_path / "tiny" / "checkpoints" / name
    file.parent.mkdir(parents=True)
    for each in {file, file.with_name("last.ckpt")}:
        each.touch()
    with pytest.raises(UsageError) as caught:
        find_run(str(file), str(tmp_path))
    assert str(caught.value) == f"run={file}: is a file; give the run's folder, {tmp_path / 'tiny'}{remedy}"
    for word, chosen in (("init.run", remedy.replace("step", "init.step")), ("run", "")):
        with pytest.raises(UsageError) as caught:
            load("train", [f"{word}={file}"])
        assert (
            str(caught.value)
            == f"{word}={file}: is a file; give the run's folder, {tmp_path / 'tiny'}{chosen}"
        )

"""Data at URLs: copied once, again after a change, atomically, and equal to the local data."""

import errno
import os
import socket
import ssl
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import fsspec
import numpy as np
import pytest
import torch
from multidict import CIMultiDict, CIMultiDictProxy
from torch.testing import assert_close
from yarl import URL

from diffusion_cli.cli import run
from diffusion_cli.data import Points
from diffusion_cli.errors import MachineError, UsageError
from diffusion_cli.system import remote
from diffusion_cli.system.remote import COPIES, local_copy
from helpers import TINY
from helpers.data import array, folder, write_images, zipped


@pytest.fixture(autouse=True)
def memory():
    """The file system memory://, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "photos", 6)


@pytest.fixture
def site(tmp_path):
    """The URL of a server of the files of the test, and the paths that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            asked.append(f"{self.command} {self.path}")

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked, server
    server.shutdown()
    server.server_close()


def put(memory, source: Path, place: str) -> None:
    memory.put(str(source), place, recursive=True)


def copies(data_dir: Path) -> list[str]:
    return sorted(path.name for path in (data_dir / COPIES).glob("*/*/*"))


def test_folders_archives_and_arrays_at_urls_equal_local_ones(tmp_path, images, memory):
    archive = zipped(images, tmp_path / "photos.zip")
    np.save(tmp_path / "a.npy", np.arange(6 * 64, dtype=np.uint8).reshape(6, 8, 8))
    for source in (images, archive, tmp_path / "a.npy"):
        put(memory, source, f"/bucket/{source.name}")
        for url in (f"memory://bucket/{source.name}", f"file://{source}"):
            read = array if source.suffix == ".npy" else folder
            mine, theirs = read(url, data_dir=str(tmp_path / "data")), read(source)
            assert (mine.name, mine.class_names) == (theirs.name, theirs.class_names)
            everything = torch.arange(6)
            assert_close(mine.load("train")[everything], theirs.load("train")[everything], rtol=0, atol=0)
            assert mine.load("train").fingerprint() == theirs.load("train").fingerprint()
    assert copies(tmp_path / "data") == ["a.npy"] * 2 + ["photos"] * 2 + ["photos.zip"] * 2


def test_a_file_is_copied_once_and_again_after_a_change(tmp_path, images, memory):
    memory.pipe("/b/x.npy", b"one")
    first = local_copy("memory://b/x.npy", tmp_path)
    stored = first.stat().st_mtime_ns
    assert local_copy("memory://b/x.npy", tmp_path) == first
    assert first.stat().st_mtime_ns == stored
    memory.pipe("/b/x.npy", b"two")
    second = local_copy("memory://b/x.npy", tmp_path)
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")
    put(memory, images, "/b/photos")
    before = local_copy("memory://b/photos/", tmp_path)
    memory.rm("/b/photos/a/0.png")
    assert len(list(before.rglob("*.png"))) == 6
    assert len(list(local_copy("memory://b/photos/", tmp_path).rglob("*.png"))) == 5


def test_a_server_is_asked_for_a_file_once_and_not_needed_later(tmp_path, images, site, capsys):
    url, asked, server = site
    zipped(images, tmp_path / "photos.zip")
    copy = local_copy(f"{url}/photos.zip?version=1", tmp_path / "data")
    assert copy.read_bytes() == (tmp_path / "photos.zip").read_bytes()
    assert local_copy(f"{url}/photos.zip?version=1", tmp_path / "data") == copy
    assert copy.name == "photos.zip"
    assert sum(line.startswith("GET") for line in asked) == 1
    with pytest.raises(UsageError, match=r"absent.zip: does not exist; correct the URL"):
        local_copy(f"{url}/absent.zip", tmp_path / "data")
    server.shutdown()
    server.server_close()
    assert local_copy(f"{url}/photos.zip?version=1", tmp_path / "data") == copy
    assert "photos.zip?version=1: cannot be reached (" in (line := capsys.readouterr().err)
    assert "); using the copy of 2" in line
    with pytest.raises(UsageError, match=r"other.zip: cannot be reached \(.*\); check the network"):
        local_copy(f"{url}/other.zip", tmp_path / "data")


def test_a_new_copy_is_announced_with_the_size_of_earlier_ones(tmp_path, memory, capsys):
    memory.pipe("/b/x.npy", b"1" * 10**8)
    first = local_copy("memory://b/x.npy", tmp_path)
    assert capsys.readouterr().err == ""
    memory.pipe("/b/x.npy", b"2")
    for _ in range(2):
        assert local_copy("memory://b/x.npy", tmp_path).read_bytes() == b"2"
    line = "diffuse: dataset.path=memory://b/x.npy: earlier copies take 0.1 GB; remove them if no command uses them: "
    assert capsys.readouterr().err == f"{line}{first.parent}\n"
    assert first.is_file()


def test_a_web_page_is_not_data(tmp_path, images, site):
    url, *_ = site
    (tmp_path / "page.html").write_text("<html></html>")
    for place in (f"{url}/photos", f"{url}/photos/", f"{url}/page.html"):
        with pytest.raises(
            UsageError, match=f"{place}: is a web page; give the URL of a file, such as a .zip"
        ):
            local_copy(place, tmp_path / "data")
    zipped(images, tmp_path / "photos_zip")
    assert local_copy(f"{url}/photos_zip", tmp_path / "data").is_file()


def http_error(status: int, message: str) -> Exception:
    """The error of fsspec for an answer of an HTTP server."""
    request = aiohttp.RequestInfo(URL("http://x/x.npy"), "HEAD", CIMultiDictProxy(CIMultiDict()))
    error = FileNotFoundError("http://x/x.npy")
    error.__cause__ = aiohttp.ClientResponseError(request, (), status=status, message=message)
    return error


def fails(memory, error: Exception, monkeypatch) -> None:
    def info(*_, **__):
        raise error

    monkeypatch.setattr(memory, "info", info)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (http_error(401, "Unauthorized"), r"cannot be read \(401 Unauthorized\); check the URL and your acc"),
        (http_error(503, "Unavailable"), r"cannot be read \(503 Unavailable\)"),
        (http_error(404, "Not Found"), "x.npy: does not exist; correct the URL$"),
        (RuntimeError("expired token"), r"cannot be read \(expired token\)"),
        (PermissionError("no"), r"cannot be read \(no\)"),
        (ssl.SSLCertVerificationError("certificate has expired"), "cannot be read .*has expired"),
    ],
)
def test_an_old_copy_does_not_hide_a_refusal(error, line, tmp_path, memory, monkeypatch):
    memory.pipe("/b/x.npy", b"one")
    local_copy("memory://b/x.npy", tmp_path)
    fails(memory, error, monkeypatch)
    with pytest.raises(UsageError, match=line):
        local_copy("memory://b/x.npy", tmp_path)


class EndpointConnectionError(Exception):
    """As in botocore, which is not installed."""

    __module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        TimeoutError("late"),
        OSError(errno.ENETUNREACH, "no route"),
        socket.gaierror("unknown host"),
        aiohttp.ServerDisconnectedError(),
        EndpointConnectionError("no endpoint"),
    ],
)
def test_the_old_copy_is_used_if_the_network_fails(error, tmp_path, memory, monkeypatch, capsys):
    memory.pipe("/b/x.npy", b"one")
    copy = local_copy("memory://b/x.npy", tmp_path)
    fails(memory, error, monkeypatch)
    assert local_copy("memory://b/x.npy", tmp_path) == copy
    assert "using the copy of" in capsys.readouterr().err


def test_a_copy_goes_on_where_it_was_stopped(tmp_path, images, memory, monkeypatch):
    put(memory, images, "/b/photos")
    copy_file, done = remote._copy_file, []

    def stop_after_three(system, path, *rest):
        if len(done) == 3:
            raise ConnectionError("gone")
        copy_file(system, path, *rest)
        done.append(path)

    monkeypatch.setattr(remote, "AT_ONCE", 1)
    monkeypatch.setattr(remote, "_copy_file", stop_after_three)
    with pytest.raises(
        UsageError, match=r"cannot be copied \(gone\); repeat the command to continue the copy"
    ):
        local_copy("memory://b/photos", tmp_path)
    assert copies(tmp_path) == [".photos.partial"]
    again = []
    monkeypatch.setattr(remote, "_copy_file", lambda *rest: (again.append(rest[1]), copy_file(*rest)))
    assert len(list(local_copy("memory://b/photos", tmp_path).rglob("*.png"))) == 6
    assert len(again) == 3
    assert not set(again) & set(done)
    assert copies(tmp_path) == ["photos"]


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("memory://none/x.zip", r"dataset.path=memory://none/x.zip: does not exist; correct the URL"),
        ("nonsense://x", r"dataset.path=nonsense://x: cannot be read \(Protocol not known: nonsense\)"),
        ("memory://b/empty", r"dataset.path=memory://b/empty: cannot be read \(has 0 files; must have 1 to"),
    ],
)
def test_mistakes_have_one_line(url, line, tmp_path, memory):
    memory.mkdir("/b/empty")
    with pytest.raises(UsageError, match=line) as error:
        folder(url, data_dir=str(tmp_path))
    assert len(error.value.lines) == 1
    assert copies(tmp_path) == []


def test_errors_name_the_url_and_not_its_copy(tmp_path, memory):
    memory.pipe("/b/x.tar", b"no archive")
    memory.pipe("/b/texts/x.txt", b"text")
    memory.pipe("/b/broken/x.npy", b"none")
    for read in (folder, Points):
        with pytest.raises(
            UsageError, match=r"^dataset.path=memory://b/x.tar: is neither a folder nor a readable"
        ):
            read(path="memory://b/x.tar", data_dir=str(tmp_path))
        with pytest.raises(UsageError, match=r"^dataset.path=memory://b/texts: has no "):
            read(path="memory://b/texts", data_dir=str(tmp_path))
    volumes = {"resolution": [4, 8, 8], "channels": 1, "range": [0, 1], "data_dir": str(tmp_path)}
    with pytest.raises(UsageError, match=r"^dataset.path=memory://b/broken: x.npy: "):
        folder("memory://b/broken", **volumes)
    with pytest.raises(UsageError, match=r"^dataset.path=memory://b/texts: has no volumes"):
        folder("memory://b/texts", **volumes)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(
        UsageError, match=r"dataset.path=s3://b/x.zip: needs another package; Install s3fs to access S3"
    ):
        local_copy("s3://b/x.zip", tmp_path)


def test_a_copy_stays_in_its_folder_and_on_the_disk(tmp_path, memory, monkeypatch):
    memory.pipe("/b/d/x.png", b"x")
    monkeypatch.setattr(memory, "find", lambda *_, **__: {"/b/d/../../x": {"size": 1, "type": "file"}})
    with pytest.raises(UsageError, match=r"has a file named '../../x', outside of the folder"):
        local_copy("memory://b/d", tmp_path)
    memory.pipe("/b/large.zip", b"12345")
    info = memory.info
    monkeypatch.setattr(memory, "info", lambda path, **_: info(path) | {"size": 10**18})
    with pytest.raises(
        UsageError, match=r"has 1000000000.0 GB, and .* has room for .* set data_dir to a folder"
    ):
        local_copy("memory://b/large.zip", tmp_path)
    monkeypatch.setattr(memory, "info", lambda path, **_: info(path) | {"size": 3})
    with pytest.raises(
        UsageError, match=r"cannot be copied \(/b/large.zip has other than the listed 3 bytes\)"
    ):
        local_copy("memory://b/large.zip", tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, memory):
    memory.pipe("/b/x.npy", b"one")
    tmp_path.chmod(0o500)
    with pytest.raises(MachineError, match="cannot be written"):
        local_copy("memory://b/x.npy", tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_trains_on_a_url_and_is_evaluated(tmp_path, images, memory, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    put(memory, images, "/b/photos")
    words = [word for word in TINY if not word.startswith(("name=", "dataset"))]
    places = [f"output_dir={tmp_path}", f"data_dir={tmp_path}/data"]
    data = ["dataset=folder", "dataset.path=memory://b/photos", "dataset.resolution=8"]
    assert run([*words, *data, *places, "name=far", "max_steps=2"]) == 0
    edit = ["edit", f"run={tmp_path}/far", "edit=img2img", "input=train", "num_images=1", "steps=2"]
    assert run([*edit, f"data_dir={tmp_path}/data"]) == 0
    for record in (tmp_path / "state" / "diffuse").rglob("*"):
        if record.is_file():
            record.unlink()
    assert run([*edit, f"data_dir={tmp_path}/data", "seed=1"]) == 2
    assert "dataset.path=memory://b/photos: this path comes from the checkpoint" in capsys.readouterr().err

"""Downloads of published files, from a server on this machine."""

import gzip
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from diffusion_cli.cli import run
from diffusion_cli.system import pretrained
from diffusion_cli.system.downloads import DownloadError, NoConnectionError, WebFile

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Site(ThreadingHTTPServer):
    """A server of files by path, which counts its requests; a file named `short` ends too early."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = files, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD, with the headers of the Hugging Face Hub."""

    server: Site  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path, b"")
        self.answer(content[: len(content) // 2] if self.path.endswith("short") else content)

    def answer(self, body: bytes) -> None:
        content = self.server.files.get(self.path)
        self.send_response(404 if content is None and self.path != "/" else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", 40 * "a")
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def site() -> Iterator[Site]:
    with Site({"/good": CONTENT, "/short": CONTENT}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def closed() -> str:
    """The URL of a server that is gone."""
    with Site({}) as server:
        return server.url


def web_file(url: str, tmp_path, **changes) -> WebFile:
    return WebFile(
        **{"source": url, "path": tmp_path / "in" / "file", "checksum": f"sha256 {SHA256[:8]}"} | changes
    )


def test_a_file_is_downloaded_once_and_verified(site, tmp_path):
    file = web_file(f"{site.url}/good", tmp_path)
    assert file.state() == "missing"
    file.fetch()
    assert (file.state(), file.path.read_bytes()) == ("present", CONTENT)
    file.path.write_bytes(CONTENT[:-1])
    assert file.state() == "damaged"
    assert web_file("", tmp_path, path=tmp_path / "a.gz", unpacked=file.path).state() == "unpacked"


@pytest.mark.parametrize(
    ("name", "checksum", "reason"),
    [
        ("good", "md5 0123", "the content does not have the checksum md5 0123"),
        ("short", f"sha256 {SHA256}", "the content does not have the checksum sha256"),
        ("none", f"sha256 {SHA256}", "HTTP Error 404"),
    ],
)
def test_a_wrong_content_is_not_kept(site, tmp_path, name, checksum, reason):
    file = web_file(f"{site.url}/{name}", tmp_path, checksum=checksum)
    with pytest.raises(DownloadError, match=reason):
        file.fetch()
    assert [*file.path.parent.iterdir()] == []


def test_a_server_that_is_gone_is_no_connection(closed, tmp_path):
    with pytest.raises(NoConnectionError, match="refused"):
        web_file(f"{closed}/good", tmp_path).fetch()


@pytest.fixture
def small_mnist(monkeypatch, site) -> None:
    """MNIST of a few images, published by the server."""
    from torchvision import datasets

    resources = []
    for prefix, count in (("train", 5), ("t10k", 3)):
        for kind, values in (("images-idx3", np.ones((count, 28, 28))), ("labels-idx1", np.arange(count))):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            content = gzip.compress(head + values.astype(np.uint8).tobytes(), mtime=0)
            name = f"{prefix}-{kind}-ubyte.gz"
            site.files[f"/{name}"] = content
            resources.append((name, hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{site.url}/"])


def test_datasets_are_listed_fetched_and_unpacked(small_mnist, site, tmp_path, capsys):
    words = ["dataset=mnist", f"data_dir={tmp_path}"]
    assert run(["data", "list", *words]) == 1
    assert capsys.readouterr().out.count("missing ") == 4
    assert site.asked == []
    assert run(["data", "fetch", *words]) == 0
    out = capsys.readouterr().out
    assert out.count("fetched ") == 4
    assert out.endswith("mnist: 5 images for training, 3 for validation\n")
    assert (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").is_file()
    assert run(["data", "fetch", *words]) == 0
    assert capsys.readouterr().out.count("present ") == 4
    assert run(["data", "list", *words]) == 0
    assert len(site.asked) == 4
    capsys.readouterr()
    for file in (tmp_path / "MNIST" / "raw").glob("*.gz"):
        file.unlink()
    assert run(["data", "fetch", *words]) == 0
    assert len(re.findall(r"unpacked .*\n.*, md5 \w+ not verified, http", capsys.readouterr().out)) == 4


def test_a_file_that_the_server_lacks_is_to_be_got_by_hand(small_mnist, site, tmp_path, capsys):
    name = "train-images-idx3-ubyte.gz"
    del site.files[f"/{name}"]
    assert run(["data", "fetch", "dataset=mnist", f"data_dir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    problem = "cannot be downloaded (HTTP Error 404: Not Found)"
    assert (
        line
        == f"diffuse: {site.url}/{name}: {problem}; get the file by hand and put it at {tmp_path}/MNIST/raw/{name}"
    )


def test_an_unreachable_server_is_named_once_with_what_to_copy(monkeypatch, closed, tmp_path, capsys):
    from torchvision import datasets

    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{closed}/"])
    assert run(["data", "fetch", "dataset=mnist", f"data_dir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    name = "train-images-idx3-ubyte.gz"
    assert line.startswith(f"diffuse: {closed}/{name}: cannot be downloaded (<urlopen error [Errno")
    assert line.endswith(f"copy {tmp_path}/MNIST/raw/{name}")


def test_files_of_the_hub_are_fetched_to_its_cache_and_verified(monkeypatch, site, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", site.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    site.files["/a/b/resolve/main/config.json"] = json.dumps({"size": 1}).encode()
    (file,) = pretrained.files("a/b", ["config.json"])
    assert (file.state(), file.to_copy) == ("missing", tmp_path / "models--a--b")
    file.fetch()
    assert (file.state(), json.loads(file.path.read_text())) == ("present", {"size": 1})
    file.path.resolve().write_text("{}")
    assert file.state() == "damaged"
    file.fetch()
    assert file.state() == "present"
    with pytest.raises(DownloadError, match="404"):
        pretrained.files("a/b", ["vocab.json"])[0].fetch()
    assert pretrained.files(str(tmp_path), ["config.json"]) == []
    (optional,) = pretrained.files("a/b", [], ["tokenizer.json"])
    assert optional.state() == "missing"
    optional.fetch()
    assert optional.state() == "absent"


def test_a_hub_that_cannot_be_reached_is_an_error_at_once(monkeypatch, closed, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    (file,) = pretrained.files("a/b", ["config.json"])
    with pytest.raises(NoConnectionError, match=f"{closed} cannot be reached"):
        file.fetch()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("fetch", "dataset=null: no files are named; name options, for example dataset=cifar10"),
        ("list features=auto", "features=auto: depends on the images; name a network"),
        ("fetch features=inception output=x", "output=x: applies only to action=pack; leave it out"),
        ("pack dataset=digits format=json", "format=json: does not apply to action=pack; leave it out"),
        ("pack dataset=digits features=clip", "features: does not apply to action=pack; leave it out"),
    ],
)
def test_words_that_name_no_files_are_refused(capsys, words, problem):
    assert run(["data", *words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"diffuse: {problem}")


def test_files_are_listed_as_json_for_programs(small_mnist, site, tmp_path, capsys):
    words = ["dataset=mnist", f"data_dir={tmp_path}", "format=json"]
    assert run(["data", "list", *words]) == 1
    first, *others = json.loads(capsys.readouterr().out)
    path, source = (
        f"{tmp_path}/MNIST/raw/train-images-idx3-ubyte.gz",
        f"{site.url}/train-images-idx3-ubyte.gz",
    )
    checksum = f"md5 {hashlib.md5(site.files['/train-images-idx3-ubyte.gz']).hexdigest()}"
    assert first == {
        "state": "missing",
        "path": path,
        "size": 9912422,
        "checksum": checksum,
        "source": source,
    }
    assert len(others) == 3
    assert run(["data", "fetch", *words]) == 0
    assert {file["state"] for file in json.loads(capsys.readouterr().out)} == {"fetched"}
    assert run(["data", "list", "features=classifier", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("action", ["list", "fetch"])
def test_without_huggingface_hub_other_files_are_processed(
    small_mnist, monkeypatch, tmp_path, capsys, action
):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    words = ["dataset=mnist", f"data_dir={tmp_path}", "metric=fd_dinov2"]
    assert run(["data", action, *words]) == 2
    out, err = capsys.readouterr()
    assert out.count("MNIST/raw") == 4
    assert err == (
        "diffuse: facebook/dinov2-large: needs transformers; install it: pip install 'diffuse-cli[transformers]'\n"
    )


def test_weights_of_features_and_metrics_are_listed(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert run(["data", "list", "features=inception", "metric=[lpips,fd_dinov2,clip_score,mmd,kid]"]) == 1
    out = capsys.readouterr().out
    for part in (
        "weights-inception-2015-12-05-6726825d.pth\n          95.6 MB, sha256 6726825d, https://github.com/",
        "alexnet-owt-7be5be79.pth",
        "facebook/dinov2-large/resolve/main/model.safetensors",
        "vocab.json",
    ):
        assert part in out
    assert out.count("clip-vit-large-patch14-336/resolve/main/config.json") == 1
    assert run(["data", "list", "features=classifier"]) == 0
    assert capsys.readouterr().out.startswith("These options need no published files")

"""`diffuse push`.

The library of the hub is a stand-in: its protocol of uploads is its own affair, and tests have no login.
"""

import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from diffusion_cli.cli import run
from helpers.exports import denoiser, imported


class Hub:
    """A huggingface_hub that keeps what is uploaded."""

    def __init__(
        self,
        *,
        token: str | None = "secret",
        refusal: str | None = None,
        online: bool = True,
        files: dict[str, bytes] | None = None,
        private: bool = False,
    ) -> None:
        self.token, self.refusal, self.online = token, refusal, online
        self.exists, self.private = files is not None, private
        self.created: list[Any] = []
        self.files: dict[str, bytes] = dict(files or {})
        self.constants = SimpleNamespace(ENDPOINT="https://hub.example")

    def get_token(self) -> str | None:
        return self.token

    def get_session(self) -> Any:
        return self

    def head(self, *_: Any, **__: Any) -> None:
        if not self.online:
            raise ConnectionError("no route")

    def HfApi(self) -> "Hub":  # noqa: N802
        return self

    def whoami(self) -> None:
        if self.refusal == "login":
            raise ValueError("Invalid token\nmore lines")

    def repo_exists(self, repository: str) -> bool:
        if self.refusal == "reading":
            raise ValueError("502 Bad Gateway\nmore lines")
        return self.exists

    def repo_info(self, repository: str) -> Any:
        files = [SimpleNamespace(rfilename=name) for name in self.files]
        return SimpleNamespace(private=self.private, siblings=files, sha="0" * 40)

    def hf_hub_download(self, repository: str, name: str, *, revision: str) -> str:
        assert revision == "0" * 40
        Path("download").write_bytes(self.files[name])
        return "download"

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> str:
        if self.refusal == "repository":
            raise ValueError("403 Forbidden: no rights\nmore lines")
        self.created.append((repository, private, exist_ok))
        self.exists = True
        return f"https://hub.example/{repository}"

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]
    ) -> None:
        assert commit_message == "Weights of step 0, ema"
        found = (path for path in Path(folder_path).rglob("*") if path.is_file())
        for name in [*filter_repo_objects(list(self.files), allow_patterns=delete_patterns)]:
            del self.files[name]
        self.files |= {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def use(monkeypatch, hub: Hub | None) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


def test_the_files_of_an_export_are_uploaded(monkeypatch, capsys):
    imported(denoiser())
    hub = Hub()
    use(monkeypatch, hub)
    assert run(["push", "run=x", "repo=me/digits", "private=true", "license=mit"]) == 0
    assert hub.created == [("me/digits", True, True)]
    assert "x: https://hub.example/me/digits" in capsys.readouterr().out
    assert run(["export", "run=x", "output=out"]) == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert hub.files[weights] == Path("out", weights).read_bytes()
    text = hub.files["README.md"].decode()
    assert 'DDIMPipeline.from_pretrained("me/digits")' in text
    assert "license: mit" in text
    assert sorted(path.name for path in Path().iterdir()) == ["out", "outputs", "sources"]


def test_other_formats_are_downloaded_first(monkeypatch):
    imported(denoiser())
    hub = Hub()
    use(monkeypatch, hub)
    assert run(["push", "run=x", "repo=me/digits", "format=safetensors"]) == 0
    text = hub.files["README.md"].decode()
    assert "hf download me/digits --local-dir digits" in text
    assert 'safe_open("digits/model.safetensors"' in text


def test_a_dry_run_shows_the_files_and_the_card_without_the_library(monkeypatch, capsys):
    imported(denoiser())
    use(monkeypatch, None)
    assert run(["push", "run=x", "repo=me/digits", "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert "unet/diffusion_pytorch_model.safetensors" in out
    assert "library_name: diffusers" in out
    assert "x: nothing was uploaded to me/digits" in out


def test_files_of_an_earlier_export_are_removed_and_others_stay(monkeypatch):
    imported(denoiser())
    hub = Hub(files={".gitattributes": b"", "model[1].bin": b""})
    use(monkeypatch, hub)
    assert run(["push", "run=x", "repo=me/digits", "force=true"]) == 0
    assert "unet/config.json" in hub.files
    hub.files["LICENSE"] = b"mine"
    assert run(["push", "run=x", "repo=me/digits", "format=safetensors"]) == 0
    assert sorted(hub.files) == [
        ".gitattributes",
        "LICENSE",
        "README.md",
        "model.safetensors",
        "model[1].bin",
    ]


@pytest.mark.parametrize("card", [{}, {"README.md": b"# Mine"}], ids=["no card", "card"])
def test_a_repository_of_another_program_needs_force(monkeypatch, capsys, card):
    imported(denoiser())
    hub = Hub(files={".gitattributes": b"", "model.bin": b"mine"} | card)
    before = dict(hub.files)
    use(monkeypatch, hub)
    capsys.readouterr()
    assert run(["push", "run=x", "repo=me/digits"]) == 2
    problem = f"has {min(set(before) - {'.gitattributes'})}, which diffuse did not write"
    remedy = "choose another repository, or set force=true"
    assert capsys.readouterr().err == f"diffuse: repo=me/digits: {problem}; {remedy}\n"
    assert hub.files == before
    assert run(["push", "run=x", "repo=me/digits", "force=true"]) == 0
    assert hub.files["model.bin"] == b"mine"
    assert "unet/config.json" in hub.files


def test_an_empty_repository_needs_no_force(monkeypatch):
    imported(denoiser())
    hub = Hub(files={".gitattributes": b""}, private=True)
    use(monkeypatch, hub)
    assert run(["push", "run=x", "repo=me/digits", "private=true"]) == 0
    assert "unet/config.json" in hub.files


def test_a_public_repository_is_refused_with_private(monkeypatch, capsys):
    imported(denoiser())
    hub = Hub(files={})
    use(monkeypatch, hub)
    capsys.readouterr()
    assert run(["push", "run=x", "repo=me/digits", "private=true"]) == 2
    remedy = "make it private in its settings on the Hub, or choose another repository"
    problem = f"private=true: me/digits exists and is public; {remedy}"
    assert capsys.readouterr().err == f"diffuse: {problem}\n"
    assert not hub.created
    assert not hub.files


REFUSED = [
    (None, "needs huggingface_hub: pip install 'diffuse-cli[hub]'"),
    (Hub(token=None), "needs a login to the Hugging Face Hub: hf auth login"),
    (Hub(online=False), "https://hub.example cannot be reached (no route)"),
    (Hub(refusal="login"), "the login to the Hugging Face Hub is refused (Invalid token)"),
    (Hub(refusal="reading"), "cannot be read (502 Bad Gateway)"),
    (Hub(refusal="repository"), "cannot be written (403 Forbidden: no rights)"),
]


@pytest.mark.parametrize(("hub", "problem"), REFUSED, ids=[problem for _, problem in REFUSED])
def test_a_push_that_fails_has_one_line(monkeypatch, capsys, hub, problem):
    imported(denoiser())
    use(monkeypatch, hub)
    capsys.readouterr()
    assert run(["push", "run=x", "repo=me/digits"]) == 2
    assert (
        capsys.readouterr().err
        == f"diffuse: repo=me/digits: {problem}; dry_run=true shows the files without it\n"
    )


def test_a_wrong_repository_is_named(capsys):
    imported(denoiser())
    capsys.readouterr()
    assert run(["push", "run=x", "repo=digits"]) == 2
    assert capsys.readouterr().err.startswith(
        "diffuse: repo=digits: is not the name of a repository, owner/name"
    )


@pytest.mark.parametrize("repo", ["hub:me/digits", "https://hub.example/me/digits"])
def test_the_right_form_of_a_repository_is_suggested(repo, capsys):
    assert run(["push", f"repo={repo}"]) == 2
    assert capsys.readouterr().err.endswith("owner/name; write repo=me/digits\n")


def test_the_library_has_these_functions():
    library = import_module("huggingface_hub")
    used = {
        "upload_folder": {"repo_id", "folder_path", "commit_message", "delete_patterns"},
        "create_repo": {"private", "exist_ok"},
        "repo_exists": {"repo_id"},
        "repo_info": {"repo_id"},
        "hf_hub_download": {"repo_id", "filename", "revision"},
    }
    for name, arguments in used.items():
        assert arguments <= set(signature(getattr(library.HfApi, name)).parameters)
    assert callable(library.get_token)

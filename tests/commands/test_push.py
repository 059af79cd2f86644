"""`diffuse push`.

The library of the hub is a stand-in: its protocol of uploads is its own affair, and tests have no login.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffusion_cli.cli import run
from helpers.exports import denoiser, imported


class Hub:
    """A huggingface_hub that keeps what is uploaded."""

    def __init__(
        self, *, token: str | None = "secret", refusal: str | None = None, online: bool = True
    ) -> None:
        self.token, self.refusal, self.online = token, refusal, online
        self.created: list[Any] = []
        self.files: dict[str, bytes] = {}
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

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> str:
        if self.refusal == "repository":
            raise ValueError("403 Forbidden: no rights\nmore lines")
        self.created.append((repository, private, exist_ok))
        return f"https://hub.example/{repository}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert commit_message == "Weights of step 0, ema"
        found = (path for path in Path(folder_path).rglob("*") if path.is_file())
        self.files = {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in found}


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


REFUSED = [
    (None, "needs huggingface_hub: pip install 'diffuse-cli[hub]'"),
    (Hub(token=None), "needs a login to the Hugging Face Hub: hf auth login"),
    (Hub(online=False), "https://hub.example cannot be reached (no route)"),
    (Hub(refusal="login"), "the login to the Hugging Face Hub is refused (Invalid token)"),
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


def test_the_library_has_these_functions():
    library = import_module("huggingface_hub")
    arguments = import_module("inspect").signature(library.HfApi.upload_folder).parameters
    assert {"repo_id", "folder_path", "commit_message"} <= set(arguments)
    assert {"private", "exist_ok"} <= set(
        import_module("inspect").signature(library.HfApi.create_repo).parameters
    )
    assert callable(library.get_token)

"""Repositories of the Hugging Face Hub: safe files only, and one line without a network."""

import sys
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffusion_cli.errors import FormatError
from diffusion_cli.system import hub


class Library:
    """A huggingface_hub that knows the repository `a/b`, in its cache or only on its server."""

    def __init__(self, monkeypatch: Any, *, online: bool, cached: bool) -> None:
        self.online, self.cached, self.calls = online, cached, []
        hub.snapshot.cache_clear()
        monkeypatch.setitem(sys.modules, "huggingface_hub", self)
        self.constants = SimpleNamespace(ENDPOINT="https://hub.example")

    def get_session(self) -> Any:
        return self

    def head(self, *_: Any, **__: Any) -> None:
        if not self.online:
            raise ConnectionError("no route")

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.calls.append(options)
        if name != "a/b" or (options.get("local_files_only") and not self.cached):
            raise ValueError("no such repository\nmore lines")
        return f"/cache/snapshots/{COMMIT}"

    def HfApi(self) -> "Library":  # noqa: N802
        return self

    def repo_info(self, name: str, *, revision: str | None) -> Any:
        if name != "a/b":
            raise ValueError("no such repository\nmore lines")
        files = [SimpleNamespace(rfilename=name) for name in ("a[1].json", "b.bin")]
        return SimpleNamespace(siblings=files)


COMMIT = "0123456789" * 4
FOLDER = Path("/cache/snapshots", COMMIT)


def chosen(paths: Collection[str]) -> list[str]:
    """A choice of files."""
    return [path for path in paths if path.endswith(".json")]


def test_only_chosen_files_are_downloaded_once_a_process(monkeypatch):
    library = Library(monkeypatch, online=True, cached=False)
    assert hub.snapshot("a/b", chosen) == hub.snapshot("a/b", chosen) == FOLDER
    (options,) = library.calls
    assert options == {"revision": None, "allow_patterns": ["a[[]1].json"]}
    assert hub.commit_of(FOLDER) == COMMIT
    assert hub.commit_of(Path("/cache", COMMIT)) is None


def test_a_revision_follows_the_name(monkeypatch):
    library = Library(monkeypatch, online=True, cached=False)
    hub.snapshot("a/b@refs/pr/1", chosen)
    assert library.calls[0]["revision"] == "refs/pr/1"
    for name in ("a/b@", "a/b@../x", "a/b@x y"):
        with pytest.raises(FormatError, match="names no revision after @"):
            hub.snapshot(name, chosen)


def test_a_repository_in_the_cache_needs_no_network(monkeypatch):
    library = Library(monkeypatch, online=False, cached=True)
    assert hub.snapshot("a/b", chosen) == FOLDER
    assert library.calls == [{"revision": None, "local_files_only": True}]


@pytest.mark.parametrize(
    ("name", "online", "reason"),
    [
        ("a/b", False, r"is not in the cache, and https://hub.example cannot be reached \(no route\)"),
        ("a/c", True, r"cannot be downloaded \(no such repository\)"),
        ("../etc", True, "is not the name of a repository"),
        ("a/b/c", True, "is not the name of a repository"),
    ],
)
def test_another_repository_is_refused_in_one_line(monkeypatch, name, online, reason):
    Library(monkeypatch, online=online, cached=False)
    with pytest.raises(FormatError, match=f"^{reason}$|^{reason}, owner/name$") as refused:
        hub.snapshot(name, chosen)
    assert ("connect to the network" in refused.value.remedy) == (not online)


def test_a_repository_without_files_of_a_model_is_refused(monkeypatch):
    Library(monkeypatch, online=True, cached=False)
    with pytest.raises(FormatError, match=r"^has no model that can be read$"):
        hub.snapshot("a/b", lambda _: [])


def test_the_reason_of_the_choice_of_files_is_given(monkeypatch):
    def refusing(_: Collection[str]) -> list[str]:
        raise FormatError("is pickled")

    Library(monkeypatch, online=True, cached=False)
    with pytest.raises(FormatError, match=r"^is pickled$"):
        hub.snapshot("a/b", refusing)


@pytest.mark.parametrize(
    "text", ["hub:me/digits", "https://hub.example/me/digits", "https://hub.example/me/digits/"]
)
def test_the_repository_of_an_address_is_found(text):
    assert hub.repository_in(text) == "me/digits"


@pytest.mark.parametrize("text", ["me/digits", "https://hub.example", "hub:digits", "a/b/c"])
def test_other_texts_have_no_repository(text):
    assert hub.repository_in(text) is None


def test_the_library_is_named_if_it_is_missing(monkeypatch):
    hub.snapshot.cache_clear()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FormatError, match=r"^needs huggingface_hub: pip install 'diffuse-cli\[hub\]'$"):
        hub.snapshot("a/b", chosen)

"""A folder that replaces another one: either of both is complete, whatever fails."""

from pathlib import Path

import pytest

from diffusion_cli.system.files import new_folder


def content(folder: Path) -> dict[str, str]:
    """The files of a folder by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


def replace(path: Path) -> None:
    with new_folder(path, replace=True) as temporary:
        (temporary / "new").write_text("2")


@pytest.fixture
def former(tmp_path) -> Path:
    """A folder to replace."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("1")
    return tmp_path / "out"


def test_a_folder_replaces_another_one(former):
    replace(former)
    assert content(former.parent) == {"out/new": "2"}


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_the_former_folder_stays_if_a_rename_fails_or_is_interrupted(former, monkeypatch, call, error, late):
    calls, rename = [], Path.rename

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) - 1 != call:
            return rename(self, target)
        if late:
            rename(self, target)
        raise error

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(type(error)):
        replace(former)
    complete = {"out/new": "2"} if late and call == 1 else {"out/old": "1"}
    assert content(former.parent) == complete


def test_nothing_is_removed_if_the_former_folder_cannot_be_restored(former, monkeypatch):
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == former:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        replace(former)
    assert sorted(content(former.parent).values()) == ["1", "2"]


def test_a_link_counts_as_a_folder_that_exists(tmp_path):
    (tmp_path / "out").symlink_to("missing")
    with pytest.raises(FileExistsError), new_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

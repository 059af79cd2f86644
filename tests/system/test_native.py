"""C code that is compiled on the user's machine, and what happens where it cannot be."""

import shutil
from pathlib import Path

import pytest

from diffusion_cli.system import native

SOURCE = "int answer(void) { return 42; }\n"


def answer(source):
    library = native.library(source)
    assert library is not None
    return library.answer()


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A C file, and an empty cache."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(native, "CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    source = tmp_path / "answer.c"
    source.write_text(SOURCE)
    yield source
    native.library.cache_clear()


def test_a_library_is_compiled_once_for_each_source(cached, monkeypatch, tmp_path):
    assert answer(cached) == 42
    (file,) = (tmp_path / "cache").iterdir()
    native.library.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert answer(cached) == 42
    monkeypatch.undo()
    native.library.cache_clear()
    monkeypatch.setattr(native, "CACHE", str(tmp_path / "cache"))
    cached.write_text(SOURCE.replace("42", "43"))
    assert answer(cached) == 43
    assert file.is_file()
    assert len([*(tmp_path / "cache").iterdir()]) == 2


def test_a_library_is_compiled_for_each_macro(cached):
    cached.write_text("#ifdef OTHER\nint answer(void) { return 7; }\n#else\n" + SOURCE + "#endif\n")
    other = native.library(cached, "OTHER")
    assert other is not None
    assert other.answer() == 7
    assert answer(cached) == 42


def test_a_damaged_library_is_compiled_again(cached, tmp_path):
    native.library(cached)
    (file,) = (tmp_path / "cache").iterdir()
    native.library.cache_clear()
    file.unlink()
    file.write_bytes(b"not a library")
    assert answer(cached) == 42


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", "false --option", "'cc"])
def test_without_a_working_compiler_there_is_no_library(cached, monkeypatch, tmp_path, compiler):
    monkeypatch.setenv("CC", compiler)
    assert native.library(cached) is None
    assert not any((tmp_path / "cache").glob("*"))


def test_an_empty_name_of_the_compiler_is_that_of_the_system(cached, monkeypatch):
    monkeypatch.setenv("CC", " ")
    assert answer(cached) == 42


def test_a_compiler_may_have_options_and_is_not_needed_for_what_is_in_the_cache(cached, monkeypatch):
    cached.write_text("int answer(void) { return ANSWER; }\n")
    monkeypatch.setenv("CC", "cc -DANSWER=44")
    assert answer(cached) == 44
    native.library.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert answer(cached) == 44


def test_a_source_with_errors_gives_no_library(cached, capfd):
    cached.write_text("int answer(void) { return")
    assert native.library(cached) is None
    assert capfd.readouterr() == ("", "")


def in_place_of_the_folder(folder, monkeypatch):
    folder.write_text("a file")


def others_may_write(folder, monkeypatch):
    folder.mkdir()
    folder.chmod(0o777)


def no_home(folder, monkeypatch):
    def unknown(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)


@pytest.mark.parametrize("trouble", [in_place_of_the_folder, others_may_write, no_home])
def test_a_cache_that_cannot_be_used_is_not_needed(cached, tmp_path, monkeypatch, trouble):
    trouble(tmp_path / "cache", monkeypatch)
    assert answer(cached) == 42
    assert not any((tmp_path / "cache").glob("*"))


def test_the_cache_is_private(cached, tmp_path):
    native.library(cached)
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_a_missing_source_gives_no_library(cached, tmp_path):
    assert native.library(tmp_path / "missing.c") is None

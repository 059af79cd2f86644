"""The Dockerfile: what it copies suffices for the wheel, and the image runs diffuse without rights of root."""

import json
import re
import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest

from helpers.wheels import build_wheel

ROOT = Path(__file__).parent.parent


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile in order: the word, and the rest of its line."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    parts = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in parts]


def values(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def test_each_stage_has_the_base_that_is_an_argument():
    assert instructions()[0] == ("ARG", "BASE=python:3.12-slim")
    assert [rest.split()[0] for rest in values("FROM")] == ["${BASE}", "${BASE}"]


def test_the_image_runs_the_command_of_the_package_as_a_user_without_rights_of_root():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [json.loads(rest) for rest in values("ENTRYPOINT")] == [list(project["scripts"])]
    (user,) = values("USER")
    assert user not in ("root", "0")
    assert any(f"useradd {user}" in rest for rest in values("RUN"))
    assert instructions()[-1][0] == "ENTRYPOINT"


def test_the_page_names_each_argument_with_its_default():
    page = (ROOT / "docs" / "howto" / "docker.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `?(.*?)`? \|", page, re.MULTILINE))
    arguments = dict(rest.split("=", 1) for rest in values("ARG"))
    del arguments["PIP_BREAK_SYSTEM_PACKAGES"]  # a setting of bases, not of users
    assert {name: default or "none" for name, default in arguments.items()} == rows


@pytest.mark.slow
def test_the_copied_files_suffice_for_the_wheel(tmp_path):
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [word for rest in values("COPY") for word in rest.split()[:-1]]
    assert sorted(copied) == sorted(sent)
    source = tmp_path / "source"
    source.mkdir()
    for name in copied:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    assert names_in_wheel(source, tmp_path / "copied") == names_in_wheel(ROOT, tmp_path / "all")


def names_in_wheel(source: Path, folder: Path) -> list[str]:
    return sorted(zipfile.ZipFile(build_wheel(source, folder)).namelist())

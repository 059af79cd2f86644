"""The wheel: everything is in it, and it works from an empty folder."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import diffusion_cli
from diffusion_cli import config

ROOT = Path(__file__).parent.parent
DIFFUSE = [sys.executable, "-c", "from diffusion_cli.cli import main; main()"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    subprocess.run([*command, str(ROOT)], check=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_configuration(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in config.CONF.rglob("*.yaml"):
        assert f"diffusion_cli/conf/{file.relative_to(config.CONF)}" in names
    weights = list((config.HERE / "metrics" / "features" / "classifiers").iterdir())
    assert weights
    for file in [*config.HERE.rglob("*.py"), *config.HERE.rglob("*.html"), *weights]:
        assert f"diffusion_cli/{file.relative_to(config.HERE)}" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"diffusion_cli", "diffuse_cli"}


@pytest.mark.slow
def test_the_wheel_trains_samples_and_evaluates_in_an_empty_folder(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    env = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    for words in (
        ["train", "max_steps=10", "log_every=5", "preview_steps=2", "preview_every=10"],
        ["sample", "steps=2", "num_samples=4"],
        ["eval", "steps=2", "num_samples=70", f"cache_dir={work}/cache", "features.steps=20"],
        ["report"],
    ):
        done = subprocess.run([*DIFFUSE, *words], cwd=work, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    where = subprocess.run(
        [sys.executable, "-c", "import diffusion_cli; print(diffusion_cli.__file__)"],
        cwd=work, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(site)
    (run,) = (work / "outputs").iterdir()
    made = {"checkpoints", "config.yaml", "metrics.csv", "previews", "samples", "metrics.json", "report.html"}
    assert made <= {path.name for path in run.iterdir()}


@pytest.mark.parametrize(
    ("subject", "accepted"),
    [
        ("samplers: add gradient estimation", True),
        ("data, formats: name files by their content", True),
        ("Merge branch 'main'", True),
        ("Add gradient estimation", False),
        ("samplers add gradient estimation", False),
        ("samplers: add " + "x" * 72, False),
    ],
)
def test_the_commit_hook_accepts_the_subjects_that_contributing_describes(subject, accepted):
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    (hook,) = [hook for hook in hooks if hook["id"] == "commit-subject"]
    message = f"{subject}\n\nA body: it says why.\n"
    assert (re.search(hook["entry"], message, re.MULTILINE) is not None) == accepted


def test_the_citation_and_the_changelog_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.search(r"^## \[(\d.*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released
    assert (citation["version"], citation["date-released"]) == released.groups()
    assert diffusion_cli.__version__ == released[1]
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]

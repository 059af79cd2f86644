"""The wheel: everything is in it, and it works from an empty folder; its dependencies are those that it imports."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import diffusion_cli
from diffusion_cli import config
from helpers.wheels import build_wheel
from matrix import COMMANDS, read_project, requirements

ROOT = Path(__file__).parent.parent
DIFFUSE = """
import shlex, sys
import diffusion_cli
from diffusion_cli.cli import run
for line in sys.argv[1:]:
    assert run(shlex.split(line)) == 0, line
print(diffusion_cli.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_configuration(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in config.CONF.rglob("*.yaml"):
        assert f"diffusion_cli/conf/{file.relative_to(config.CONF)}" in names
    weights = list((config.HERE / "metrics" / "features" / "classifiers").iterdir())
    assert weights
    for file in [
        *(path for kind in ("py", "c", "html", "yaml") for path in config.HERE.rglob(f"*.{kind}")),
        *weights,
    ]:
        assert f"diffusion_cli/{file.relative_to(config.HERE)}" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"diffusion_cli", "diffuse_cli"}


@pytest.mark.slow
def test_the_page_of_an_index_shows_the_readme_without_pictures_and_links_that_lead_nowhere(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (file,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        _, _, page = archive.read(file).decode().partition("\n\n")
    readme = (ROOT / "README.md").read_text()
    assert "![" in readme
    assert "](" not in page
    assert "*Samples of the model" not in page  # the caption of a picture
    assert "pip install diffuse-cli\n" in page
    assert "its own seed (docs/explanation/reproducibility.md)" in page
    python, python_on_the_page = (
        re.findall(r"```python\n.*?```", text, re.DOTALL) for text in (readme, page)
    )
    assert python == python_on_the_page


@pytest.mark.slow
def test_each_dependency_is_declared_and_used():
    providers = packages_distributions()
    imported = {
        normal(providers.get(module, [module])[0])
        for file in config.HERE.rglob("*.py")
        for module in imports(file)
        if module not in sys.stdlib_module_names and module != "diffusion_cli"
    }
    project = read_project()
    declared = {normal(requirement.name) for requirement in requirements(project)}
    assert imported <= declared
    always = {normal(Requirement(words).name) for words in project["dependencies"]}
    assert always - imported == {"tensorboard"}  # which Lightning's logger imports


def imports(file: Path) -> Iterator[str]:
    """The first part of the name of each module that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]


def normal(name: str) -> str:
    """The normal form of the name of a distribution (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
def test_the_wheel_trains_samples_and_evaluates_in_an_empty_folder(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    env = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DIFFUSE, *map(shlex.join, COMMANDS)],
        cwd=work, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(site)
    (run,) = (work / "outputs").iterdir()
    made = {"checkpoints", "config.yaml", "metrics.csv", "previews", "samples", "metrics.json", "report.html"}
    assert made <= {path.name for path in run.iterdir()}
    assert len(list((work / "edits").glob("*.png"))) > 1


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

"""Plugins: classes and options of the user's own modules, allowed by the user only."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from diffusion_cli import config
from diffusion_cli.cli import run
from diffusion_cli.config import NOT_ALLOWED, check_node, load, plugins
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.checkpoint import LAST
from helpers import TINY
from helpers.plugins import EXAMPLE, forget_modules

SMALL = ["plugins=[bars]", "dataset=bars", "model=convolutions", "output_dir=o", "name=run"]
RUN = [word for word in TINY if not word.startswith(("model.", "name="))]


@pytest.mark.usefixtures("one_thread")
def test_a_run_of_a_plugin_trains_continues_samples_and_is_evaluated(project, monkeypatch, capsys):
    assert run([*RUN, *SMALL, "max_steps=3"]) == 0
    assert run(["train", "plugins=bars", "run=run", "output_dir=o", "max_steps=5"]) == 0
    assert run(["sample", "run=run", "output_dir=o", "sampler=renamed", "steps=2", "num_samples=3"]) == 0
    evaluate = [
        "metric=is",
        "metric.is.splits=1",
        "features=classifier",
        "features.steps=5",
        "num_samples=20",
    ]
    assert run(["eval", "run=run", "output_dir=o", "cache_dir=cache", "steps=2", *evaluate]) == 0
    capsys.readouterr()
    monkeypatch.setenv(plugins.VARIABLE, "")  # another person, who does not allow it
    assert run(["sample", "run=run", "output_dir=o", "steps=2"]) == 2
    line = "its model bars.network.Convolutions is not a class of an allowed plugin; add plugins=[bars]"
    assert line in capsys.readouterr().err


class Imports:
    """Records the modules that Python looks for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def find_spec(self, name, path=None, target=None):
        self.names.add(name.partition(".")[0])


@pytest.mark.usefixtures("one_thread")
def test_a_checkpoint_imports_no_module_that_is_not_allowed(project, monkeypatch, capsys):
    assert run([*RUN, *SMALL, "max_steps=1"]) == 0
    monkeypatch.setenv(plugins.VARIABLE, "")
    forget_modules()
    hook = Imports()
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    for command in (["sample", "steps=1"], ["eval", "num_samples=20"], ["edit", "img2img", "input=."]):
        assert run([*command, "run=run", "output_dir=o"]) == 2
    capsys.readouterr()
    assert run(["train", "run=run", "output_dir=o"]) == 2
    (line,) = capsys.readouterr().err.splitlines()  # for the dataset and the model
    assert "is not a class of an allowed plugin; add plugins=[bars] if you trust this module" in line
    assert "bars" not in hook.names
    assert (project / "o" / "run" / LAST).is_file()


def test_options_of_a_plugin_that_is_not_allowed_are_one_line(project, capsys):
    assert run(["train", "dataset=bars", "model=convolutions", "max_steps=0"]) == 2
    option, steps = capsys.readouterr().err.splitlines()
    assert option == "diffuse: dataset=bars: unknown option; add plugins=[bars] if you trust it"
    assert steps.startswith("diffuse: max_steps=0: must be")


@pytest.mark.parametrize("target", ["torch.nn.Linear", "bars.extra.system"])
def test_functions_that_a_plugin_only_imports_are_not_built(project, target):
    config.allow(["bars"])
    (problem,) = check_node("dataset", {"_target_": target, "command": "true"})
    in_plugin = target.startswith("bars")
    assert problem.key == ("plugins" if in_plugin else "dataset._target_")
    assert problem.problem == ("defines no class system" if in_plugin else NOT_ALLOWED)
    (problem,) = check_node("dataset", {"_target_": "os.system", "command": "true"})
    assert problem.problem == "not a class of diffusion_cli for dataset"


def test_values_of_a_plugin_are_checked_by_its_types(project):
    with pytest.raises(UsageError) as error:
        load("train", config.without_plugins([*SMALL, "dataset.count=0", "dataset.ink=red", "model.width=a"]))
    assert sorted(error.value.lines) == [
        "dataset.count=0: must be greater than 0",
        "dataset.ink=red: must be white or gray",
        "model.width=a: must be an integer",
    ]


def test_a_class_suits_its_group(project):
    config.allow(["bars"])
    (problem,) = check_node("sampler", {"_target_": "bars.data.Bars"})
    assert str(problem).endswith("not a class for sampler; derive it from diffusion_cli.samplers.Sampler")


def test_options_of_a_plugin_are_in_the_help_and_in_suggestions(project, capsys):
    assert run(["train", "plugins=[bars]", "dataset=help"]) == 0
    assert "8x8 images of bars, 2 classes" in capsys.readouterr().out
    assert "dataset=bars" in config.complete(["train", "dataset=b"])
    assert run(["train", "dataset=barz"]) == 2
    assert "did you mean bars?" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["file", "variable", "entry point"])
def test_a_module_is_allowed_by(project, monkeypatch, how):
    assert "bars" not in config.options("dataset")
    if how == "file":
        (project / "diffuse.yaml").write_text("plugins: [bars]\n")
        plugins._read.cache_clear()
        config.without_plugins(["plugins=[bars]"])
        monkeypatch.setenv(plugins.VARIABLE, "")
    elif how == "variable":
        monkeypatch.setenv(plugins.VARIABLE, "bars")
    else:
        point = EntryPoint("shapes", "bars", plugins.ENTRY_POINTS)
        monkeypatch.setattr(plugins, "_installed", lambda: (point,))
    assert "bars" in config.options("dataset")
    assert load("train", ["dataset=bars"]).model_dump()["dataset"]["count"] == 400


def test_a_folder_of_options_may_be_named_in_the_file(project):
    (project / "mine" / "sampler").mkdir(parents=True)
    (project / "mine" / "sampler" / "half.yaml").write_text(
        "# Half the noise.\n_target_: diffusion_cli.samplers.DDIM\neta: 0.5  # noise\nspacing: trailing  # grid\n"
    )
    (project / "diffuse.yaml").write_text("config_dir: [mine]\n")
    plugins._read.cache_clear()
    assert load("sample", ["run=x", "sampler=half"]).model_dump()["sampler"]["eta"] == 0.5


def test_a_module_that_is_not_there_is_one_line_and_is_not_allowed(project, capsys):
    assert run(["train", "plugins=[no_such_module]"]) == 2
    line = "plugins=no_such_module: no such module; install it, or run diffuse in its folder"
    assert line in capsys.readouterr().err
    assert plugins.allowed() == []


def test_no_package_is_imported_to_find_its_options(project):
    (project / "bars" / "__init__.py").write_text("raise RuntimeError('imported')")
    (project / "bars" / "inner").mkdir()
    (project / "bars" / "inner" / "__init__.py").touch()
    config.allow(["bars.inner", "bars"])
    assert "bars" in config.options("dataset")
    assert config.complete(["train", "plugins=[bars]", "dataset=ba"]) == ["dataset=bars"]
    assert not [name for name in sys.modules if name.startswith("bars")]


def test_an_installed_plugin_leaves_the_path_of_modules_alone(project, monkeypatch):
    (project / "installed").mkdir()
    (project / "bars").rename(project / "installed" / "bars")
    monkeypatch.setattr(sys, "path", [str(project / "installed"), *sys.path])
    before = [*sys.path]
    config.allow(["bars"])
    assert load("train", ["dataset=bars"]).model_dump()["dataset"]["count"] == 400
    assert sys.path == before


def test_an_option_with_a_name_of_ours_is_refused(project):
    (project / "bars" / "conf" / "sampler" / "ddim.yaml").write_text("_target_: bars.extra.Renamed\n")
    config.allow(["bars"])
    with pytest.raises(UsageError, match=r"sampler=ddim is an option of .*rename it"):
        load("sample", ["run=x", "sampler=ddim"])


def test_a_folder_that_was_removed_has_no_plugins(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(["train", "--help"]) == 0


@pytest.mark.usefixtures("one_thread")
def test_a_network_that_needs_its_numbers_to_be_built_is_loaded(project, capsys):
    file = project / "bars" / "network.py"
    text = file.read_text()
    file.write_text(
        text.replace(
            "zeros_(self.last.weight)", "zeros_(self.last.weight)\n        self.last.weight.sum().item()"
        )
    )
    assert run([*RUN, *SMALL, "max_steps=1"]) == 0
    assert "Next: diffuse sample run=o/run 'plugins=[bars]'" in capsys.readouterr().out
    assert run(["sample", "plugins=[bars]", "run=run", "output_dir=o", "steps=2", "num_samples=1"]) == 0


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plugins: [", "is not valid"),
        (
            "plugin: [a]",
            "diffuse.yaml: plugin: unknown key; write plugins: [module] and config_dir: [folder]",
        ),
        (
            "plugins: 3",
            "diffuse.yaml: plugins=3: must be a list of names; write plugins: [module] and config_dir",
        ),
        ("config_dir: nowhere", "diffuse.yaml: config_dir=nowhere: no such folder"),
        (
            "plugins: [bars]",
            "diffuse.yaml: plugins=bars: was never allowed in this folder; add plugins=[bars] once",
        ),
        ("config_dir: [nowhere]", "diffuse.yaml: config_dir=nowhere: no such folder"),
    ],
)
def test_mistakes_in_the_file_are_one_line(project, capsys, text, line):
    (project / "diffuse.yaml").write_text(text)
    plugins._read.cache_clear()
    assert run(["train", "max_steps=1"]) == 2
    printed = capsys.readouterr().err
    assert line in printed
    assert printed.count("\n") == 1


def test_errors_in_a_plugin_are_not_reported_as_ours(project, capsys):
    file = project / "bars" / "data.py"
    file.write_text(
        file.read_text().replace("torch.zeros(self.count, 1, 8, 8", "torch.zeros(self.count, 1, 8, -8")
    )
    assert run([*RUN, *SMALL, "max_steps=1"]) == 1
    assert f"{file}:" in (printed := capsys.readouterr().err.splitlines()[-1])
    assert printed.endswith("error in a plugin, see above")
    file.write_text("import nothing_of_this_name\n")
    forget_modules()
    assert run([*RUN, *SMALL, "max_steps=1"]) == 2
    line = (
        "cannot be imported (ModuleNotFoundError: No module named 'nothing_of_this_name'); correct the module"
    )
    assert line in capsys.readouterr().err
    assert os.environ[plugins.VARIABLE] == "bars"


@pytest.mark.slow
def test_the_tests_of_the_example_pass(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "plugin")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(words, cwd=tmp_path / "plugin", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_an_option_that_is_not_allowed_yet_is_named_with_its_plugin(project, capsys, monkeypatch):
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    name = next((project / "bars" / "conf" / "dataset").glob("*.yaml")).stem
    assert run(["train", f"dataset={name}"]) == 2
    assert f"dataset={name}: unknown option; add plugins=[bars] if you trust it" in capsys.readouterr().err
    (project / "conf" / "dataset").mkdir(parents=True)
    (project / "conf" / "dataset" / "own.yaml").write_text("_target_: diffusion_cli.data.Digits\n")
    assert run(["train", "dataset=own"]) == 2
    assert "dataset=own: unknown option; add --config-dir conf" in capsys.readouterr().err


def test_no_option_of_a_list_is_an_empty_list(capsys):
    assert run(["train", "callback=null"]) == 2
    assert "callback=null: unknown option; write callback=[]" in capsys.readouterr().err

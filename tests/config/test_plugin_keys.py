"""Arguments that an option of a user leaves out: their help, their values, and their errors."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_cli import config
from diffusion_cli.cli import run
from diffusion_cli.config import load
from diffusion_cli.config.option_keys import completed
from diffusion_cli.errors import UsageError
from helpers import TINY
from helpers.plugins import forget_modules

GOOGLE = """
    Args:
        depth: Number of blocks,
            after the first.
        gains: factors of the blocks.
"""
NUMPY = """
    Parameters
    ----------
    depth : int, default 2
        Number of blocks,
        after the first.
    gains
        factors of the blocks
"""
REST = """
    :param int depth: Number of blocks,
        after the first.
    :param gains: factors of the blocks
"""
DEEP = '''"""A network without any key in YAML."""

from typing import Literal

from .network import Convolutions as Base

LEAST = 1


class Deep(Base):
    """A stack of convolutions.

    More words.
    {arguments}
    """

    def __init__(
        self,
        shape,
        num_classes,
        size=8,
        *,
        width: int = 16,
        depth: int = 2,
        gains: tuple[float, ...] = (1.0, 2.0),
        kind: Literal["a b", "null"] = "a b",
        least: float = LEAST / 2,
        sloppy: int = None,
        state: object = Base,
    ) -> None:
        super().__init__(shape, num_classes, width=width)
        self.depth = depth


class Inner(Deep):
    pass
'''
FILE = "_target_: bars.deep.Deep\nwidth: 8\n"
WORDS = ["dataset=bars", "model=deep"]


@pytest.fixture
def deep(project) -> Path:
    """The folder of the plugin's models, with an option that names its class and one argument."""
    (project / "bars" / "deep.py").write_text(DEEP.replace("{arguments}", GOOGLE))
    folder = project / "bars" / "conf" / "model"
    (folder / "deep.yaml").write_text(FILE)
    config.allow(["bars"])
    return folder


@pytest.mark.parametrize("arguments", [GOOGLE, NUMPY, REST], ids=["google", "numpy", "rest"])
def test_help_lists_the_arguments_with_the_words_of_the_docstring(project, deep, capsys, arguments):
    (project / "bars" / "deep.py").write_text(DEEP.replace("{arguments}", arguments))
    forget_modules()
    assert run(["train", *WORDS, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("model=deep  A stack of convolutions")
    assert [" ".join(line.split()) for line in lines[start + 1 : start + 8]] == [
        "model.width=8 (int)",
        "model.depth=2 Number of blocks, after the first (int)",
        "model.gains=[1.0,2.0] factors of the blocks (tuple[float, ...])",
        "model.kind=a b (Literal['a b', 'null'])",
        "model.least=LEAST / 2 (float)",
        "model.sloppy=null (int)",
        "model.state=Base (object)",
    ]
    assert run(["train", "model=help"]) == 0
    assert "deep A stack of convolutions" in " ".join(capsys.readouterr().out.split())


def test_comments_in_the_file_come_before_the_words_of_the_docstring(deep, capsys):
    (deep / "deep.yaml").write_text(f"# A title.\n{FILE}depth: 5  # blocks\n")
    assert run(["train", *WORDS, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "model=deep A title." in text
    assert "model.depth=5 blocks model.gains" in text


@pytest.mark.parametrize("words", [["--help"], ["model=help"]])
def test_help_on_a_plugin_imports_neither_torch_nor_the_plugin(deep, words):
    (deep / "inner.yaml").write_text("_target_: bars.deep.Inner\n")
    assert "inner" in printed_without_torch([*WORDS[:1], "model=inner", *words])


def printed_without_torch(words: list[str]) -> str:
    """The output of a training's command in a process that imports neither torch nor the plugin."""
    code = (
        "import sys; from diffusion_cli.cli import run; code = run(sys.argv[1:]);"
        "sys.exit(code or any(name.partition('.')[0] in ('torch', 'bars') for name in sys.modules))"
    )
    command = [sys.executable, "-c", code, "train", "plugins=bars", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("group", "line", "base", "key"),
    [
        ("optimizer", "import torch", "torch.optim.AdamW", "weight_decay=0.01"),
        ("optimizer", "from torch import optim", "optim.AdamW", "weight_decay=0.01"),
        ("callback", "import lightning", "lightning.Callback", ""),
    ],
)
def test_help_on_a_class_of_a_library_without_an_own_constructor_reads_the_base(
    project, group, line, base, key
):
    (project / "bars" / "sub.py").write_text(f'{line}\n\n\nclass Sub({base}):\n    """Of a plugin."""\n')
    (project / "bars" / "conf" / group).mkdir(exist_ok=True)
    node = "sub:\n  _target_: " if group == "callback" else "_target_: "
    (project / "bars" / "conf" / group / "sub.yaml").write_text(f"{node}bars.sub.Sub\n")
    assert f"{group}.{key}" in printed_without_torch([f"{group}=sub", "--help"]) or not key


def test_a_class_may_have_the_name_of_its_base(project, capsys):
    (project / "bars" / "sub.py").write_text(
        "from torch.optim import AdamW\n\n\nclass AdamW(AdamW):\n    pass\n"
    )
    (project / "bars" / "conf" / "optimizer").mkdir()
    (project / "bars" / "conf" / "optimizer" / "sub.yaml").write_text("_target_: bars.sub.AdamW\n")
    assert run(["train", "plugins=bars", "optimizer=sub", "--help"]) == 0
    assert "optimizer.weight_decay=0.01" in capsys.readouterr().out


def test_a_constructor_without_source_is_imported_for_the_help(project, deep, capsys):
    (project / "bars" / "deep.py").write_text(
        "from dataclasses import dataclass\n\n\n@dataclass(kw_only=True)\nclass Deep:\n    width: int = 4\n"
        "    depth: int = 2\n"
    )
    assert run(["train", *WORDS, "--help"]) == 0
    assert "model.depth=2" in capsys.readouterr().out


def test_arguments_that_the_file_leaves_out_are_keys_with_the_defaults_of_the_class(deep):
    node = load("train", WORDS).model_dump()["model"]
    assert node == {
        "_target_": "bars.deep.Deep", "width": 8, "depth": 2, "gains": [1.0, 2.0], "kind": "a b", "least": 0.5,
        "sloppy": None,
    }  # fmt: skip
    changed = load("train", [*WORDS, "model.depth=3", "model.gains=[2]", "model.sloppy=1"])
    assert changed.model_dump()["model"] == node | {"depth": 3, "gains": [2], "sloppy": 1}
    assert isinstance(changed, config.TrainConfig)
    assert changed.name == "bars-cosine-deep-depth_3-gains__2_-sloppy_1"
    swept = config.expand("train", [*WORDS, "model.depth=1,3"])
    assert [load("train", job).model_dump()["model"]["depth"] for job in swept.jobs] == [1, 3]


def test_options_of_an_experiment_come_before_the_defaults_of_the_class(project, deep):
    (project / "bars" / "conf" / "experiment").mkdir()
    (project / "bars" / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n# Mine.\ndefaults:\n  - override /dataset: bars\n  - override /model: deep\n\nmodel:\n"
        "  depth: 7  # blocks\n"
    )
    assert load("train", ["experiment=mine"]).model_dump()["model"]["depth"] == 7


def test_keys_of_a_class_are_completed_and_suggested(deep, capsys):
    assert config.complete(["train", *WORDS, "model.d"]) == ["model.depth="]
    assert run(["train", *WORDS, "model.deptg=3"]) == 2
    assert "model.deptg=3: unknown key; did you mean model.depth?" in capsys.readouterr().err
    assert run(["train", *WORDS, "--model.depth", "3"]) == 2
    assert "write model.depth=3" in capsys.readouterr().err
    assert run(["train", "dataset=bars", "model.least=3"]) == 2
    assert "model.least=3: applies only to model=deep; add model=deep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words", "line"),
    [
        ("", ["model.depth=a"], "model.depth=a: must be an integer"),
        ("", ["model.gains=[1,a]"], "model.gains.1=a: must be a number"),
        ("", ["model.kind=c"], "model.kind=c: must be a b or null"),
        ("size: 4\n", [], "model.size=4: not keyword-only; write *, before it in __init__ of bars.deep.Deep"),
        ("colour: 4\n", [], "model.colour=4: unknown key"),
    ],
)
def test_wrong_values_of_keys_are_one_line(deep, capsys, text, words, line):
    (deep / "deep.yaml").write_text(FILE + text)
    assert run(["train", *WORDS, *words]) == 2
    printed = capsys.readouterr().err
    assert f"diffuse: {line}" in printed
    assert printed.count("\n") == 1


def test_a_required_argument_that_the_file_leaves_out_may_be_given(project, deep, capsys):
    file = project / "bars" / "deep.py"
    file.write_text(file.read_text().replace("depth: int = 2", "depth: int"))
    forget_modules()
    assert run(["train", *WORDS]) == 2
    assert "model.depth: missing; add model.depth=<value>" in capsys.readouterr().err
    assert load("train", [*WORDS, "model.depth=4"]).model_dump()["model"]["depth"] == 4


@pytest.mark.usefixtures("one_thread")
def test_a_run_continues_after_its_class_gained_an_argument(project, deep, capsys):
    file = project / "bars" / "deep.py"
    run_words = [word for word in TINY if not word.startswith(("model.", "name="))]
    words = [*run_words, *WORDS, "output_dir=o", "name=run"]
    assert run([*words, "max_steps=1"]) == 0
    file.write_text(file.read_text().replace("width: int = 16,", "width: int = 16, extra: float = 0.5,"))
    forget_modules()
    assert run([*words, "max_steps=2"]) == 0
    assert run(["train", "run=o/run", "max_steps=3"]) == 0
    assert run([*words, "max_steps=4", "model.extra=1"]) == 2
    assert "model.extra=1: the run in o/run has 0.5" in capsys.readouterr().err


def test_classes_that_are_not_allowed_are_left_as_they_are():
    node = {"model": {"_target_": "bars.deep.Deep"}, "metric": {"fid": {}}, "seed": 0}
    assert completed(node) == node


# --- Options of --config-dir for classes of this package ----------------------------------


@pytest.fixture
def mine(tmp_path) -> Path:
    for name, text in {
        "sampler": "_target_: diffusion_cli.samplers.DDIM\n",
        "dataset": "_target_: diffusion_cli.data.Folder\n",
        "optimizer": "_target_: diffusion_cli.training.AdamW\nbetas: [0.9, 0.95]\n",
        "metric": "mine:\n  _target_: diffusion_cli.metrics.FrechetDistance\n  infinity: 15\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.yaml").write_text(text)
    return tmp_path


def test_an_option_of_our_class_may_leave_out_arguments(mine):
    made = load("train", ["sampler=mine", "optimizer=mine", "metric=[mine]", "sampler.eta=1"], [mine])
    usual = load("train", [])
    optimizer = usual.model_dump()["optimizer"] | {"betas": [0.9, 0.95]}
    assert made.model_dump()["sampler"] == usual.model_dump()["sampler"] | {"eta": 1.0}
    assert made.model_dump()["optimizer"] == optimizer, "lr and the steps follow the recipe"
    metric = usual.model_dump()["metric"]["fid"]
    assert made.model_dump()["metric"] == {"mine": metric | {"infinity": 15}}


@pytest.mark.parametrize(("group", "option", "key"), [
    ("model", "unet_tiny", "norm_eps"), ("model", "dit_tiny", "mlp_norm_eps"), ("logger", "mlflow", "experiment"),
])  # fmt: skip
def test_a_copy_of_an_option_may_leave_out_an_argument_whose_default_is_a_constant(
    tmp_path, group, option, key
):
    text = (config.CONF / group / f"{option}.yaml").read_text()
    lines = [line for line in text.splitlines(keepends=True) if not line.strip().startswith(f"{key}:")]
    assert len(lines) < len(text.splitlines())
    (tmp_path / group).mkdir()
    usual = load("train", [f"{group}={option}"]).model_dump()[group]
    for name, kept in {"whole": text, "shorter": "".join(lines)}.items():
        (tmp_path / group / f"{name}.yaml").write_text(kept)
        assert load("train", [f"{group}={name}"], [tmp_path]).model_dump()[group] == usual


def test_a_required_key_of_our_class_is_named(mine, capsys):
    with pytest.raises(UsageError, match=r"dataset.path: missing; add dataset.path=<value>"):
        load("train", ["dataset=mine"], [mine])
    assert load("train", ["dataset=mine", "dataset.path=."], [mine]).model_dump()["dataset"]["channels"] == 3
    assert run(["train", "--config-dir", str(mine), "dataset=mine", "sampler=mine", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "dataset.path= folder" in text
    assert "; required dataset.masks=null" in text
    assert "sampler.eta=0.0 share of fresh noise" in text


def test_a_metric_without_its_name_is_one_line(mine):
    (mine / "metric" / "mine.yaml").write_text("_target_: diffusion_cli.metrics.FrechetDistance\n")
    line = r"has no name above its _target_; write mine: in a line above, and indent the other lines"
    with pytest.raises(UsageError, match=line):
        load("eval", ["run=x", "metric=mine"], [mine])

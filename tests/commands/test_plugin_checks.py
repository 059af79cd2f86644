"""Mistakes in the classes of a plugin: one line before training, or a traceback that is not called ours."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffusion_cli.cli import run
from diffusion_cli.config import plugins
from helpers.plugins import forget_modules

TRAIN = [
    "train", "plugins=[mine]", "dataset=mine", "dataset.count=32", "model=net", "model.width=4", "max_steps=1",
    "preview_every=null", "trainer=cpu", "batch_size=8", "name=run",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a dataset `mine` and a network `net` of `diffuse new`."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        patch.setenv(plugins.VARIABLE, "")
        assert run(["new", "dataset", "mine"]) == run(["new", "model", "net", "plugin=mine"]) == 0
    return folder


@pytest.fixture
def train(made, tmp_path, monkeypatch, capsys) -> Iterator[Callable[..., tuple[int, str]]]:
    """Trains with `mine` and `net`, after replacements in their modules."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(plugins.VARIABLE, "")

    def trained(name: str, *replacements: tuple[str, str]) -> tuple[int, str]:
        forget_modules("mine")
        file = Path("mine", name)
        text = file.read_text()
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        file.write_text(text)
        capsys.readouterr()
        code = run(TRAIN)
        return code, capsys.readouterr().err

    yield trained
    forget_modules("mine")


RETURN = "return MemoryImages(images, labels)"
OUTPUT = "return self.last(torch.relu(h))"


@pytest.mark.parametrize(
    ("file", "old", "new", "line"),
    [
        ("mine.py", "def load", "def read", "dataset._target_=mine.mine.Mine: lacks methods; define load as "),
        ("mine.py", "self, data_dir: str, *", "self, *", "its __init__ does not fit the 1 positional argument of its"),
        ("mine.py", '    class_names = ("small", "large")\n', "", "lacks class_names; set them as in Dataset"),
        ("mine.py", RETURN, "return images, labels", "load returns tuple, not Images; return MemoryImages(pixels,"),
        ("mine.py", RETURN, "return MemoryImages(images.long(), labels)", "images are int64; return uint8, or float32"),
        ("mine.py", RETURN, "return MemoryImages(images.float(), labels)", "values up to 255; scale them to [-1, 1]"),
        ("mine.py", RETURN, "return MemoryImages(images[..., :8], labels)", "shape [1, 16, 8], not shape=[1, 16, 16]"),
        ("mine.py", RETURN, "return MemoryImages(images, None)", "has class_names but no labels; give both or neither"),
        ("mine.py", RETURN, "return MemoryImages(images, labels + 1)", "labels are not int64 [32] in 0..1; number the"),
        ("net.py", OUTPUT, "return self.last(h)[..., :4]", "images [1, 1, 16, 16] is [1, 1, 16, 4]; return a tensor"),
        ("net.py", OUTPUT, "return None", "its output for images [1, 1, 16, 16] is NoneType; return a tensor"),
        ("net.py", "self.num_classes = None", "pass", "model._target_=mine.net.Net: lacks num_classes; set it to"),
    ],
)  # fmt: skip
def test_a_part_that_lacks_something_is_one_line_before_training(train, file, old, new, line):
    code, printed = train(file, (old, new))
    assert code == 2
    assert line in printed
    assert len(printed.splitlines()) == 1
    assert not list(Path("outputs").glob("*/checkpoints/*"))


@pytest.mark.usefixtures("one_thread")
def test_an_error_beyond_the_checks_is_not_called_one_of_ours(train):
    code, printed = train("net.py", (OUTPUT, f"{OUTPUT} if len(x) == 1 else None"))
    assert code == 1
    last = printed.splitlines()[-1]
    assert last.startswith("diffuse: plugins=[mine] or diffuse ")
    assert last.endswith(": error, see above; try it without the plugin")


def test_an_option_file_in_a_folder_that_is_no_group_is_named(train):
    Path("mine", "conf", "dataset").rename(Path("mine", "conf", "datasets"))
    code, printed = train("mine.py")
    assert code == 2
    assert "dataset=mine: unknown option; move " in printed
    assert "conf/datasets/mine.yaml to " in printed

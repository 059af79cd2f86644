"""The classes of a data set, from its files through a run to samples that are a data set again."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands.outputs import claim, keep_labels, keep_seeds
from diffusion_cli.commands.samples import given_samples
from diffusion_cli.config import CONF
from diffusion_cli.data import Folder

TINY = [
    "model=unet_tiny",
    "model.channels=8",
    "model.norm_groups=4",
    "model.num_heads=1",
    "model.head_channels=null",
    "batch_size=6",
    "preview_steps=1",
    "logger=csv",
    "trainer=cpu",
    "precision=fp32",
    "model.class_conditional=true",
]


def write(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)


def folder(path: Path, **changes) -> Folder:
    node = yaml.safe_load((CONF / "dataset" / "folder.yaml").read_text())["dataset"]
    options = {**node, "path": str(path), "resolution": 8, "channels": 1, "held_out": 0, **changes}
    return Folder(".", **{key: value for key, value in options.items() if key != "_target_"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run on classes with names that tables must quote, or that look like words of the command line."""
    root = tmp_path_factory.mktemp("classes")
    for number, name in enumerate(("red, blue", "none", "caf\xe9")):
        for image in range(4):
            write(root / "data" / name / f"{image}.png", 50 * number + image)
    words = [
        f"dataset.path={root / 'data'}",
        "dataset.resolution=8",
        "dataset.channels=1",
        "dataset.held_out=0",
    ]
    words += ["max_steps=1", "name=run", f"output_dir={root}"]
    assert run(["train", "dataset=folder", *words, *TINY]) == 0
    return root / "run"


def sample(trained: Path, output: Path, *words: str) -> int:
    return run(["sample", f"run={trained}", f"output={output}", "steps=1", "device=cpu", *words])


# --- Samples as a data set -------------------------------------------


def test_samples_of_classes_are_a_data_set_with_these_classes(trained, tmp_path):
    assert sample(trained, tmp_path, "label=all", "num_samples=7") == 0
    assert (tmp_path / "labels.csv").read_text().splitlines()[:3] == [
        "file,label",
        "000000.png,café",
        "000001.png,none",
    ]
    synthetic = folder(tmp_path)
    assert synthetic.class_names == ("café", "none", "red, blue")
    assert synthetic.labels is not None
    assert synthetic.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    words = [
        "dataset.resolution=8",
        "dataset.channels=1",
        "max_steps=1",
        "name=again",
        f"output_dir={tmp_path / 'o'}",
    ]
    assert run(["train", "dataset=folder", f"dataset.path={tmp_path}", *words, *TINY]) == 0


def test_the_table_of_samples_grows_with_them(trained, tmp_path):
    assert sample(trained, tmp_path, "label=[none,café]", "num_samples=2") == 0
    assert sample(trained, tmp_path, "label=[none,café]", "num_samples=1", "seed=4") == 0
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    assert lines == ["file,label", "000000.png,none", "000001.png,café", "000004.png,none"]


def test_samples_without_labels_get_no_table(trained, tmp_path):
    assert sample(trained, tmp_path, "label=[]", "num_samples=1") == 0
    assert not (tmp_path / "labels.csv").exists()


def test_samples_are_evaluated_before_their_table_is_complete(trained, tmp_path):
    assert sample(trained, tmp_path, "label=all", "num_samples=3") == 0
    (tmp_path / "000003.png").write_bytes((tmp_path / "000000.png").read_bytes())
    samples = given_samples(tmp_path, folder(trained.parent / "data"), None)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 0]


def test_tasks_that_share_a_folder_leave_the_labels_of_all_their_samples(tmp_path):
    model: Any = SimpleNamespace(step=1, config={})
    settings = {"labels": [0, 2], "label_shares": [3, 1]}

    def task(number: int) -> None:
        claim(tmp_path / "out", settings, model)
        keep_seeds(tmp_path / "out", range(8 * number, 8 * number + 8))
        keep_labels(tmp_path / "out", ("a", "b", "c"), ".png")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(task, range(16))) == [None] * 16
    rows = [line.split(",") for line in (tmp_path / "out" / "labels.csv").read_text().splitlines()[1:]]
    assert [file for file, _ in rows] == [f"{seed:06d}.png" for seed in range(128)]
    assert Counter(label for _, label in rows) == {"a": 96, "c": 32}

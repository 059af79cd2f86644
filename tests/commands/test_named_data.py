"""The paths of a checkpoint: read only where the user has named them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands.trained import dataset_of
from diffusion_cli.config import CompareConfig, EditConfig, EvalConfig, load, load_grid
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.load import Loaded
from diffusion_cli.system.trusted_paths import remember, unnamed
from helpers import checkpoint_info

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def stranger(tmp_path, monkeypatch) -> None:
    """A user who has named nothing yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_a_path_is_remembered_in_full(tmp_path, stranger, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert unnamed({"path": "here", "masks": None, "size": 3}) == {"path": "here"}
    remember({"path": "here", "masks": None})
    assert unnamed({"path": str(tmp_path / "here")}) == {}
    assert unnamed({"path": "here/../here", "masks": "m"}) == {"masks": "m"}
    monkeypatch.chdir("here")
    assert unnamed({"path": "here"}) == {"path": "here"}


def test_the_sources_of_pairs_are_named_too(tmp_path, stranger):
    node = {"path": str(tmp_path / "targets"), "source": str(tmp_path / "sources")}
    remember({"path": node["path"]})
    assert unnamed(node) == {"source": node["source"]}
    remember(node)
    assert unnamed(node) == {}
    config = load("edit", ["run=x", "input=val", f"dataset.source={node['source']}"])
    assert isinstance(config, EditConfig)
    assert config.data_paths == {"source": node["source"]}


def test_the_name_of_a_dataset_elsewhere_is_the_same_in_all_folders(tmp_path, stranger, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in ("owner/name", "s3://bucket/photos.zip"):
        assert unnamed({"path": path}) == {"path": path}
        remember({"path": path})
        assert unnamed({"path": path}) == {}
    monkeypatch.chdir("/")
    assert unnamed({"path": "owner/name", "masks": "s3://bucket/photos.zip"}) == {}
    monkeypatch.chdir(tmp_path)  # where the name is that of a folder, which was never named
    assert unnamed({"path": "owner/name"}) == {"path": "owner/name"}


def test_without_a_folder_to_write_to_nothing_is_remembered(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    remember({"path": "x"})
    assert unnamed({"path": "x"}) == {"path": "x"}


def origin(**dataset) -> Loaded:
    return Loaded(checkpoint_info(dataset=dataset), 1, "")


def folder_node(path: Path) -> dict:
    node = load(
        "eval", ["dataset=folder", f"dataset.path={path}", "dataset.resolution=8", "dataset.channels=1"]
    )
    assert isinstance(node, EvalConfig)
    assert node.dataset is not None
    return node.dataset | {"in_memory": True, "num_workers": 999}


def test_a_path_that_only_a_checkpoint_names_is_not_read(tmp_path, stranger, photos):
    model = origin(**folder_node(photos))
    with pytest.raises(
        ValueError,
        match=rf"dataset.path={photos}: this path comes from the checkpoint in x, and you have never",
    ):
        dataset_of(Path("x"), model, "data", {})
    dataset = dataset_of(Path("x"), model, "data", {"path": str(photos)})
    assert len(dataset.load("train")) + len(dataset.load("val")) == 12
    assert dataset_of(Path("x"), model, "data", {}).shape == (1, 8, 8)  # it has been named once


def test_a_dataset_that_was_moved_is_named_anew(tmp_path, stranger, photos):
    model = origin(**folder_node(tmp_path / "before"))
    assert len(dataset_of(Path("x"), model, "data", {"path": str(photos)}).load("train")) > 8
    with pytest.raises(ValueError, match=r"masks=m: the run in x was trained without it"):
        dataset_of(Path("x"), model, "data", {"path": str(photos), "masks": "m"})


@pytest.mark.parametrize("size", [2**27 // 64 + 1, 10**7])
def test_a_dataset_that_asks_for_any_memory_is_not_built(size):
    target = "diffusion_cli.data.GaussianMixture"
    means, shape = [[0.0] * 64], [1, 8, 8]
    node = {
        "_target_": target,
        "means": means,
        "stds": [1.0],
        "weights": [1.0],
        "shape": shape,
        "size": size,
        "seed": 0,
    }
    with pytest.raises(
        ValueError,
        match=rf"x: .* its dataset \(dataset.size={size}: needs more than [^;]*\); choose another run, or [^;]*$",
    ):
        dataset_of(Path("x"), origin(**node), "data", {})
    assert dataset_of(Path("x"), origin(**node | {"size": 100}), "data", {}).shape == (1, 8, 8)


def test_the_words_for_a_run_s_own_data():
    evaluation = load("eval", ["dataset.path=a b", "dataset.masks=m"])
    assert isinstance(evaluation, EvalConfig)
    assert (evaluation.data_paths, evaluation.other_dataset) == ({"path": "a b", "masks": "m"}, None)
    edit = load("edit", ["dataset.path=photos"])
    assert isinstance(edit, EditConfig)
    assert edit.data_paths == {"path": "photos"}
    (variant,) = load_grid("compare", ["dataset.path=photos"])
    assert isinstance(variant.config, CompareConfig)
    assert variant.config.data_paths == {"path": "photos"}
    other = load("eval", ["dataset=digits"])
    assert isinstance(other, EvalConfig)
    assert other.data_paths == {}
    assert other.other_dataset is not None
    with pytest.raises(UsageError, match="resolution=8: applies only to"):
        load("eval", ["dataset.resolution=8"])


def test_what_one_trains_on_needs_no_word_later(tmp_path, stranger, photos, capsys):
    words = [f"output_dir={tmp_path}", "model=unet_tiny", "model.channels=4", "model.channel_mult=[1]",
             "model.num_res_blocks=1", "model.norm_groups=2", "model.num_heads=1", "model.head_channels=null",
             "model.attention_resolutions=[]", "batch_size=4", "max_steps=1", "trainer=cpu", "logger=csv",
             "lr_schedule=constant"]  # fmt: skip
    data = ["dataset=folder", f"dataset.path={photos}", "dataset.resolution=8", "dataset.channels=1"]
    assert run(["train", "name=mine", *data, *words]) == 0
    edit = [
        "edit",
        f"run={tmp_path}/mine",
        "edit=img2img",
        "input=train",
        "num_images=1",
        "steps=2",
        "device=cpu",
    ]
    assert run(edit) == 0
    for record in (tmp_path / "state" / "diffuse" / "data").iterdir():
        record.unlink()
    assert run([*edit, "seed=1"]) == 2
    assert f"dataset.path={photos}: this path comes from the checkpoint" in capsys.readouterr().err
    assert run(["train", "name=mine", *data, *words]) == 0
    assert "finished at step 1" in capsys.readouterr().out
    assert run([*edit, "seed=1"]) == 0
    assert run([*edit, "seed=1", f"dataset.path={photos}"]) == 0


@pytest.mark.parametrize("dataset", ["gaussian_mixture", "points"])
def test_a_size_beyond_any_memory_is_a_mistake(dataset):
    with pytest.raises(UsageError, match=r"dataset.size=10{12}: must be at most 10000000"):
        load("train", [f"dataset={dataset}", "dataset.size=1000000000000"])

"""Datasets of torch: items of each type are the images of a folder; what cannot be stored once is refused."""

import multiprocessing
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffusion_cli import config
from diffusion_cli.cli import run
from diffusion_cli.config import plugins
from diffusion_cli.data import TorchDataset
from diffusion_cli.data.batches import fetched
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import HighDepthImage, Uint8Image
from helpers import TINY
from helpers.data import folder, labels_of, save

MODULE = '''
from os import system

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
CALLS = []
not_callable = 3


class Photos(Dataset):
    """Items that `convert` makes of the pixels, with two classes."""

    def __init__(self, convert, labels=True):
        self.convert, self.labels, self.read = convert, labels, 0
        self.classes = ["a", "b"]

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, number):
        self.read += 1
        image = self.convert(PIXELS[number])
        return (image, number % 2) if self.labels else image


class Stream(IterableDataset):
    def __init__(self, count=12):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        for number in range(self.count):
            yield PIXELS[number % 12], torch.tensor(number % 2)


def tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


KINDS = {
    "pillow": Image.fromarray,
    "palette": lambda pixels: Image.fromarray(pixels).convert("RGB"),
    "array": lambda pixels: pixels,
    "tensor": tensor,
    "floats": lambda pixels: tensor(pixels).float() / 255,
    "double": lambda pixels: tensor(pixels).double() / 255,
}


def kind(name="array"):
    return Photos(KINDS[name])


def opaque():
    return Photos(lambda pixels: Image.fromarray(pixels).convert("RGBA"))


def gray(dtype="uint16"):
    return Photos(lambda pixels: pixels[..., 0].astype(dtype) * 100)


def normalized():
    return Photos(lambda pixels: tensor(pixels).float() / 127.5 - 1)


def unlabelled():
    return Photos(lambda pixels: pixels, labels=False)


def with_train(train, root="."):
    CALLS.append((train, root))
    return Subset(kind(), range(8) if train else range(8, 12))


def with_split(split):
    return Subset(kind(), range(8) if split == "train" else range(8, 12))


def stream(count=12):
    return Stream(count)


def generator():
    yield from Stream()


def targets(targets):
    set = kind()
    set.targets = targets
    return Subset(set, range(12))


def names():
    return [(pixels, ["b", "a"][number % 2]) for number, pixels in enumerate(PIXELS)]


def told(split):
    attributes = [{"age": torch.tensor(n / 2), "species": "ab"[n % 2], "code": n} for n in range(12)]
    del attributes[3]["code"]
    numbers = range(8) if split == "train" else range(8, 12)
    return [(PIXELS[number], attributes[number]) for number in numbers]


def random():
    return Photos(lambda pixels: pixels + np.random.randint(3, dtype=np.uint8))


def sizes():
    return Photos(lambda pixels: pixels if pixels[0, 0, 0] != PIXELS[5, 0, 0, 0] else pixels[:6])


def broken():
    return Photos(lambda pixels: pixels if pixels[0, 0, 0] != PIXELS[5, 0, 0, 0] else {}["x"])


def item(value):
    return [eval(value)] * 3


def fails():
    raise RuntimeError("no images")


def nothing():
    return None


def empty():
    return []
'''


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch) -> Iterator[Path]:
    """A working folder with an allowed module `sets`."""
    (tmp_path / "sets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(plugins.VARIABLE, "")
    plugins._conf.cache_clear()
    config.allow(["sets"])
    yield tmp_path
    sys.modules.pop("sets", None)
    plugins._conf.cache_clear()


def made(name: str, **changes) -> TorchDataset:
    settings = {"val_fraction": 0.0, "in_memory": False, "num_workers": 0, "flip": False}
    return TorchDataset("", factory=f"sets:{name}", **(settings | changes))


def everything(dataset) -> torch.Tensor:
    images = dataset.load("train")
    return images[torch.arange(len(images))]


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def files(tmp_path) -> Path:
    for number, image in enumerate(pixels()):
        save(tmp_path / "files" / f"{number:02d}.png", image)
    return tmp_path / "files"


@pytest.mark.parametrize("kind", ["pillow", "palette", "array", "tensor", "floats", "double"])
@pytest.mark.parametrize("changes", [{"resolution": 8}, {"resolution": [4, 6], "channels": 1}])
def test_items_of_each_type_equal_the_files_of_the_same_images(kind, changes, files):
    dataset, same = made("kind", arguments={"name": kind}, **changes), folder(files, **changes)
    assert (dataset.shape, dataset.form, dataset.class_names) == (same.shape, same.form, ("a", "b"))
    assert_close(everything(dataset), everything(same), rtol=0, atol=0)
    assert_close(labels_of(dataset.load("train")), torch.arange(12) % 2)
    in_memory = made("kind", arguments={"name": kind}, in_memory=True, **changes)
    assert_close(everything(in_memory), everything(dataset))
    assert in_memory.load("train").fingerprint() == dataset.load("train").fingerprint()


def test_opacity_and_depth_are_kept():
    rgba = made("opaque")
    assert isinstance(rgba.form, HighDepthImage)
    assert (rgba.shape, rgba.form.mode) == ((4, 8, 8), "RGBA")
    assert isinstance(made("opaque", channels=3).form, Uint8Image)
    assert_close(everything(made("opaque", channels=3)), everything(made("kind")))
    deep = made("gray")
    assert isinstance(deep.form, HighDepthImage)
    values = torch.from_numpy(pixels()[..., 0].astype(np.float32) * 100)[:, None]
    assert (deep.form.dtype, deep.shape) == ("uint16", (1, 8, 8))
    assert_close(everything(deep), values / 32767.5 - 1, rtol=0, atol=1e-6)
    signed = everything(made("gray", arguments={"dtype": "int16"}, range=[0, 25500]))
    assert_close(signed, values / 12750 - 1, rtol=0, atol=1e-6)
    floats = made("normalized", range=[-1, 1])
    assert_close(
        everything(floats), torch.from_numpy(pixels()).permute(0, 3, 1, 2) / 127.5 - 1, rtol=0, atol=1e-6
    )
    original = floats.stream("train").original(0)
    assert original is not None
    assert original.values.shape == (3, 8, 8)


def test_the_function_gets_the_split_or_one_set_is_split():
    for name in ("with_train", "with_split"):
        dataset = made(name)
        assert [len(dataset.load(split)) for split in ("train", "val")] == [8, 4]
        assert_close(labels_of(dataset.load("val")), torch.arange(4) % 2)
    made("with_train", arguments={"root": "here"})
    assert sys.modules["sets"].CALLS[-2:] == [(True, "here"), (False, "here")]
    assert len(made("with_train", arguments={"train": False}, val_fraction=0.5).load("val")) == 2
    assert [len(made("kind", val_fraction=0.25).load(split)) for split in ("train", "val")] == [9, 3]
    assert made("kind", val_fraction=0.01).remarks() == [
        "dataset.val_fraction=0.01: 12 images are too few to split; training uses all of them"
    ]


def test_an_iterable_set_is_counted_and_read_once():
    dataset = made("stream", in_memory=None)
    assert (len(dataset.load("train")), dataset.class_names, dataset.num_workers) == (12, ("0", "1"), 0)
    assert_close(everything(dataset), everything(made("kind")))
    assert dataset.load("train").labels is not None


def test_an_iterable_set_must_fit_in_memory(monkeypatch):
    monkeypatch.setattr("diffusion_cli.data.items.fits_in_memory", lambda size: size <= 4 * 192)
    with pytest.raises(
        UsageError, match=r"more than 8 images do not fit in memory; return a map-style dataset"
    ):
        made("stream", arguments={"count": 10**9})


def test_classes_are_targets_names_or_labels_of_the_items():
    labels = [number % 2 for number in range(12)]
    dataset = made("targets", arguments={"targets": labels})
    assert dataset.class_names == ("a", "b")
    read = dataset._parts["train"][0].items.dataset.read
    assert read == 1 + 2 * 8 + 8  # the first item, those read twice, and those that targets are compared with
    wrong = made("targets", arguments={"targets": [0] * 12})  # not the labels of the items
    assert_close(labels_of(wrong.load("train")), torch.tensor(labels))
    assert made("names").class_names == ("a", "b")
    assert_close(labels_of(made("names").load("train")), 1 - torch.tensor(labels))
    assert made("unlabelled").missing_classes == "its items have no integer or name as label"


def test_images_can_be_sent_to_other_processes():
    images = made("names").load("train")
    assert_close(pickle.loads(pickle.dumps(images))[torch.tensor([3])], images[torch.tensor([3])])


def test_a_set_that_cannot_be_sent_to_other_processes_is_named():
    images = made("unlabelled").load("train")  # it has a lambda
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        with pytest.raises(UsageError, match=r"dataset.num_workers=1: the dataset cannot be sent .*; set 0"):
            next(fetched(images, [torch.arange(2)], 1))
    finally:
        multiprocessing.set_start_method(method, force=True)


WRONG = {
    "sets": "is not a module and a function; write dataset.factory=module:function",
    "sets:absent": "sets defines no function absent; correct the name",
    "sets:not_callable": "sets defines no function not_callable",
    "sets:system": "sets only imports system; write a function in sets that calls it, or allow its module",
    "os:system": r"dataset.factory=os:system: is not a function of an allowed plugin; add plugins=\[os\] if you",
    "sets:fails": r"failed \(RuntimeError: no images\); correct it or dataset.arguments; DIFFUSE_TRACEBACK=1",
    "sets:targets": r"failed \(TypeError: .*missing 1 required positional argument: 'targets'\)",
    "sets:nothing": "returns NoneType, which is no dataset of torch; return a torch.utils.data.Dataset",
    "sets:empty": "dataset.factory=sets:empty: returns a dataset without items; return at least one image",
    "sets:generator": "returns an iterator, which can be read only once; return an IterableDataset",
    "sets:random": "an item differs when it is read again; images must not be random; leave out",
    "sets:normalized": "item 0 .*has values from -1 to 1, beyond 0 to 1; set dataset.range",
    "sets:sizes": r"cannot use 1 of the items; .* item 5 \(has 6 x 8 pixels, and the first one 8 x 8; set",
    "sets:broken": r"cannot read item 5 \(KeyError: 'x'\)",
}


@pytest.mark.parametrize("factory", WRONG)
def test_mistakes_have_one_line(factory, monkeypatch):
    monkeypatch.delenv("DIFFUSE_TRACEBACK", raising=False)
    with pytest.raises(UsageError, match=WRONG[factory]) as error:
        TorchDataset("", factory=factory, val_fraction=0.0).load("train")
    assert len(error.value.lines) == 1


@pytest.mark.parametrize(
    ("item", "line"),
    [
        ("'text'", "item 0 is of type str; return an image of Pillow, a tensor or an array"),
        ("{'image': 1}", r"item 0 is a mapping of image; return \(image, label\)"),
        ("(1, 2, 3)", r"item 0 has 3 parts; return \(image, label\)"),
        ("torch.zeros(8, 8, 3)", r"item 0 has shape \[8,8,3\]; a tensor must be \[C,H,W\]"),
        ("np.zeros((3, 8, 8))", r"item 0 has shape \[3,8,8\]; an array must be \[H,W,C\]"),
        ("np.zeros(3)", r"item 0 has shape \[3\]; an array must be"),
        (
            "torch.zeros(1, 8, 8, dtype=torch.int64)",
            "item 0 has dtype int64; return uint8, uint16, int16 or floats",
        ),
        ("torch.full((1, 8, 8), torch.nan)", "has values from nan to nan, beyond 0 to 1"),
        ("(np.zeros((8, 8)), -1)", "a label has the labels -1 to -1; must be in 0 to"),
    ],
)
def test_items_that_are_no_images_have_one_line(item, line):
    with pytest.raises(UsageError, match=line) as error:
        everything(made("item", arguments={"value": item}))
    assert len(error.value.lines) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_trains_continues_and_calls_no_function_that_only_a_checkpoint_names(
    project, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_STATE_HOME", str(project / "state"))
    words = [word for word in TINY if not word.startswith("name=")]
    words += ["plugins=[sets]", "model=unet_tiny"]
    words += [
        "dataset=torch",
        "dataset.factory=sets:with_train",
        "dataset.arguments={root: here}",
        "name=run",
    ]
    words += ["dataset.in_memory=false", "dataset.num_workers=1", "output_dir=o", "max_steps=2"]
    assert run(words) == 0
    assert run(["train", "run=run", "output_dir=o", "max_steps=3"]) == 0
    edit = ["edit", "run=run", "output_dir=o", "edit=img2img", "input=train", "num_images=1", "steps=2"]
    assert run(edit) == 0
    sys.modules["sets"].CALLS.clear()
    for record in (project / "state").rglob("*"):
        if record.is_file():
            record.unlink()
    capsys.readouterr()
    assert run([*edit, "seed=1"]) == 2
    line = "dataset.factory=sets:with_train: this path comes from the checkpoint in o/run, and you have never used it"
    assert f"{line} with {{'root': 'here'}} on this machine" in capsys.readouterr().err
    assert run(["train", "run=run", "output_dir=o", "max_steps=4"]) == 2
    assert "dataset.factory=sets:with_train: path from the config of o/run" in capsys.readouterr().err
    assert sys.modules["sets"].CALLS == []
    assert run([*edit, "seed=1", "dataset.factory=sets:with_train"]) == 0
    monkeypatch.setenv(plugins.VARIABLE, "")
    assert run([*edit, "seed=2"]) == 2
    assert "is not a function of an allowed plugin; add plugins=[sets]" in capsys.readouterr().err


def test_mappings_are_attributes():
    dataset = made("told", label=["age", "species", "code"])
    assert [str(each) for each in dataset.attributes] == [
        "age: number, 0 to 3.5", "species: 2 classes", "code: number, 0 to 7",
    ]  # fmt: skip
    assert dataset.class_names == ("a", "b")
    for images, first in ((dataset.load("train"), 0), (dataset.load("val"), 8)):
        rows = torch.arange(len(images))
        condition = images.condition(rows, images[rows])
        assert condition is not None
        assert_close(condition.values["age"], (rows + first) / 2)
        assert_close(condition.values["species"], (rows + first) % 2)
    assert made("told").class_names is None
    assert made("kind", label="label").class_names == ("a", "b")
    with pytest.raises(
        UsageError, match=r"label=ages: no such column in the labels of sets:told; did you mean age"
    ):
        made("told", label="ages")

"""Pairs of images: partners, order, flips, workers and processes, sizes and wrong files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffusion_cli.data import Batch, Batches, Images
from diffusion_cli.data import pairs as pairs_module
from diffusion_cli.errors import UsageError
from helpers.data import save, take, zipped
from helpers.pairs import pairs, write_pairs

RNG = np.random.default_rng(1)


def image_of(batch: Batch) -> torch.Tensor:
    assert batch.condition is not None
    return batch.condition.values["image"]


def all_of(images: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """All targets and all sources in [-1, 1]."""
    rows = torch.arange(len(images))
    targets = images[rows] / 127.5 - 1
    condition = images.condition(rows, targets)
    assert condition is not None
    return targets, condition.values["image"]


@pytest.mark.parametrize("zip_files", [False, True])
@pytest.mark.parametrize("in_memory", [False, True])
def test_each_target_has_the_source_with_its_name(tmp_path, zip_files, in_memory):
    root = write_pairs(tmp_path)
    changes = {}
    if zip_files:
        for name in ("targets", "sources"):
            zipped(root / name, root / f"{name}.zip")
        changes = {"path": str(root / "targets.zip"), "source": str(root / "sources.zip")}
    dataset = pairs(root, in_memory=in_memory, **changes)
    assert (dataset.shape, dataset.condition_channels, dataset.class_names) == ((3, 8, 12), 1, ("a", "b"))
    targets, sources = all_of(dataset.load("train"))
    assert len(targets) == 6
    assert_close(sources[:, 0], targets[:, 0])


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("by_table", [False, True])
def test_attributes_and_captions_are_those_of_the_targets(tmp_path, in_memory, by_table):
    root, numbers = write_pairs(tmp_path), range(6)
    names = [f"{'ab'[number % 2]}/{number}" for number in numbers]
    rows = [f"{name}.png,{number},shade {number}" for number, name in enumerate(names)]
    (root / "targets/metadata.csv").write_text("\n".join(["file_name,age,text", *reversed(rows)]))
    (root / "sources/a/0.txt").write_text("not used")
    changes = {}
    if by_table:
        for name in names:
            (root / f"targets/{name}-source.bmp").write_bytes((root / f"sources/{name}.bmp").read_bytes())
        pairs_of = [f"{name}-source.bmp,{name}.png" for name in names]
        (root / "targets/pairs.csv").write_text("\n".join(["source,target", *pairs_of]))
        changes = {"path": str(root / "targets/pairs.csv"), "source": None}
    dataset = pairs(root, label={"age": "number"}, in_memory=in_memory, val_fraction=0.3, **changes)
    assert [each.name for each in dataset.attributes] == ["age"]
    assert (dataset.captions, dataset.missing_captions) == (True, "")
    found = {}
    for split in ("train", "val"):
        images = dataset.load(split)
        index = torch.arange(len(images))
        condition = images.condition(index, images[index] / 127.5 - 1)
        assert condition is not None
        assert images.captions is not None
        assert [*condition.values] == ["age", "image"]
        shades = images[index][:, 0, 0, 0].tolist()
        found |= dict(
            zip(
                shades, zip(condition.values["age"].tolist(), images.captions.texts, strict=True), strict=True
            )
        )
    assert found == {
        int(np.asarray(Image.open(root / f"targets/{name}.png"))[0, 0, 0]): (number, (f"shade {number}",))
        for number, name in enumerate(names)
    }


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.95])
def test_the_targets_of_a_source_are_in_one_split(tmp_path, fraction):
    rows = []
    for source in range(4):
        save(tmp_path / f"{source}.png", np.full((4, 4), source, np.uint8))
        for target in range(5):
            rows.append(f"{source}.png,{source}{target}.png")
            save(tmp_path / f"{source}{target}.png", np.full((4, 4), 10 * source + target, np.uint8))
    (tmp_path / "table.csv").write_text("\n".join(["source,target", *rows]))
    dataset = pairs(
        tmp_path,
        path=str(tmp_path / "table.csv"),
        source=None,
        resolution=4,
        channels=1,
        val_fraction=fraction,
    )
    found = []
    for split in ("train", "val"):
        images = dataset.load(split)
        assert len(images)
        found.append({int(pixels) // 10 for pixels in images[torch.arange(len(images))][:, 0, 0, 0]})
    assert not found[0] & found[1]
    assert found[0] | found[1] == {0, 1, 2, 3}


def test_a_table_pairs_any_names_and_sources_may_repeat(tmp_path):
    shades = {"one.png": 10, "two.png": 20, "three.png": 30, "spare.png": 40}
    for name, shade in shades.items():
        save(tmp_path / "deep" / name, np.full((4, 4), shade, np.uint8))
    rows = ["deep/one.png,deep/two.png", "deep/one.png,deep/three.png"]
    (tmp_path / "table.csv").write_text("\n".join(["source,target", *rows]))
    dataset = pairs(tmp_path, path=str(tmp_path / "table.csv"), source=None, resolution=4, channels=1)
    targets, sources = all_of(dataset.load("train"))
    found = sorted(zip(targets[:, 0, 0, 0].tolist(), sources[:, 0, 0, 0].tolist(), strict=True))
    assert_close(torch.tensor(found), torch.tensor([[20, 10], [30, 10]]) / 127.5 - 1)
    assert dataset.name == "table"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [False, True])
def test_shuffled_and_flipped_batches_keep_pairs_together(tmp_path, workers, in_memory):
    images = pairs(write_pairs(tmp_path), in_memory=in_memory).load("train")
    batches = take(Batches(images, 4, 0, flip=True, num_workers=workers), 4)
    whole = images[torch.arange(6)] / 127.5 - 1
    flipped = 0
    for batch in batches:
        assert_close(image_of(batch)[:, 0], batch.images[:, 0])
        flipped += int((batch.images != whole[batch.index]).any((1, 2, 3)).sum())
    assert 0 < flipped < 16


def test_two_processes_have_the_pairs_of_one(tmp_path):
    images = pairs(write_pairs(tmp_path)).load("train")
    whole = take(Batches(images, 4, 0, flip=True), 3)
    parts = [take(Batches(images, 4, 0, flip=True, rank=rank, world_size=2), 3) for rank in (0, 1)]
    for number, batch in enumerate(whole):
        assert_close(torch.cat([image_of(part[number]) for part in parts]), image_of(batch), rtol=0, atol=0)


def test_a_pair_is_in_one_split_as_its_target(tmp_path):
    dataset = pairs(write_pairs(tmp_path, 40), val_fraction=0.3)
    for split in ("train", "val"):
        targets, sources = all_of(dataset.load(split))
        assert 0 < len(targets) < 40
        assert_close(sources[:, 0], targets[:, 0])


def test_sources_of_another_size_are_resized_to_the_target(tmp_path):
    shade = RNG.integers(0, 256, 6, dtype=np.uint8)
    for number, value in enumerate(shade):
        save(tmp_path / f"targets/{number}.png", np.full((8, 12, 3), value))
        save(tmp_path / f"sources/{number}.png", np.full((2, 3), value))
    targets, sources = all_of(pairs(tmp_path).load("train"))
    assert_close(sources, targets[:, :1])


def test_sources_above_8_bits_keep_their_precision(tmp_path):
    write_pairs(tmp_path, 1)
    values = RNG.integers(0, 2**16, (8, 12), dtype=np.uint16)
    (tmp_path / "sources/a/0.bmp").unlink()
    save(tmp_path / "sources/a/0.png", values)
    images = pairs(tmp_path).load("train")
    (batch,) = take(Batches(images, 1, 0, flip=False), 1)
    assert_close(image_of(batch)[0, 0].double(), torch.from_numpy(values / 32767.5 - 1), rtol=0, atol=1e-6)
    _, sources = all_of(images)
    assert_close(sources, image_of(batch))


def test_volumes_are_paired(tmp_path):
    for number in range(2):
        volume = RNG.random((4, 6, 8), np.float32)
        for side in ("targets", "sources"):
            (tmp_path / side).mkdir(exist_ok=True)
            np.save(tmp_path / side / f"{number}.npy", volume)
    images = pairs(tmp_path, resolution=[4, 6, 8], channels=1, range=[0, 1]).load("train")
    rows = torch.arange(2)
    condition = images.condition(rows, images[rows])
    assert condition is not None
    assert_close(condition.values["image"], images[rows])


def test_the_data_change_with_their_sources(tmp_path):
    root = write_pairs(tmp_path)
    before = [source.digest() for source in pairs(root).load("train").conditions.values()]
    assert before == [
        source.digest() for source in pairs(root, in_memory=False).load("train").conditions.values()
    ]
    save(root / "sources/a/0.bmp", np.zeros((8, 12), np.uint8))
    assert before != [source.digest() for source in pairs(root).load("train").conditions.values()]


def _without_source(root: Path) -> None:
    (root / "sources/a/0.bmp").unlink()


def _without_target(root: Path) -> None:
    (root / "targets/a/0.png").unlink()


def test_the_proportions_of_a_pair_are_compared_once(tmp_path, monkeypatch):
    images = pairs(write_pairs(tmp_path), in_memory=False).stream("train")
    read: list[int] = []
    monkeypatch.setattr(pairs_module, "_image_size", lambda contents: read.append(1))
    for _ in range(2):
        all_of(images)
    assert len(read) == 2 * len(images)


def _broken_source(root: Path) -> None:
    (root / "sources/a/0.bmp").write_bytes(b"junk")


def _other_proportions(root: Path) -> None:
    save(root / "sources/a/0.bmp", np.zeros((12, 12), np.uint8))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (_without_source, "has no source for 'a/0.png'; give each image one source with its name"),
        (_without_target, "has no target for 'a/0.bmp'; add targets with their names, or remove them"),
        (_broken_source, "cannot use 1 of the images; repair or remove a/0.bmp"),
        (
            _other_proportions,
            "cannot use 1 of the images; repair or remove a/0.bmp (has 12 x 12 pixels, and its target a/0.png 12 x 8; "
            "crop them to the same proportions)",
        ),
    ],
)
def test_wrong_pairs_are_named_in_one_line(tmp_path, damage, line):
    damage(write_pairs(tmp_path))
    with pytest.raises(UsageError) as error:
        all_of(pairs(tmp_path).load("train"))
    assert len(error.value.lines) == 1
    assert str(error.value).startswith(f"dataset.source={tmp_path / 'sources'}: {line}")


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (
            "input,target\na.png,b.png",
            "needs a header line with one column source and one column target, but begins",
        ),
        (
            "source,target\na.png,b.png\nc.png,b.png",
            "has more than one row for 'b.png'; keep one row per target",
        ),
        ("source,target\na.png,\n", "has an empty cell in 'a.png, '; complete these rows"),
        ("source,target\na.png,b.png", "has no image 'b.png'; add the files, or correct their names"),
        ("source,target\n../x.png,a.png", "has no image '../x.png'; add the files, or correct their names"),
    ],
)
def test_wrong_tables_are_explained_in_one_line(tmp_path, table, line):
    save(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "table.csv").write_text(table)
    with pytest.raises(UsageError, match=r"^dataset\.path=") as error:
        pairs(tmp_path, path=str(tmp_path / "table.csv"), source=None)
    assert len(error.value.lines) == 1
    assert f": {line}" in str(error.value)


def test_errors_and_remarks_of_a_table_name_the_key_that_was_given(tmp_path):
    write_pairs(tmp_path)
    save(tmp_path / "sources/a/0.bmp", np.zeros((12, 12), np.uint8))
    (tmp_path / "sources/a/0.webp").write_bytes(b"")
    (tmp_path / "table.csv").write_text("source,target\nsources/a/0.bmp,targets/a/0.png")
    dataset = pairs(tmp_path, path=str(tmp_path / "table.csv"), source=None)
    with pytest.raises(
        UsageError, match=r"^dataset\.path=.*: cannot use 1 of the images; repair or remove sources"
    ):
        all_of(dataset.load("train"))
    assert "dataset.source" not in "".join(dataset.remarks())


def test_places_that_contradict_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"dataset\.source=null: the images need sources; give"):
        pairs(tmp_path, source=None)
    with pytest.raises(UsageError, match=r"dataset\.source=x: conflicts with the table a\.csv; leave it out"):
        pairs(tmp_path, path="a.csv", source="x")


def test_groups_of_targets_keep_the_targets_of_a_source(tmp_path):
    write_pairs(tmp_path, 12)
    by_name = pairs(tmp_path, val_fraction=0.5, group="([^/]+)/", labels="none")
    for split in ("train", "val"):
        assert len({name[0] for name in by_name.targets.stream(split).names}) == 1
    assert by_name.num_groups == {"train": 1, "val": 1}
    rows = [f"sources/{'ab'[n % 2]}/{n % 4}.bmp,targets/{'ab'[n % 2]}/{n}.png" for n in range(12)]
    (tmp_path / "table.csv").write_text("\n".join(["source,target", *rows]))
    given = {"path": str(tmp_path / "table.csv"), "source": None, "val_fraction": 0.5, "labels": "none"}
    dataset = pairs(tmp_path, **given, group="([ab])/")
    assert sorted(len({*dataset.targets.stream(split).names}) for split in ("train", "val")) == [6, 6]
    line = r"^dataset\.group=\(\.\*\): the targets of 'sources/a/0\.bmp', .* are in several groups; give all"
    with pytest.raises(UsageError, match=line):
        pairs(tmp_path, **given, group="(.*)")

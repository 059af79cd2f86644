"""What points, meshes and signals share: their files, and groups on one side of the split."""

from pathlib import Path

import numpy as np
import pytest

from diffusion_cli.data import Meshes, Points, Signals
from diffusion_cli.data.base import named_mask
from diffusion_cli.data.groups import FIRST_FOLDER
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.migrate import migrated

SETS = {
    "points": (Points, ".ply", {"num_points": 2}),
    "meshes": (Meshes, ".stl", {}),
    "signals": (Signals, ".csv", {"range": [0, 9]}),
}
KINDS = pytest.mark.parametrize("kind", SETS)
RNG = np.random.default_rng(0)


def made(kind: str, data_dir: Path, path: Path | None = None, **changes):
    dataset, _, options = SETS[kind]
    return dataset(str(data_dir), path=None if path is None else str(path), **(options | changes))


@pytest.fixture
def people(tmp_path, request) -> Path:
    """A folder of 3 files for each of 20 persons, which are read by their names alone, but for the first."""
    path = tmp_path / "in"
    rows = ["file,label,person"]
    for number in range(60):
        name = f"p{number // 3:02d}/{number}{SETS[request.getfixturevalue('kind')][1]}"
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("1\n2\n")
        rows.append(f"{name},{'ab'[number % 2]},{number // 3}")
    (path / "metadata.csv").write_text("\n".join(rows))
    return path


@KINDS
@pytest.mark.parametrize("group", [FIRST_FOLDER.strip("'"), "person"])
def test_the_files_of_a_group_are_on_one_side(kind, group, people, tmp_path):
    dataset = made(kind, tmp_path, people, group=group, labels="none", val_fraction=0.25)
    assert len(dataset.files) == 60
    groups = [Path(name).parent.name if "(" in group else str(row // 3) for row, name in enumerate(
        sorted(dataset.files, key=lambda name: int(Path(name).stem)))]  # fmt: skip
    order = np.argsort([int(Path(name).stem) for name in dataset.files])
    np.testing.assert_array_equal(dataset.is_val[order], named_mask(groups, 0.25))
    assert dataset.num_groups is not None
    assert sum(dataset.num_groups.values()) == 20
    assert 0 < dataset.num_groups["val"] < 20


@KINDS
def test_built_in_samples_have_no_groups(kind, tmp_path):
    with pytest.raises(UsageError, match=r"dataset\.group=person: applies to files; leave it out"):
        made(kind, tmp_path, group="person", size=4)


@KINDS
def test_runs_without_the_option_are_read(kind):
    target = f"diffusion_cli.data.{SETS[kind][0].__name__}"
    assert migrated({"dataset": {"_target_": target}})["dataset"]["group"] is None


def test_an_array_of_signals_has_groups(tmp_path):
    person = np.repeat(np.arange(20), 3)
    arrays = {"signals": RNG.normal(size=(60, 8)), "person": person}
    np.savez(tmp_path / "x.npz", **arrays)
    options = {"range": [-9, 9], "group": "person", "val_fraction": 0.25}
    dataset = made("signals", tmp_path, tmp_path / "x.npz", **options)
    np.testing.assert_array_equal(dataset.is_val, named_mask([str(each) for each in person], 0.25))
    for changes, line in [
        ({"group": "persons"}, "dataset.group=persons: no such column in x.npz; did you mean person?"),
        ({"group": "signals"}, "dataset.group=signals: no such column in x.npz"),
    ]:
        with pytest.raises(UsageError) as caught:
            made("signals", tmp_path, tmp_path / "x.npz", **(options | changes))
        assert str(caught.value).startswith(line)
    np.savez(tmp_path / "x.npz", **arrays, val=person > 12)
    with pytest.raises(
        UsageError, match=r"dataset\.group=person: conflicts with the validation signals that x\.npz"
    ):
        made("signals", tmp_path, tmp_path / "x.npz", **(options | {"val_fraction": None}))


def test_tables_beside_signals_are_none(tmp_path):
    (tmp_path / "a.csv").write_text("1\n2\n")
    (tmp_path / "metadata.csv").write_text("file,person\na.csv,x\n")
    assert made("signals", tmp_path, tmp_path).files == ["a.csv"]

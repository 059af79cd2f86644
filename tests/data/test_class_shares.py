"""Class shares: samples of a class-conditional model come in the shares of the images that they are compared with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.commands.samples import in_shares_of
from diffusion_cli.commands.train_callbacks import _labels as label_settings_in_training
from diffusion_cli.commands.trained import LoadedModel
from diffusion_cli.conditions import Condition
from diffusion_cli.data import Array, Digits
from diffusion_cli.data.class_shares import MOST, are_shares, differing_shares, label_settings, labels_in_turn
from diffusion_cli.generate import class_condition, rows_in_turn
from diffusion_cli.metrics import DatasetReference, GivenReference, Reference
from diffusion_cli.training import evaluation
from helpers import TINY, checkpoint_info


def order(counts: list[int]) -> np.ndarray:
    labels = labels_in_turn(label_settings(counts))
    assert labels is not None
    return np.array(labels)


@pytest.mark.parametrize("counts", [[950, 50], [7], [1, 1000, 3], [142, 146, 142, 147, 0, 143, 3], [5] * 40])
def test_any_images_in_a_row_have_the_shares_of_the_whole(counts):
    period = order(counts)
    twice = np.concatenate([period, period])
    for label, count in enumerate(counts):
        share, among = count / sum(counts), np.concatenate([[0], np.cumsum(twice == label)])
        assert among[len(period)] == share * len(period)
        expected = share * np.arange(len(among))
        assert np.abs(among - expected).max() <= 0.5 + share * len(counts) / 2 + 1e-9
        if count == 0:
            assert label not in period


def test_equal_shares_are_the_labels_in_turn():
    assert label_settings([5, 5, 0, 5]) == {"labels": [0, 1, 3]}
    assert order([5, 5, 0, 5]).tolist() == [0, 1, 3]
    assert labels_in_turn({"labels": [2, 0]}) == [2, 0]
    assert labels_in_turn({"labels": None}) is None


def test_shares_are_in_lowest_terms_and_their_order_is_never_long():
    assert label_settings([950, 50]) == {"labels": [0, 1], "label_shares": [19, 1]}
    shares = label_settings([3 * MOST, 7, MOST + 1])["label_shares"]
    assert are_shares(shares, 3)


@pytest.mark.parametrize("value", ["x", [1], [1, 0], [1, -1], [1, 2.0], [1, True], [1, MOST]])
def test_shares_of_a_file_are_checked(value):
    assert not are_shares(value, 2)


def test_shares_differ_from_where_chance_ends():
    names = ("dark", "bright")
    assert differing_shares([950, 50], [19, 1], names) is None
    assert differing_shares([95, 5], [94, 6], names) is None
    assert differing_shares([1000, 1000], [19, 1], names) in (("dark", 0.5, 0.95), ("bright", 0.5, 0.05))
    assert differing_shares([0, 100], [50, 50], names) in (("dark", 0.0, 0.5), ("bright", 1.0, 0.5))


# --- The images that samples are compared with ---------------------------


@pytest.fixture
def unbalanced(tmp_path) -> Path:
    """A file of 95 dark and 5 bright images of 8 x 8 pixels, with their classes."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1], [95, 5]))
    images = (labels[:, None, None] * 160 + rng.integers(0, 90, (100, 8, 8))).astype(np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    return tmp_path / "data.npz"


def array(path: Path) -> Array:
    return Array("", path=str(path), range=None, flip=False, val_fraction=0.0, in_memory=None)


def trained(names: tuple[str, ...], labels: list[int]) -> LoadedModel:
    """A model of these classes that makes all `labels` in turn."""
    model: Any = SimpleNamespace(info=checkpoint_info(class_names=names))
    unused: Any = None
    return LoadedModel(
        model=model, sampler=unused, steps=5, guidance=unused, condition=class_condition(labels), clip=True,
        precision="fp32",
        folder=Path("run"), record={"labels": labels, "steps": 5}, batch_limit=1,
    )  # fmt: skip


def test_samples_take_the_shares_of_the_reference(unbalanced):
    reference: Reference = DatasetReference(array(unbalanced), split="train", stats=None)
    found, note = in_shares_of(trained(("0", "1"), [0, 1]), reference)
    assert found.record == {"labels": [0, 1], "label_shares": [19, 1], "steps": 5}
    assert note == "class shares: those of data/train; for equal shares use label=all"
    one, rest = (
        rows_in_turn(range(*part), found.condition, torch.device("cpu")) for part in ((0, 33), (33, 2000))
    )
    assert one is not None
    assert rest is not None
    assert Condition.cat([one, rest]).values["label"].bincount().tolist() == [1900, 100]
    given = GivenReference(array(unbalanced), path=str(unbalanced))
    assert in_shares_of(trained(("0", "1"), [0, 1]), given)[0].labels == found.labels
    assert in_shares_of(trained(("0", "1", "2"), [1, 2]), given)[0].labels == [1]


def test_a_reference_without_the_models_classes_leaves_equal_shares(unbalanced, tmp_path):
    np.save(tmp_path / "plain.npy", np.zeros((5, 8, 8), np.uint8))
    model = trained(("cat", "dog"), [0, 1])
    plain = GivenReference(array(unbalanced), path=str(tmp_path / "plain.npy"))
    others = DatasetReference(Digits("", val_fraction=0.2, flip=False), split="train", stats=None)
    for reference in (plain, others):
        found, note = in_shares_of(model, reference)
        assert found is model
        assert note.startswith("class shares: equal, because ")


def test_a_reference_that_cannot_be_read_names_the_way_out(unbalanced, tmp_path):
    missing = GivenReference(array(unbalanced), path=str(tmp_path / "missing.npy"))
    with pytest.raises(
        ValueError, match=r"^label=null: the labels of the reference .* does not exist.*; set label=all"
    ):
        in_shares_of(trained(("0", "1"), [0, 1]), missing)


def test_published_statistics_leave_equal_shares_without_the_data_set():
    class Absent(Digits):
        def load(self, split):
            raise AssertionError("the data set is read")

    reference = DatasetReference(
        Absent("", val_fraction=0.2, flip=False), split="train", stats="statistics.npz"
    )
    names = reference.dataset.class_names
    assert names is not None
    model = trained(names, [0, 1])
    found, note = in_shares_of(model, reference)
    assert found is model
    assert note == "class shares: equal, because statistics.npz has no labels of the model's classes"
    assert label_settings_in_training(reference, names, [3, 0, *[5] * 8]) == {"labels": [0, *range(2, 10)]}


def test_an_evaluation_while_training_takes_the_shares_of_the_reference(unbalanced, tmp_path, monkeypatch):
    seen: list[int] = []

    def spy(numbers, conditions, device):
        found = rows_in_turn(numbers, conditions, device)
        seen.extend([] if found is None else found.values["label"].tolist())
        return found

    monkeypatch.setattr(evaluation, "rows_in_turn", spy)
    words = [
        "dataset=array", f"dataset.path={unbalanced}", "model.class_conditional=true", "max_steps=1", "eval_every=1",
        "eval_samples=40", "eval_steps=1", "features=classifier", "features.steps=1", "metric=is", "metric.is.splits=2",
    ]  # fmt: skip
    assert run([*TINY, *words, f"output_dir={tmp_path}/o", f"cache_dir={tmp_path}/cache"]) == 0
    assert len(seen) == 40
    assert abs(sum(seen) - 2) <= 1
